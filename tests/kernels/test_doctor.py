"""tools/doctor.py: what runs on this machine, why, and how exact it is."""

from __future__ import annotations

import json
from dataclasses import replace

import torch
from cuda_emulation import emulation
from gpu import gpu_test

from megatron_ttl.config.kernels import KernelsConfig
from megatron_ttl.kernels import doctor
from megatron_ttl.kernels.paths import KernelPaths, resolve_paths


def test_the_tool_runs_anywhere(repository, call_tool):
    """Without a GPU too: a table for people, one object for programs, status 0."""
    command = ("doctor.py", "--deepspeed_config", repository / "configs" / "a100_single.json")
    (code, text, _), (code_too, as_json, _) = call_tool(*command), call_tool(*command, "--json")
    found = json.loads(as_json)
    assert code == code_too == 0
    assert [row["operation"] for row in found["operations"]] == list(KernelsConfig.model_fields)
    assert found["versions"]["torch"] == torch.__version__ and found["versions"]["deepspeed"] != "absent"
    for row in found["operations"]:
        assert row["operation"] in text and row["why"] in text
    code, _, told = call_tool("doctor.py", "--deepspeed_config", repository / "configs" / "none.json")
    assert code == 2 and "none.json" in told


def test_a_path_is_compared_with_pytorchs(monkeypatch):
    """By the emulator: the kernel is as exact as PyTorch; a wrong one is seen, and one that gives NaN."""
    paths = replace(KernelPaths(), rms_norm="cuda")
    with emulation():
        for dtype in (torch.float32, torch.bfloat16):
            found = doctor.error_ratios(paths, torch.device("cpu"), dtype)
            assert set(found) <= set(KernelsConfig.model_fields) and all(0 <= ratio <= 2 for ratio in found.values()), found
    right = doctor.add_rms_norm
    for spoil in (lambda y: y * 1.01, lambda y: y * float("nan")):
        monkeypatch.setattr(doctor, "add_rms_norm", lambda *arguments, path, spoil=spoil: (
            right(*arguments)[0], right(*arguments)[1] if path == "torch" else spoil(right(*arguments)[1])))
        assert not doctor.error_ratios(paths, torch.device("cpu"), torch.float32)["rms_norm"] <= 2


@gpu_test
def test_every_path_of_this_gpu_is_exact():
    """Each operation that "auto" takes, in bf16 and fp32."""
    for dtype in (torch.bfloat16, torch.float32):
        paths = resolve_paths({}, torch.device("cuda"), dtype).paths
        found = doctor.error_ratios(paths, torch.device("cuda"), dtype)
        assert all(ratio <= 2 for ratio in found.values()), found
