"""Explore how a run may be computed: speed, memory, energy and loss of every way, a table, and the fastest as a profile."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megatron_ttl.bench.contender import settings_faults, unknown_names
from megatron_ttl.bench.grid_cells import (
    AXES,
    Cell,
    cell_of,
    centre_of,
    combined,
    plan_cells,
    profile_of,
    reference_of,
)
from megatron_ttl.bench.grid_row import Measure, Task, measure_in_a_process
from megatron_ttl.bench.grid_table import fastest_equal, grid_table, with_ratios
from megatron_ttl.bench.memory_forecast import why_it_does_not_fit
from megatron_ttl.bench.workload import (
    base_profile,
    device_name,
    load_workload_settings,
)
from megatron_ttl.config.load import Settings
from megatron_ttl.console import print_warning
from megatron_ttl.errors import ConfigError, UserError, raise_faults
from megatron_ttl.files import checksum_bytes, or_disk_error, write_json, write_text
from megatron_ttl.row_file import RowFile, read_rows

ROWS, TABLE, PROFILE = "grid.jsonl", "grid.md", "fastest.json"
Forecast = Callable[[Settings], str]


def explore(output: str, config: str | None = None, deepspeed_config: str | None = None, overrides: Sequence[str] = (), *,
            micro_batch: int | None = None, axes: Sequence[str] = (), steps: int = 20, warm_up: int = 5, data: bool = False,
            tolerance: float = 0.02, measure: Measure = measure_in_a_process,
            forecast: Forecast = why_it_does_not_fit) -> dict[str, Any]:
    """Measure every row of the grid that is not in the folder yet, and write table and profile.

    Stopped in the middle, the same command goes on: a row is kept as soon as it is measured.

    Args:
        output: folder of `grid.jsonl`, `grid.md` and `fastest.json`.
        config, deepspeed_config, overrides, micro_batch, data: as for `bench_step`.
        axes: names of `AXES`; none: all.
        steps: timed steps of a row; `warm_up`: those before.
        tolerance: nats by which the last loss may differ from the fp32 row's to be called equal.
        measure: (cell, task) -> row.
        forecast: says why settings do not fit into the memory, or nothing.

    Returns:
        Facts, files, speed-ups against vanilla fp32 in training and evaluation, and `rows`.

    Raises:
        ConfigError: settings or numbers are wrong, or the folder holds another grid.
    """
    raise_faults(ConfigError, settings_faults({"steps": steps}) + settings_faults({"warm-up": warm_up}, 0)
                 + unknown_names("axes", axes, AXES))
    base = base_profile(deepspeed_config, micro_batch)
    settings = load_workload_settings(base, config, overrides, deepspeed_config or "machine profile")
    task = Task(base, None if config is None else str(Path(config).absolute()), tuple(overrides), steps, warm_up, data)
    folder, cuda = Path(output), torch.cuda.is_available()
    size = settings.profile.train_micro_batch_size_per_gpu
    facts = {"device": device_name(torch.device("cuda" if cuda else "cpu")), "torch": torch.__version__,
             "task": checksum_bytes(repr((settings.run_text, task)).encode())}
    rows = _rows_so_far(folder / ROWS, facts)
    grid = _Grid(rows, task, facts, measure, forecast)
    cells = plan_cells(cuda, size, settings.run.samples_per_step, axes or AXES)
    with or_disk_error(folder):
        file = RowFile(folder / ROWS)
    try:
        grid.add(cells, file)
        reference = rows.get(reference_of(size).key)
        together = combined(centre_of(cuda, size), _fastest_values(rows, centre_of(cuda, size), reference, tolerance))
        grid.add([together], file)
    finally:
        file.close()
    # A row of other axes, from an earlier command, stays in the table.
    found = with_ratios(list(rows.values()), reference, tolerance)
    best = fastest_equal(found)
    result = {**{key: value for key, value in facts.items() if key != "task"}, "output": str(folder), "steps": steps,
              "measured": sum(row["status"] == "measured" for row in found),
              "training_speed_up": best["training_speed_up"] if best else None,
              "evaluation_speed_up": best["evaluation_speed_up"] if best else None,
              "fastest": best["cell"] if best else None}
    write_text(folder / TABLE, grid_table(result, found, tolerance))
    if best:
        profile = _ready_profile(cell_of(best["cell"]), base, best, facts["device"])
        load_workload_settings(profile, config, overrides)
        write_json(folder / PROFILE, profile)
    return {**result, "rows": found}


class _Grid:
    """The rows of a grid, by their keys, and how another is made."""

    def __init__(self, rows: dict[str, dict[str, Any]], task: Task, facts: Mapping[str, Any], measure: Measure,
                 forecast: Forecast) -> None:
        self._rows, self._task, self._facts, self._measure, self._forecast = rows, task, facts, measure, forecast

    def add(self, cells: Sequence[Cell], file: RowFile) -> None:
        """Measure those cells that are not there, and keep each at once."""
        for number, cell in enumerate(cells, 1):
            if cell.key in self._rows:
                continue
            print(f"row {number} of {len(cells)}: {cell.key}", file=sys.stderr, flush=True)
            fault = self._pruned(cell)
            row = {"status": "pruned", "reason": fault} if fault else self._measure(cell, self._task)
            row = {**self._facts, "cell": asdict(cell), **row}
            measured = row["status"] == "measured"
            said = f"{row['tokens_per_s']:,.0f} tokens/s" if measured else f"{row['status']}: {row['reason']}"
            print(f"    {said}", file=sys.stderr, flush=True)
            file.append(row)
            self._rows[cell.key] = row

    def _pruned(self, cell: Cell) -> str:
        """Say why a cell cannot fit; nothing of cells that nobody forecasts, or that are refused anyway."""
        if cell.model != "ours":
            return ""
        try:
            settings = load_workload_settings(profile_of(cell, self._task.base), self._task.config, self._task.overrides)
        except UserError:
            return ""
        return self._forecast(settings)


def _rows_so_far(path: Path, facts: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the rows of an earlier command by their keys.

    Raises:
        ConfigError: they are of another run, device or version.
    """
    found: dict[str, dict[str, Any]] = {}
    for row in read_rows(path) if path.exists() else ():
        if row is None:
            print_warning(f"{path}: a line that is no row is passed over")
        elif any(row.get(key) != value for key, value in facts.items()):
            raise ConfigError(f"{path}: holds rows of other settings, another device or another version of torch; the rows "
                              "of a grid must be comparable; choose another --output")
        else:
            found[cell_of(row["cell"]).key] = row
    return found


