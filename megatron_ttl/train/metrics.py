"""What a run says about itself: metrics.jsonl always, a line for people, a mirror where one is asked for."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from megatron_ttl.config.schema import RunFile
from megatron_ttl.console import format_duration
from megatron_ttl.files import human_bytes
from megatron_ttl.train.tracking import WandbMirror

_LONGEST_ROW_BYTES = 1 << 20


class MetricLogger:
    """Take rows; the first process writes, prints and mirrors them. A context manager.

    Rows of a run that was killed and went on stay in the file: a later row of the same event and step counts, and a
    row `"event": "resume"` marks the place.
    """

    def __init__(self, run_dir: Path, run: RunFile, writes: bool, wandb_run_id: str | None = None) -> None:
        self.path = Path(run_dir) / "metrics.jsonl"
        self.wandb_run_id = wandb_run_id
        self.last_row: dict[str, Any] | None = None
        self._run, self._run_dir, self._writes = run, Path(run_dir), writes
        self._file: IO[str] | None = None
        self._mirror: WandbMirror | None = None
        self._say: Callable[[str, int], None] = lambda line, step: print(line, file=sys.stderr, flush=True)
        self._open_things = ExitStack()
        if writes:
            cut = repair(self.path)
            if cut:
                print(f"warning: {self.path}: the last line was torn by a kill; its {cut} bytes were cut off",
                      file=sys.stderr)
            self.last_row = _last_row(self.path)
            self._file = open(self.path, "a", encoding="utf-8")

    def __enter__(self) -> MetricLogger:
        if self._writes:
            self._mirror = WandbMirror(self._run.log, self._run_dir, self._run_dir.name,
                                       self._run.model_dump(mode="json"), self.wandb_run_id)
            self.wandb_run_id = self._mirror.run_id
            if sys.stderr.isatty():
                self._say = _bar(self._open_things, self._run.total_steps)
        return self

    def __exit__(self, *_: object) -> None:
        self._open_things.close()
        if self._mirror is not None:
            self._mirror.close()
        if self._file is not None:
            self._file.close()

    def row(self, row: dict[str, Any]) -> None:
        """Append one row, print it, mirror it. Numbers that are not finite become null, as JSON asks."""
        if self._file is None:
            return
        self._file.write(json.dumps(_finite(row), ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()
        self._say(format_row(row, self._run.total_steps), row["step"])
        if self._mirror is not None:
            self._mirror.log(row, row["step"])


def format_row(row: dict[str, Any], total_steps: int) -> str:
    """Put a row on one line, with `key value` pairs that grep and awk can read."""
    parts = [f"step {row['step']}/{total_steps}"]
    if row["event"] != "train":
        parts.append(row["event"])
        parts += [f"{key} {value:.4f}" for key, value in row.items() if key.startswith(("loss/", "perplexity/"))]
        return " | ".join(parts)
    parts += [f"loss {row['loss']:.4f}", f"lr {row['lr']:.3e}", f"grad norm {row['grad_norm']:.3f}",
              f"{row['tokens_per_s']:,.0f} tok/s", f"MFU {100 * row['mfu']:.1f} %" if row.get("mfu") else "MFU -",
              f"memory {human_bytes(row['peak_memory_bytes'])}", f"data wait {1000 * row['data_wait_s']:.1f} ms"]
    if "energy_kwh" in row:
        parts.append(f"{row['energy_kwh']:.4g} kWh {row['emissions_kg_co2e']:.4g} kgCO2e"
                     + (" (stale)" if row.get("energy_stale") else ""))
    parts.append(f"ETA {format_duration((total_steps - row['step']) * row['step_s'])}")
    return " | ".join(parts)


def repair(path: Path) -> int:
    """Cut off a last line that a kill left without its end; return how many bytes went."""
    if not path.exists():
        return 0
    with open(path, "r+b") as handle:
        size = handle.seek(0, os.SEEK_END)
        start = max(0, size - _LONGEST_ROW_BYTES)
        handle.seek(start)
        whole = start + handle.read().rfind(b"\n") + 1
        if whole < size:
            handle.truncate(whole)
        return size - whole


def _last_row(path: Path) -> dict[str, Any] | None:
    """Return the newest row with energy in it: the totals of a killed run are larger than its last checkpoint's."""
    if not path.exists():
        return None
    with open(path, "rb") as handle:
        handle.seek(max(0, handle.seek(0, os.SEEK_END) - _LONGEST_ROW_BYTES))
        lines = handle.read().splitlines()
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:
            continue  # the first line of the tail may be half of one
        if isinstance(row, dict) and "energy_kwh" in row:
            return row
    return None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and value - value != 0 else value


def _bar(open_things: ExitStack, total_steps: int) -> Callable[[str, int], None]:
    """Open a progress bar on the terminal; return a function that prints a line above it and moves it."""
    from rich import progress as rp
    from rich.console import Console

    columns = (rp.TextColumn("pretraining"), rp.BarColumn(), rp.MofNCompleteColumn(), rp.TimeRemainingColumn())
    bar = open_things.enter_context(rp.Progress(*columns, console=Console(stderr=True), transient=True))
    task = bar.add_task("", total=total_steps)

    def say(line: str, step: int) -> None:
        bar.update(task, completed=step)
        bar.console.print(line, highlight=False, markup=False, soft_wrap=True)

    return say
