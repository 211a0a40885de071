"""The record of a run: rows, lines, and a file that a kill tore."""

from __future__ import annotations

import json

import pytest

from megatron_ttl.testing import tiny_run
from megatron_ttl.train.device_peaks import peak_flops
from megatron_ttl.train.metrics import MetricLogger, format_row, repair

ROW = {"event": "train", "step": 50, "tokens": 12_800, "loss": 3.25, "lr": 6e-4, "grad_norm": 0.75,
       "tokens_per_s": 26_912.0, "mfu": 0.0812, "step_s": 0.5, "data_wait_s": 0.0001, "peak_memory_bytes": 3 << 30,
       "energy_kwh": 1.5, "emissions_kg_co2e": 0.15}


def test_a_line_says_all_that_is_promised():
    """Loss, lr, gradient norm, speed, MFU, memory, data wait, energy and the time left."""
    line = format_row(ROW, total_steps=7_250)
    for part in ("step 50/7250", "loss 3.2500", "lr 6.000e-04", "grad norm 0.750", "26,912 tok/s", "MFU 8.1 %",
                 "memory 3.0 GiB", "data wait 0.1 ms", "1.5 kWh 0.15 kgCO2e", "ETA 1 h 00 min"):
        assert part in line
    assert "MFU -" in format_row(ROW | {"mfu": None}, 100)
    assert "(stale)" in format_row(ROW | {"energy_stale": True}, 100)


def test_rows_are_json_lines_and_survive_a_torn_end(tmp_path, capsys):
    """A second logger cuts the half line, says so, and finds the last row's energy."""
    run = tiny_run(str(tmp_path))
    with MetricLogger(tmp_path, run, writes=True) as metrics:
        metrics.row(ROW)
        metrics.row(ROW | {"step": 51, "loss": float("nan"), "energy_kwh": 1.75})
        metrics.row({"event": "checkpoint", "step": 51, "tokens": 1})
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"event": "tra')
    with MetricLogger(tmp_path, run, writes=True) as metrics:
        assert metrics.last_row["energy_kwh"] == 1.75
        metrics.row(ROW | {"step": 52})
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [50, 51, 51, 52]
    assert rows[1]["loss"] is None
    assert "its 14 bytes were cut off" in capsys.readouterr().err
    assert repair(path) == 0


def test_other_processes_write_nothing(tmp_path, capsys):
    """Only the first process speaks."""
    with MetricLogger(tmp_path, tiny_run(str(tmp_path)), writes=False) as metrics:
        metrics.row(ROW)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("name", "peak"), [
    ("NVIDIA A100-SXM4-40GB", 312e12), ("NVIDIA A100 80GB PCIe", 312e12), ("NVIDIA H100 80GB HBM3", 989e12),
    ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12), ("NVIDIA GeForce RTX 4090", 165.2e12),
    ("NVIDIA A10", 125e12), ("NVIDIA A10G", 70e12), ("NVIDIA L40S", 362e12), ("Tesla T4", None), ("x86_64 CPU", None),
])
def test_peaks_are_dense_bf16(name, peak):
    """The denominators that other code gets wrong."""
    assert peak_flops(name) == peak
