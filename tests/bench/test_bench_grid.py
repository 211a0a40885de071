"""The grid: goes on after an interrupt, leaves out what cannot fit, and ends in a table and a profile that can be used."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from megatron_ttl.bench.grid import PROFILE, ROWS, TABLE, explore
from megatron_ttl.bench.grid_cells import VANILLA, Cell, plan_cells, profile_of
from megatron_ttl.bench.grid_row import Task, measure_cell, measure_in_a_process
from megatron_ttl.bench.grid_table import with_ratios
from megatron_ttl.bench.memory_forecast import why_it_does_not_fit
from megatron_ttl.bench.workload import base_profile, load_workload_settings
from megatron_ttl.config.load import load_settings
from megatron_ttl.errors import ConfigError
from megatron_ttl.testing import run_distributed

AXES = ("precision", "micro_batch", "recompute")
TINY = ["model.hidden_size=64", "model.intermediate_size=128", "model.num_hidden_layers=2", "model.vocab_size=512",
        "train.sequence_length=32", "train.tokens_per_step=256"]
SMALL = {"overrides": TINY, "micro_batch": 4, "axes": AXES}


def figures(cell, task):
    """Make up a row: large micro batches are fast, `full` is fastest and wrong, fp16 is not there."""
    if cell.precision == "fp16":
        return {"status": "not available", "reason": "no GPU"}
    speed = 100.0 * cell.micro_batch * {"none": 1, "selective": 2, "full": 10}[cell.recompute]
    return {"status": "measured", "reason": "", "tokens_per_s": speed if cell.model == "ours" else 50.0, "mfu": None,
            "peak_memory_bytes": 1 << 30, "joules_per_token": None, "energy": "not measured on a CPU",
            "loss": 5.0 + (cell.recompute == "full"), "evaluation_tokens_per_s": 3 * speed, "accumulation": 1, "note": ""}


def test_it_goes_on_where_it_was_interrupted(tmp_path):
    """No row is measured twice, none is lost, and a torn last line is measured again."""
    asked = []

    def interrupted(cell, task):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(cell.key)
        return figures(cell, task)

    with pytest.raises(KeyboardInterrupt):
        explore(str(tmp_path), **SMALL, measure=interrupted)
    with open(tmp_path / ROWS, "a") as file:
        file.write('{"cell": {"model"')

    def counted(cell, task):
        asked.append(cell.key)
        return figures(cell, task)

    result = explore(str(tmp_path), **SMALL, measure=counted)
    rows = [json.loads(line) for line in (tmp_path / ROWS).read_text().splitlines()]
    assert len(asked) == len(set(asked)) == len(rows) == len(result["rows"]) > 8
    again = explore(str(tmp_path), **SMALL, measure=interrupted)
    assert again == result
    with pytest.raises(ConfigError, match="rows of other settings, another device or another version"):
        explore(str(tmp_path), **{**SMALL, "steps": 21}, measure=counted)


def test_what_cannot_fit_is_not_tried(tmp_path):
    tried = []

    def measure(cell, task):
        tried.append(cell)
        return figures(cell, task)

    explore(str(tmp_path), **SMALL, measure=measure,
            forecast=lambda settings: "needs 90 GiB" if settings.profile.train_micro_batch_size_per_gpu == 8 else "")
    assert not [cell for cell in tried if cell.model == "ours" and cell.micro_batch == 8]
    rows = [json.loads(line) for line in (tmp_path / ROWS).read_text().splitlines()]
    assert [row["reason"] for row in rows if row["status"] == "pruned"] == ["needs 90 GiB"]
    assert "pruned: needs 90 GiB" in (tmp_path / TABLE).read_text()


def test_the_forecast_is_compared_with_the_device():
    settings = load_workload_settings(base_profile(None, 4), None, TINY)
    assert why_it_does_not_fit(settings, 10, lambda _: 11) == "needs 11 B by the forecast; the device has 10 B"
    assert why_it_does_not_fit(settings, 11, lambda _: 11) == ""


def test_the_fastest_with_equal_loss_becomes_a_profile(tmp_path, repository):
    """The real loader takes it; what pays alone is tried together; a faster row with another loss is passed over."""
    result = explore(str(tmp_path), **SMALL, measure=figures)
    fastest = Cell(**result["fastest"])
    assert (fastest.recompute, fastest.micro_batch) == ("selective", 8)  # the combined row: 8 alone and selective alone
    settings = load_settings(tmp_path / PROFILE, repository / "configs/debug.toml")
    assert settings.profile.recompute == "selective" and settings.profile.train_micro_batch_size_per_gpu == 8
    assert result["training_speed_up"] == 1600 / 50 and result["evaluation_speed_up"] == 4800 / 1200
    table = (tmp_path / TABLE).read_text()
    assert "Fastest of ours: 32.00x in training, 4.00x in evaluation" in table and "not available: no GPU" in table
    assert "loss not equal" in table and "1.0 GiB" in table and "3x in training, 6x in evaluation" in table


def test_without_vanilla_there_is_no_ratio():
    row = {"cell": {**Cell().__dict__}, **figures(Cell(), None)}
    assert with_ratios([row], row, 0.02)[0]["training_speed_up"] is None
    assert with_ratios([row], None, 0.02)[0]["equal_loss"] is False


def test_every_axis_has_rows_on_a_gpu():
    """One difference from the centre at a time, after vanilla and what became of it."""
    cells = plan_cells(cuda=True, micro_batch=16, samples_per_step=128)
    assert cells[0] == replace(VANILLA, micro_batch=16) and len(cells) == len(set(cells))
    centre = Cell(precision="bf16", micro_batch=16)
    assert {cell.precision for cell in cells if cell.model == "ours"} == {"fp32", "tf32", "bf16", "fp16"}
    ours = [cell for cell in cells if cell.model == "ours" and cell != centre]
    assert all(len(cell.difference(centre).split(", ")) == 1 for cell in ours)
    assert sorted(cell.micro_batch for cell in ours if cell.micro_batch != 16) == [4, 8, 32, 64]
    assert {cell.attention for cell in ours} > {"cudnn", "flash", "flash_attn", "math"}


def test_a_cell_is_a_profile():
    base = {"train_micro_batch_size_per_gpu": 4, "fp16": {"enabled": True}, "zero_optimization": {"stage": 1},
            "kernels": {"rms_norm": "torch", "attention": "flash"}, "compile": True, "data_loader": {"verify": False}}
    cell = Cell(precision="bf16", micro_batch=2, attention="cudnn", optimizer="cuda", data="preload", engine="flat")
    assert profile_of(cell, base) == {
        "train_micro_batch_size_per_gpu": 2, "bf16": {"enabled": True}, "zero_optimization": {"stage": 1}, "engine": "flat",
        "kernels": {"rms_norm": "torch", "attention": "cudnn", "adamw": "cuda"},
        "data_loader": {"verify": False, "preload": True}}
    plain = profile_of(Cell(micro_batch=4), {**base, "kernels": {"adamw": "torch"}, "data_loader": {"preload": True}})
    assert plain == {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 1}}


def measured_cells(mesh):
    """Measure ours, Hugging Face's, and two that cannot be on a CPU."""
    task = Task(base_profile(None, 4), None, TINY, steps=2, warm_up=1)
    cells = [Cell(micro_batch=4), replace(VANILLA, micro_batch=4), Cell(micro_batch=4, precision="tf32"),
             Cell(micro_batch=4, data="preload")]
    return [measure_cell(cell, task) for cell in cells]


