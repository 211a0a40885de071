"""The step of the engine against peers: all train the same model, and none can keep the others from being measured."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from gpu import gpu_test
from tiny_folder import documents, write_dataset

from megatron_ttl.bench.command_line import parser
from megatron_ttl.bench.contender import not_installed, run_trials, trial_rows
from megatron_ttl.bench.step import PEERS, bench_step
from megatron_ttl.bench.workload import (
    SyntheticTokens,
    base_profile,
    load_workload_settings,
    opened,
)
from megatron_ttl.errors import ConfigError
from megatron_ttl.testing import run_distributed

SMALLER = ["model.hidden_size=64", "model.intermediate_size=128", "model.num_hidden_layers=2", "model.vocab_size=512",
           "train.sequence_length=32", "train.tokens_per_step=256", "schedule.warmup_steps=1"]
KNOWN = {"liger": "liger_kernel", "litgpt": "litgpt"}


def measured(mesh, folder):
    """Time all peers in fp32, those with masters in bf16, and on real data; a process that has imported torch does all."""
    (folder / "bf16.json").write_text('{"train_micro_batch_size_per_gpu": 8, "bf16": {"enabled": true}, '
                                      '"zero_optimization": {"stage": 1}}')
    common = {"overrides": SMALLER, "micro_batch": 4, "steps": 2, "rounds": 1, "warm_up": 1}
    return [bench_step(**common), bench_step(**common, deepspeed_config=str(folder / "bf16.json"), peers=["bare", "plain"]),
            fake_trials(),
            bench_step(**{**common, "overrides": [*SMALLER, f'data.sources=[{{prefix="{folder}/pt"}}]',
                                                  "data.document_mask=true"]}, peers=["bare", "hf"], data=True)]


@pytest.fixture(scope="module")
def results(tmp_path_factory, tokenizer_folder):
    """Results of `measured`."""
    folder = tmp_path_factory.mktemp("step")
    write_dataset(folder / "pt", tokenizer_folder, documents(60))
    return run_distributed(measured, 1, folder)[0]


def test_every_contender_trains_the_same_model(results):
    """After three steps the losses agree to fp32's rounding, so that the ratios compare equal work."""
    result = results[0]
    rows = {row["name"]: row for row in json.loads(json.dumps(result))["rows"]}
    assert list(rows) == ["ours", *PEERS] and result["accumulation"] == 2
    for name, row in rows.items():
        if name in KNOWN and importlib.util.find_spec(KNOWN[name]) is None:
            assert row["note"] == "not installed" and row["tokens_per_s"] is None
        elif name in KNOWN:
            continue  # its kernels may want a GPU
        else:
            assert row["loss"] == pytest.approx(rows["ours"]["loss"], rel=1e-5), name
            assert row["tokens_per_s"] == pytest.approx(256e3 / row["median_ms"])
            assert row["ratio"] == pytest.approx(row["median_ms"] / rows["ours"]["median_ms"])
            assert row["ratio_of_minima"] == pytest.approx(row["minimum_ms"] / rows["ours"]["minimum_ms"])
    assert rows["ours"]["loss"] < 6.2  # the logarithm of 512 is 6.24: something is learnt


def test_bf16_has_masters_everywhere(results):
    """A plain loop that moved bf16 weights by a learning rate of 1e-3 would stay behind the engine."""
    rows = {row["name"]: row for row in results[1]["rows"]}
    assert results[1]["precision"] == "bf16" and results[1]["accumulation"] == 2
    for name in ("bare", "plain"):
        assert rows[name]["loss"] == pytest.approx(rows["ours"]["loss"], abs=2e-3), name


def test_the_engine_of_the_profile_is_measured(tmp_path):
    """Settings decide who steps, here as in a run; its row says so."""
    (tmp_path / "flat.json").write_text('{"train_micro_batch_size_per_gpu": 4, "engine": "flat", '
                                        '"zero_optimization": {"stage": 1}}')
    rows = run_distributed(flat_rows, 1, str(tmp_path / "flat.json"))[0]
    assert rows[0]["note"].startswith("flat") and rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-5)


def flat_rows(mesh, profile):
    """Measure the flat engine and the bare loop."""
    return bench_step(overrides=SMALLER, deepspeed_config=profile, steps=1, rounds=1, warm_up=1, peers=["bare"])["rows"]


