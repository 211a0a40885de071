"""Each kernel is compared with PyTorch's operations on the device before it is trusted."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from cuda_emulation import emulation
from gpu import gpu_test

from megatron_ttl.errors import ConfigError
from megatron_ttl.kernels import build, paths, self_check
from megatron_ttl.kernels.paths import KernelPaths, resolve_paths

CPU, OPERATIONS = torch.device("cpu"), [operation for operation in asdict(KernelPaths()) if operation != "attention"]
ALL = dict.fromkeys(OPERATIONS, "cuda")


def test_an_implementation_is_compared_with_pytorchs(monkeypatch):
    """By the emulator: every kernel is as exact as PyTorch; a wrong one is seen, and one that gives NaN."""
    before = torch.get_rng_state()
    with emulation():
        for dtype in (torch.float32, torch.bfloat16):
            found = self_check.error_ratios(ALL, CPU, dtype)
            assert list(found) == OPERATIONS and all(0 <= ratio <= 2 for ratio in found.values()), found
    assert torch.equal(before, torch.get_rng_state())
    right = self_check.add_rms_norm
    for spoil in (lambda y: y * 1.01, lambda y: y * float("nan")):
        monkeypatch.setattr(self_check, "add_rms_norm", lambda *arguments, path, spoil=spoil: (
            right(*arguments)[0], right(*arguments)[1] if path == "torch" else spoil(right(*arguments)[1])))
        assert not self_check.error_ratios({"rms_norm": "cuda"}, CPU, torch.float32)["rms_norm"] <= paths.ERROR_LIMIT


def test_a_wrong_kernel_is_not_used(monkeypatch, capsys):
    """Unasked, with a warning that names it; the others are."""
    gpu = torch.device("cuda")
    monkeypatch.setattr(build, "kernels_for", {"cuda": object()}.get)
    monkeypatch.setattr(paths, "checked", lambda *_: dict.fromkeys(OPERATIONS, 1.0) | {"swiglu": 1e4})
    report = resolve_paths({}, gpu)
    assert (report.paths.swiglu, report.paths.rms_norm, report.paths.adamw) == ("torch", "cuda", "cuda")
    assert "kernels.swiglu: our kernel's error is 1e+04 times PyTorch's" in capsys.readouterr().err


def test_a_kernel_that_fails_is_one_sentence(monkeypatch):
    """With what to set: no run goes on with a device in that state."""
    def refuse(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")

    monkeypatch.setattr(paths, "error_ratios", refuse)
    with pytest.raises(ConfigError, match='illegal memory access was encountered.*"swiglu": "torch"'):
        paths.checked.__wrapped__(torch.device("cuda"), torch.bfloat16)


@gpu_test
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_implementation_of_this_gpu_is_exact(dtype):
    """Each operation that "auto" takes."""
    chosen = asdict(resolve_paths({}, torch.device("cuda"), dtype).paths)
    found = self_check.error_ratios(chosen, torch.device("cuda"), dtype)
    assert all(ratio <= 2 for ratio in found.values()), found
