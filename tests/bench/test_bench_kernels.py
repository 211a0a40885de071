"""Operations by themselves: the bytes are those of the table, wrong results show, and what is not there is named."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gpu import gpu_test

from megatron_ttl.bench.kernel_bytes import (
    WIDTHS,
    adamw_bytes_per_parameter,
    bytes_per_token,
    widths_of,
)
from megatron_ttl.bench.kernel_cases import CASES
from megatron_ttl.bench.kernels import PATHS, bench_kernels
from megatron_ttl.bench.workload import base_profile, load_workload_settings
from megatron_ttl.errors import ConfigError


def test_bytes_of_ttl_460m_in_bf16():
    """h 1024, f 4096, 16 heads of 64, v 32,000: 4h + 4, 8h + 4, 4(q + kv), 6f and 10f, 4v."""
    found = {op: bytes_per_token(op, WIDTHS["460m"], 2) for op in CASES}
    assert found == {"rms_norm": {"forward": 4100, "backward": 6148}, "add_rms_norm": {"forward": 8196, "backward": 8196},
                     "rotary_heads": {"forward": 8192, "backward": 12288}, "swiglu": {"forward": 24576, "backward": 40960},
                     "cross_entropy": {"both": 128_000}}
    assert adamw_bytes_per_parameter(2) == 30 and adamw_bytes_per_parameter(0) == 28


@pytest.mark.parametrize(("name", "file"), [("160m", "ttl_160m"), ("460m", "ttl_460m"), ("1b1", "tinyllama_1b1")])
def test_widths_are_those_of_the_run_files(repository, name, file):
    run = load_workload_settings(base_profile(None, 1), repository / f"configs/{file}.toml").run
    assert widths_of(run.model) == WIDTHS[name]


def test_every_operation_has_figures():
    """PyTorch's paths on the CPU: forward and backward apart, where they are apart."""
    result = bench_kernels(tokens=64, paths=["torch"], widths=["small"], repeats=4)
    rows = {(row["op"], row["direction"]): row for row in result["rows"]}
    assert set(rows) == {*((op, way) for op in ("rms_norm", "add_rms_norm", "rotary_heads", "swiglu")
                           for way in ("forward", "backward")), ("cross_entropy", "both"), ("adamw", "both")}
    for (op, _), row in rows.items():
        assert row["share_of_copy"] == pytest.approx(row["bytes"] / row["median_us"] * 1e6 / result["copy_bytes_per_s"])
        assert row["minimum_us"] <= row["median_us"] and (op == "adamw" or row["error"] < 1e-5)
    assert rows["swiglu", "forward"]["bytes"] == 64 * 3 * 384 * 4


def test_what_is_wrong_or_missing_shows(monkeypatch):
    """A result off by a hundredth, a gradient that is not written, and kernels that are not there.

    Gate and up come as two tensors, in one piece each, to who takes them so.
    """
    def careless(gate, up):
        assert gate.is_contiguous() and up.is_contiguous()
        return torch.nn.functional.silu(gate) * up * 1.01

    class Unwritten(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, eps):
            ctx.save_for_backward(x, weight)
            return CASES["rms_norm"].ours(x, weight, eps)

        @staticmethod
        def backward(ctx, gradient):
            return *(torch.full_like(saved, torch.nan) for saved in ctx.saved_tensors), None

    monkeypatch.setitem(CASES, "swiglu", replace(CASES["swiglu"], others={"liger": careless}))
    monkeypatch.setitem(CASES, "rms_norm", replace(CASES["rms_norm"], others={"liger": Unwritten.apply}))
    rows = {(row["op"], row["path"], row["direction"]): row for row in bench_kernels(
        ["swiglu", "rms_norm", "adamw"], 16, ["small"], ["cuda", "liger", "apex"], 4)["rows"]}
    assert all(5e-3 < rows["swiglu", "liger", way]["error"] < 2e-2 for way in ("forward", "backward"))
    assert rows["rms_norm", "liger", "forward"]["error"] < 1e-5 and rows["rms_norm", "liger", "backward"]["error"] != 0
    assert not rows["rms_norm", "liger", "backward"]["error"] < 1  # NaN
    if not torch.cuda.is_available():
        for key in (("swiglu", "cuda", "forward"), ("rms_norm", "apex", "backward"), ("adamw", "cuda", "both")):
            assert rows[key]["note"].startswith("not available: kernels.") and rows[key]["median_us"] is None


def test_names_and_numbers_are_checked():
    with pytest.raises(ConfigError, match="--op: 'softmax'; it must be one of rms_norm") as caught:
        bench_kernels(["softmax"], 0, ["2b"], ["triton"], 0)
    assert len(caught.value.faults) == 5


@gpu_test
def test_shares_on_a_gpu_can_be_true():
    """No path is faster than memory, ours computes what it should, and a backward pass is timed by itself."""
    result = bench_kernels(tokens=8192, widths=["460m"], repeats=8)
    for row in result["rows"]:
        assert row["path"] in PATHS and (row["share_of_copy"] or 0) < 1.15
        if row["path"] in ("cuda", "torch") and row["op"] != "adamw":
            assert row["error"] < 0.05, row
