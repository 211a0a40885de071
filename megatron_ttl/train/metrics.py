"""Rows of metrics: kept in metrics.jsonl, shown on one line each, mirrored to Weights & Biases and TensorBoard."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import IO, Any

from megatron_ttl.config.schema import RunFile
from megatron_ttl.console import format_duration, on_terminal
from megatron_ttl.files import human_bytes
from megatron_ttl.model.flops import flops_per_token
from megatron_ttl.train.device_peaks import model_flops_utilisation, peak_flops_per_s
from megatron_ttl.row_file import RowFile
from megatron_ttl.train.tracking import Mirrors


class MetricLogger:
    """Take rows and bring them to the file, the screen and the mirrors; a context manager.

    A row is a flat dict with `event` (train, evaluation, checkpoint, resume), `step` and `tokens`. To a train
    row are added `mfu` and `eta_s`; to every row the time. A process that does not write takes rows and drops
    them.
    """

    def __init__(self, path: Path, run: RunFile, deepspeed: dict[str, Any], *, writes: bool = True,
                 wandb_run_id: str | None = None, devices: int = 1, device_name: str = "cpu",
                 stream: IO[str] | None = None) -> None:
        self._total_steps = run.total_steps
        self._devices = devices
        self._peak = peak_flops_per_s(device_name)
        self._flops_per_token = flops_per_token(run.model, run.train.sequence_length, "C")
        self.wandb_run_id = wandb_run_id
        self._file: RowFile | None = None
        self._mirrors: Mirrors | None = None
        self._screen: Screen | None = None
        if writes:
            path = Path(path)
            self._file = RowFile(path)
            self._screen = Screen(self._total_steps, stream or sys.stdout)
            settings = {"run": run.model_dump(mode="json"), "deepspeed": deepspeed}
            self._mirrors = Mirrors(run.log, path.parent, settings, wandb_run_id)
            self.wandb_run_id = self._mirrors.wandb_run_id or wandb_run_id

    def __enter__(self) -> MetricLogger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def row(self, values: dict[str, Any]) -> dict[str, Any]:
        """Keep, show and mirror one row; return it with what was added."""
        row = self._complete(values)
        if self._file is not None:
            self._file.append(row)
        if self._mirrors is not None:
            self._mirrors.log(row, row["step"])
        if self._screen is not None:
            self._screen.show(row)
        return row

    def close(self) -> None:
        """End the file, the screen and the mirrors."""
        for part in (self._screen, self._file, self._mirrors):
            if part is not None:
                part.close()

    def _complete(self, values: dict[str, Any]) -> dict[str, Any]:
        row = {**values, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        if "tokens_per_s" in row:
            mfu = model_flops_utilisation(row["tokens_per_s"], self._flops_per_token, self._peak,
                                          self._devices)
            if mfu is not None:
                row["mfu"] = mfu
        if "step_s" in row:
            row["eta_s"] = max(0, self._total_steps - row["step"]) * row["step_s"]
        return row


class Screen:
    """Print one line per row; on a terminal with a bar below that says how far the run is."""

    def __init__(self, total_steps: int, stream: IO[str]) -> None:
        self._total_steps, self._stream = total_steps, stream
        self._bar: Any = None
        if on_terminal(stream):
            from rich import progress
            from rich.console import Console

            columns = (progress.TextColumn("{task.description}"), progress.BarColumn(None),
                       progress.MofNCompleteColumn(), progress.TextColumn("{task.fields[eta]}"))
            self._bar = progress.Progress(*columns, console=Console(file=stream), auto_refresh=False,
                                          transient=True)
            self._task = self._bar.add_task("training", total=total_steps, eta="")
            self._bar.start()

    def show(self, row: dict[str, Any]) -> None:
        """Print a row; a screen that has gone away does not stop the run."""
        line = format_row(row, self._total_steps)
        try:
            if self._bar is None:
                print(line, file=self._stream, flush=True)
                return
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
            eta = f"{format_duration(row['eta_s'])} left" if "eta_s" in row else ""
            self._bar.update(self._task, completed=row["step"], refresh=True, **({"eta": eta} if eta else {}))
        except (OSError, ValueError):
            self._bar = None

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def format_row(row: dict[str, Any], total_steps: int) -> str:
    """Write a row as one line of `name value` pairs, two blanks apart, so that it can be searched and cut."""
    begin = f"step {row['step']}/{total_steps}"
    event = row.get("event", "train")
    if event == "evaluation":
        return "  ".join([begin, "evaluation", *_evaluation_pairs(row)])
    if event != "train":
        return f"{begin}  {event}"
    pairs = (("loss", _number(row.get("loss"), ".4f")), ("lr", _number(row.get("lr"), ".2e")),
             ("norm", _number(row.get("grad_norm"), ".2f")), ("tok/s", _count(row.get("tokens_per_s"))),
             ("mfu", _number(row.get("mfu"), ".1%")), ("mem", _bytes(row.get("peak_memory_bytes"))),
             ("wait", _number(row.get("data_wait_s"), ".3f", "s")),
             ("kWh", _number(row.get("energy_kwh"), ".3g")),
             ("eta", format_duration(row["eta_s"]) if row.get("eta_s") is not None else "-"))
    return "  ".join([begin, *(f"{name} {value}" for name, value in pairs)])


def _evaluation_pairs(row: dict[str, Any]) -> list[str]:
    """Write `loss/<prefix>` and `perplexity/<prefix>` of every prefix, `accuracy/<task>` of every task."""
    prefixes = [key.removeprefix("loss/") for key in row if key.startswith("loss/")]
    tasks = [key.removeprefix("accuracy/") for key in row if key.startswith("accuracy/")]
    return [f"{prefix}: loss {_number(row[f'loss/{prefix}'], '.4f')} "
            f"perplexity {_number(row.get(f'perplexity/{prefix}'), '.2f')}" for prefix in prefixes] + [
            f"{task}: accuracy {_number(row[f'accuracy/{task}'], '.1%')} "
            f"+- {_number(row.get(f'accuracy_stderr/{task}'), '.1%')}" for task in tasks]


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def _bytes(value: float | None) -> str:
    return "-" if value is None else human_bytes(value)


def _count(value: float | None) -> str:
    if value is None:
        return "-"
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f}{suffix}"
    return f"{value:.0f}"
