"""What a dry run says of memory: parts, verdicts for every size of the device, what to do where it does not fit."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from megatron_ttl.config.load import load_settings
from megatron_ttl.plan.device_memory import memory_of
from megatron_ttl.plan.forecast import forecast, print_forecast
from megatron_ttl.plan.memory import with_profile
from megatron_ttl.plan.memory_report import describe_memory

GIB = 2**30


@pytest.mark.parametrize(("name", "gib"), [
    ("A100", [39, 78]), ("NVIDIA A100-SXM4-40GB", [39]), ("NVIDIA A100 80GB PCIe", [78]), ("H100", [78]),
    ("NVIDIA H100 80GB HBM3", [78]), ("NVIDIA H200", [139]), ("NVIDIA A10", [21.9]), ("NVIDIA GeForce RTX 4090", [23.5]),
    ("Tesla V100-SXM2-32GB", [31.7]), ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", []), ("Abacus", []), ("", [])])
def test_devices_and_their_sizes(name, gib):
    """Product names and drivers' names; a slice of a device, and what is unknown, have no size."""
    assert list(memory_of(name).values()) == [int(size * GIB) for size in gib]


def described(repository, name, micro_batch, profile="a100_single", recompute="none"):
    overrides = ["train.tokens_per_step=262144"]
    settings = load_settings(repository / f"configs/{profile}.json", repository / f"configs/{name}.toml", overrides)
    return with_profile(settings, train_micro_batch_size_per_gpu=micro_batch, recompute=recompute)


def test_two_sizes_have_two_verdicts(repository):
    """32 samples of 460M fit into the larger A100; for the smaller there are a smaller micro batch, or recomputation."""
    result = describe_memory(described(repository, "ttl_460m", 32), 1)
    small, large = result["devices"]
    assert (small["device"], small["fits"], large["device"], large["fits"]) == ("A100, 40 GB", False, "A100, 80 GB", True)
    assert small["share"] == pytest.approx(2 * large["share"])
    assert sum(result["parts"].values()) == result["bytes"] == large["share"] * large["bytes"]
    assert result["bytes_without_cuda_kernels"] > 1.4 * result["bytes"]
    (warning,) = result["warnings"]
    assert "192% of A100, 40 GB" in warning
    assert 'set train_micro_batch_size_per_gpu to 8, or recompute to "selective" and the micro batch to 16' in warning


def test_what_no_micro_batch_cures_is_said_so(repository):
    """ZeRO's bucket and 8 billion parameters on a card of 24 GB."""
    settings = described(repository, "tinyllama_1b1", 4)
    run = settings.run.model_copy(update={"model": settings.run.model.model_copy(update={"num_hidden_layers": 180})})
    (warning,) = describe_memory(replace(settings, run=run, device="NVIDIA L4"), 1)["warnings"]
    assert "spread it over more GPUs, or offload the optimizer" in warning


def test_recomputation_is_offered_from_the_present_kind_on(repository):
    """Where the outputs of norms are recomputed already, whole blocks are left."""
    (warning,) = describe_memory(described(repository, "ttl_460m", 32, recompute="selective"), 1)["warnings"]
    assert "micro_batch_size_per_gpu to 16" in warning and 'recompute to "full"; ' not in warning
    assert warning.endswith('recompute to "full"')


def test_the_dry_run_shows_it(repository, capsys):
    """People get tables and a warning; programs one JSON object with everything."""
    settings = described(repository, "ttl_460m", 32)
    result = forecast(settings, 1)
    print_forecast(result, as_json=False)
    shown = capsys.readouterr()
    text = " ".join(shown.out.split())
    assert "peak_memory 74.9 GiB" in text and "at the head's backward pass" in text
    assert "A100, 40 GB 39.0 GiB 192% false 14 20 " in text and "A100, 80 GB 78.0 GiB 96% true 33 46 " in text
    assert shown.err.startswith("warning: ") and "A100, 40 GB" in shown.err
    print_forecast(result, as_json=True)
    assert json.loads(capsys.readouterr().out)["peak_memory"]["parts"].keys() == {
        "states", "gradients", "activations", "logits", "transient", "buffers", "reserve"}


def test_a_pipeline_shows_the_peak_of_every_stage(repository, tmp_path):
    """The first stage holds most micro batches, the last one the logits."""
    profile = json.loads((repository / "configs/h100_8x.json").read_text())
    (tmp_path / "m.json").write_text(json.dumps(profile | {"parallel": {"pipeline": 4}}))
    result = forecast(load_settings(tmp_path / "m.json", repository / "configs/tinyllama_1b1.toml"), 8)
    peaks = [stage["peak_memory_bytes_per_rank"] for stage in result["layout"]["stages"]]
    assert result["peak_memory"]["bytes"] == max(peaks) == peaks[0] and peaks[1] > peaks[2]


@pytest.mark.parametrize(("profile", "name", "gib"), [
    ("v100_fp16", "ttl_460m", 15.7), ("small_gpu_offload", "tinyllama_1b1", 7.5), ("a100_8x", "tinyllama_1b1", 39),
    ("h100_8x", "tinyllama_1b1", 78), ("slurm_2x8", "tinyllama_1b1", 39), ("a100_single", "ttl_460m", 39)])
def test_shipped_profiles_fit_where_they_say(repository, profile, name, gib):
    """V100 of 16 GB, a GPU of 8 GB, the smaller A100."""
    settings = load_settings(repository / f"configs/{profile}.json", repository / f"configs/{name}.toml")
    processes = {"a100_8x": 8, "h100_8x": 8, "slurm_2x8": 16}.get(profile, 1)
    assert describe_memory(settings, processes)["bytes"] < gib * GIB
