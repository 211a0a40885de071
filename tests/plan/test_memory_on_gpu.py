"""On a GPU: what PyTorch's allocator handed out in real steps against the forecast, and the promises under a cap."""

from __future__ import annotations

import json

import pytest
import torch
from counted_memory import memory_on_a_gpu
from gpu import needs_gpu

from megatron_ttl.config.load import load_settings
from megatron_ttl.plan.memory import CUDA_CONTEXT, peak_memory
from megatron_ttl.testing import run_distributed

pytestmark = [*needs_gpu, pytest.mark.slow]
GIB = 2**30


def files(repository, folder, name, micro_batch, accumulation=2, model="", **profile):
    """Write a profile, and a preset with two micro batches a step, of which a test may change the model."""
    base = {"train_micro_batch_size_per_gpu": micro_batch, "bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}
    (folder / "m.json").write_text(json.dumps(base | profile))
    text = (repository / f"configs/{name}.toml").read_text()
    lines = []
    for line in text.splitlines():
        key = line.partition("=")[0].strip()
        if key == "tokens_per_step":
            line = f"tokens_per_step = {micro_batch * accumulation * 2048}"
        elif key == "num_hidden_layers" and model:
            line = f"num_hidden_layers = {model}"
        lines.append(line)
    (folder / "r.toml").write_text("\n".join(lines))
    return str(folder / "m.json"), str(folder / "r.toml")


@pytest.mark.parametrize("name", ["ttl_160m", "tinyllama_1b1"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_peak_is_within_ten_per_cent(repository, tmp_path, name, recompute, accumulation):
    """Models of published width and four blocks."""
    pair = files(repository, tmp_path, name, 8, accumulation, model="4", recompute=recompute)
    ((allocated, _),) = run_distributed(memory_on_a_gpu, 1, *pair, 2**50, timeout_s=600)
    assert allocated == pytest.approx(peak_memory(load_settings(*pair), 1).allocated, rel=0.1)


@pytest.mark.parametrize(("name", "micro_batch", "gib"), [
    ("ttl_460m", 12, 39), ("tinyllama_1b1", 6, 39), ("ttl_460m", 32, 78), ("tinyllama_1b1", 16, 78)])
def test_published_models_fit(repository, tmp_path, name, micro_batch, gib):
    """40 and 80 GB, the allocator being capped to what these cards leave beside the CUDA context."""
    cap = gib * GIB - CUDA_CONTEXT
    if torch.cuda.get_device_properties(0).total_memory < cap:
        pytest.skip(f"needs a CUDA device with {gib} GiB")
    pair = files(repository, tmp_path, name, micro_batch)
    ((allocated, reserved),) = run_distributed(memory_on_a_gpu, 1, *pair, cap, timeout_s=600)
    assert reserved <= cap and allocated == pytest.approx(peak_memory(load_settings(*pair), 1).allocated, rel=0.1)