def test_rows_are_measured():
    """Vanilla and ours end with the same loss; what a CPU cannot do says so."""
    ours, vanilla, tf32, preload = run_distributed(measured_cells, 1)[0]
    assert ours["loss"] == pytest.approx(vanilla["loss"], rel=1e-5) and ours["accumulation"] == 2
    assert all(row[key] > 0 for row in (ours, vanilla) for key in ("tokens_per_s", "evaluation_tokens_per_s"))
    assert ours["joules_per_token"] is None and ours["energy"] == "not measured on a CPU"
    assert tf32["status"] == "not available" and "GPU" in tf32["reason"]
    assert preload["status"] == "not available" and "--data" in preload["reason"]


@pytest.mark.slow
def test_a_row_that_dies_is_a_row():
    """In a process of its own: one is measured, one ends with an error, one takes too long."""
    task = Task(base_profile(None, 4), None, tuple(TINY), steps=1, warm_up=0)
    assert measure_in_a_process(Cell(micro_batch=4), task)["status"] == "measured"
    broken = measure_in_a_process(Cell(micro_batch=4), replace(task, overrides=5))
    assert broken["status"] == "failed" and "ended with code 1: TypeError" in broken["reason"]
    assert measure_in_a_process(Cell(micro_batch=4), task, 0.1)["reason"] == "was still at it after 0.1 s"


def test_wrong_axes_are_named(tmp_path):
    with pytest.raises(ConfigError, match="--axes: 'colour'; it must be one of precision"):
        explore(str(tmp_path), axes=["colour"])