def test_the_runs_own_data_and_its_documents(results):
    """Micro batches with unequally many labels weigh as they do in the engine; who attends across documents is left out."""
    rows = {row["name"]: row for row in results[3]["rows"]}
    assert rows["bare"]["loss"] == pytest.approx(rows["ours"]["loss"], rel=1e-5)
    assert rows["hf"]["note"].startswith("not available: data.document_mask: is true")


class Recorded:
    """A contender that notes when it is built and closed."""

    note = "fake"

    def __init__(self, name, log):
        self.name, self.log = name, log
        log.append(name)
        torch.backends.cuda.enable_math_sdp(False)  # which must not reach the next one

    def step(self, micro_batches):
        assert len(micro_batches) == 2
        return torch.tensor(1.0)

    def close(self):
        self.log.append(f"{self.name} closed")


def fake_trials():
    """Run contenders that work, run out of memory, are not there, and fail."""
    log = []

    def failing(error):
        def build(workload):
            raise error
        return build

    builders = {"a": lambda workload: Recorded("a", log), "large": failing(torch.OutOfMemoryError("no")),
                "absent": failing(not_installed("peer", ImportError("no"))), "broken": failing(KeyError("x")),
                "b": lambda workload: Recorded("b", log)}
    settings = load_workload_settings(base_profile(None, 4), None, SMALLER)
    with opened(settings) as workload:
        rows = trial_rows(run_trials(builders, workload, 2, 2, 0), workload, "a")
    return log, rows, torch.backends.cuda.math_sdp_enabled()


def test_one_contender_cannot_stop_the_others(results):
    """They take turns, forward and backward, each closed before the next; a fault is a row."""
    log, rows, math_is_on = results[2]
    assert math_is_on
    assert log == ["a", "a closed", "b", "b closed", "b", "b closed", "a", "a closed"]
    assert [row["note"] for row in rows] == ["fake", "out of memory", "not installed", "failed: KeyError: 'x'", "fake"]
    assert rows[4]["ratio"] > 0 and rows[1]["ratio"] is None


def test_synthetic_samples_are_a_function_of_their_numbers():
    source = SyntheticTokens(512, 16)
    ids, labels = source.samples(torch.arange(6).numpy())
    again, _ = source.samples(torch.tensor([4]).numpy())
    assert (ids[4] == again[0]).all() and (ids[:, 1:] == labels[:, :-1]).all() and ids.max() < 512 <= 2 * ids.max()


def test_mistakes_are_named(call_tool, tmp_path):
    """Names, numbers, and a profile of several processes."""
    code, _, said = call_tool("bench.py", "step", "--steps", 0, "--peer", "plane")
    assert code == 2 and "--steps: is 0; it must be at least 1" in said and "'plane'; it must be one of all, bare" in said
    (tmp_path / "two.json").write_text('{"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}, '
                                       '"parallel": {"tensor": 2}}')
    with pytest.raises(ConfigError, match=r"two.json: parallel: tensor 2, pipeline 1; both must be 1"):
        bench_step(deepspeed_config=str(tmp_path / "two.json"))
    with pytest.raises(ConfigError, match=r"gone.json: does not exist"):
        bench_step(deepspeed_config=str(tmp_path / "gone.json"))


def test_the_loader_keeps_its_old_name():
    subjects = [parser("").parse_args([name, "--prefix", "a"]).subject for name in ("data", "loader")]
    assert subjects == ["data", "loader"]


@pytest.mark.skipif(importlib.util.find_spec("litgpt") is None, reason="needs litgpt")
def test_litgpt_has_our_weights():
    from megatron_ttl.bench.peer_litgpt import build_litgpt_model
    from megatron_ttl.model.llama import build_model

    config = load_workload_settings(base_profile(None, 4), None, SMALLER).run.model
    ids = torch.randint(512, (2, 16), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(build_litgpt_model(config, 1)(ids), build_model(config, 1)(ids), atol=1e-5, rtol=1e-5)


@gpu_test
def test_rows_of_a_gpu():
    """Compiled peers, peak memory and MFU are there, and no compiled peer trains something else."""
    rows = {row["name"]: row for row in bench_step(overrides=SMALLER, steps=5, rounds=2)["rows"]}
    assert "torch.compile" in rows["plain"]["note"]
    for name in ("ours", "bare", "plain", "hf"):
        assert rows[name]["peak_memory_bytes"] > 0 and rows[name]["ratio"] > 0
        assert rows[name]["loss"] == pytest.approx(rows["ours"]["loss"], abs=0.02)