def _fastest_values(rows: Mapping[str, Mapping[str, Any]], centre: Cell, reference: Mapping[str, Any] | None,
                    tolerance: float) -> dict[str, Any]:
    """Return for every axis the value that is faster than the centre's, where the loss is the reference's."""
    found: dict[str, Any] = {}
    if centre.key not in rows or rows[centre.key]["status"] != "measured":
        return found
    best = {axis: rows[centre.key]["tokens_per_s"] for axis in AXES}
    for row in with_ratios(list(rows.values()), reference, tolerance):
        cell = cell_of(row["cell"])
        axes = [axis for axis in AXES if getattr(cell, axis) != getattr(centre, axis)]
        if cell.model == "ours" and len(axes) == 1 and row["equal_loss"] and row["tokens_per_s"] > best[axes[0]] \
                and cell.precision != "tf32":
            best[axes[0]], found[axes[0]] = row["tokens_per_s"], getattr(cell, axes[0])
    return found


def _ready_profile(cell: Cell, base: Mapping[str, Any], row: Mapping[str, Any], device: str) -> dict[str, Any]:
    note = [f"The fastest row of a grid on {device} whose loss was that of fp32:",
            f"{row['tokens_per_s']:,.0f} tokens/s. {cell.key}."]
    return {"_comment": note, **{key: value for key, value in profile_of(cell, base).items() if key != "_comment"}}
