"""Which implementation runs: by name, by itself, and what cannot be had."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from cuda_emulation import emulation

from megatron_ttl.config.kernels import KernelsConfig
from megatron_ttl.errors import ConfigError
from megatron_ttl.kernels.paths import KernelPaths, resolve_paths

CPU = torch.device("cpu")


def test_config_and_paths_know_the_same_operations():
    """They do not import each other."""
    assert list(KernelsConfig.model_fields) == list(asdict(KernelPaths()))


def test_on_a_cpu_everything_is_pytorchs():
    """With a reason for each; also where the emulator stands by, for nobody asked for it."""
    report = resolve_paths(KernelsConfig().model_dump(), CPU)
    assert report.paths == KernelPaths() == resolve_paths({}, CPU).paths
    assert [(operation, path) for operation, path, _ in report.rows] == list(asdict(report.paths).items())
    assert all(why for *_, why in report.rows) and report.rows[0][2] == "the kernels are for CUDA devices, not for cpu"
    with emulation():
        assert resolve_paths({}, CPU).paths == KernelPaths()
        asked = resolve_paths({"rms_norm": "cuda", "adamw": "cuda"}, CPU)
    assert (asked.paths.rms_norm, asked.paths.adamw, asked.paths.swiglu) == ("cuda", "cuda", "torch")
    assert asked.rows[0] == ("rms_norm", "cuda", "asked for by name")


def test_all_that_is_not_there_is_told_at_once():
    """One fault for each, with where, why, and a way out."""
    with pytest.raises(ConfigError) as caught:
        resolve_paths({"rms_norm": "cuda", "swiglu": "torch", "adamw": "apex", "attention": "cudnn"}, CPU)
    told = [fault.partition(": is ")[0] for fault in caught.value.faults]
    assert told == ["kernels.rms_norm", "kernels.adamw", "kernels.attention"]
    assert all("must be there; take \"auto\"" in fault for fault in caught.value.faults)


@pytest.mark.parametrize("path", ["cudnn", "flash"])
def test_attention_in_fp32(path):
    """These compute in half precision."""
    with pytest.raises(ConfigError, match=f'kernels.attention: is "{path}", .*fp32'):
        resolve_paths({"attention": path, "rms_norm": "torch"}, torch.device("cuda"), torch.float32)
