"""Which engine runs where, what is refused, and that DeepSpeed is told nothing of it."""

from __future__ import annotations

import re

import pytest
from test_refusals import PROFILE, RUN, faults_of, load

from megatron_ttl.config.deepspeed import resolve_deepspeed
from megatron_ttl.config.engine import engine_kind, engine_words, engine_world_faults, records_graphs
from megatron_ttl.config.load import read_settings

OFFLOAD = {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}
BF16, FP16 = {"bf16": {"enabled": True}}, {"fp16": {"enabled": True}}


@pytest.mark.parametrize(("change", "world_size", "cuda", "expected"), [
    ({}, 1, True, "flat"), (BF16, 1, True, "flat"), ({}, 1, False, "deepspeed"), (BF16, 2, True, "deepspeed"),
    (FP16, 1, True, "deepspeed"), (OFFLOAD, 1, True, "deepspeed"), ({"wall_clock_breakdown": True}, 1, True, "deepspeed"),
    ({"engine": "deepspeed"}, 1, True, "deepspeed"), ({"engine": "flat"}, 1, False, "flat"),
])
def test_the_engine_follows_from_the_machine(tmp_path, change, world_size, cuda, expected):
    profile = load(tmp_path, profile={**PROFILE, **change}).profile
    assert engine_kind(profile, world_size, cuda) == engine_words(profile, world_size, cuda) == expected


def test_what_is_not_known_yet_is_said_so(tmp_path):
    profile = load(tmp_path).profile
    assert engine_words(profile, 1, None) == "flat on a GPU, deepspeed without one"
    assert engine_words(profile, 2, None) == "deepspeed"


@pytest.mark.parametrize(("change", "message"), [
    ({"engine": "fast"}, r'engine: is "fast"; must be one of "auto", "deepspeed", "flat"'),
    ({"engine": "flat", **FP16}, "engine: is \"flat\", and fp16.enabled is given; .*finds no loss scale"),
    ({"engine": "flat", **OFFLOAD}, "zero_optimization.offload_optimizer is given; .*keeps all state on the device"),
    ({"engine": "flat", "wall_clock_breakdown": True}, "wall_clock_breakdown is given"),
    ({"compile": True, "zero_optimization": {"stage": 3}}, "compile: is true with zero_optimization.stage 3"),
    ({"compile": True, "parallel": {"pipeline": 2}}, "compile: is true with parallel.pipeline 2"),
    ({"compile": True, "parallel": {"tensor": 2}}, "compile: is true with parallel.tensor 2"),
    ({"compile": "inductor"}, "compile: .*must be true or false"),
    ({"cuda_graphs": "true"}, 'cuda_graphs: is "true"; must be one of "auto", true, false'),
    ({"cuda_graphs": 1}, 'cuda_graphs: is 1; must be one of "auto", true, false'),
    ({"cuda_graphs": True, "engine": "deepspeed"}, 'cuda_graphs: is true, and engine is "deepspeed"'),
    ({"kernels": {"adamw": "triton"}}, 'kernels.adamw: is "triton"; must be one of "auto", "cuda", "torch", "apex"'),
])
def test_what_no_engine_can_do_is_refused(tmp_path, change, message):
    fault, = faults_of(tmp_path, profile={**PROFILE, **change})
    assert re.search(message, fault) and fault.count(";") >= 2 and "m.json" in fault


def test_masks_of_documents_are_not_recorded(tmp_path):
    text = RUN.replace("[data]", "[data]\ndocument_mask = true")
    fault, = faults_of(tmp_path, profile={**PROFILE, "cuda_graphs": True}, text=text)
    assert "cuda_graphs: is true, and the run file's data.document_mask is true" in fault
    settings = load(tmp_path, text=text)
    assert not records_graphs(settings.profile, settings.run, "flat", True)


def test_what_the_number_of_processes_and_the_device_decide(tmp_path):
    """A dry run knows the former, the run itself both."""
    settings = load(tmp_path, profile={**PROFILE, "engine": "flat", "cuda_graphs": True})
    reading = read_settings(settings.deepspeed_path, settings.run_path, (), 2)
    assert len(reading.faults) == 1 and 'engine: is "flat", and there are 2 processes' in reading.faults[0]
    assert not read_settings(settings.deepspeed_path, settings.run_path, (), 1).faults
    (key, fault), = engine_world_faults(settings.profile, 1, False)
    assert key == "cuda_graphs" and "there is no GPU" in fault
    (key, fault), = engine_world_faults(load(tmp_path, profile={**PROFILE, "cuda_graphs": True}).profile, 2, True)
    assert key == "cuda_graphs" and "DeepSpeed's engine runs here" in fault


def test_small_micro_batches_are_recorded_unasked(tmp_path):
    """Micro batch 2 of 64 tokens is small; 16,384 tokens are the limit."""
    for change, graphs in (({}, True), ({"train_micro_batch_size_per_gpu": 8}, True), ({"cuda_graphs": False}, False)):
        settings = load(tmp_path, profile={**PROFILE, **change})
        assert records_graphs(settings.profile, settings.run, "flat", True) is graphs
        assert not records_graphs(settings.profile, settings.run, "flat", False)
        assert not records_graphs(settings.profile, settings.run, "deepspeed", True)
    large = settings.profile.model_copy(update={"train_micro_batch_size_per_gpu": 16_384 // 64, "cuda_graphs": "auto"})
    assert records_graphs(large, settings.run, "flat", True)
    larger = large.model_copy(update={"train_micro_batch_size_per_gpu": 16_384 // 64 + 1})
    assert not records_graphs(larger, settings.run, "flat", True)
    assert records_graphs(larger.model_copy(update={"cuda_graphs": True}), settings.run, "flat", True)


def test_deepspeed_is_told_nothing_of_it(tmp_path):
    ours = {"engine": "deepspeed", "compile": True, "cuda_graphs": False, "kernels": {"adamw": "torch"}}
    assert resolve_deepspeed(load(tmp_path, profile={**PROFILE, **ours}), 1) == resolve_deepspeed(load(tmp_path), 1)
