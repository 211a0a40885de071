"""Read what a run has left: its rows of metrics and its size. A torn or incomplete row is counted, never guessed."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_ttl.checkpoint.bounded_json import read_json_object
from megatron_ttl.config.schema import ModelConfig
from megatron_ttl.errors import CheckpointError, DataError, collected, raise_faults
from megatron_ttl.model.flops import count_parameters
from megatron_ttl.report.figure import printable
from megatron_ttl.row_file import read_rows

METRICS, SETTINGS = "metrics.jsonl", "settings.json"
EVENTS = ("resume", "spike", "skip", "left out")
"""Rows of metrics that mark a point of the run."""
_OF_TRAINING = ("event", "tokens", "loss", "lr", "grad_norm", "energy_kwh", "emissions_kg_co2e", "energy_source")
_OF_EVERY_ROW = {"event", "step", "tokens", "time"}

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A run, its rows in the order of their tokens."""

    name: str
    folder: Path
    train: Sequence[Row]
    evaluations: Sequence[Row]
    events: Sequence[Row]
    parameters: int | None
    warnings: Sequence[str] = field(default_factory=list)

    def column(self, key: str) -> tuple[list[float], list[float]]:
        """Return tokens and values of the rows of training that have this number."""
        rows = [row for row in self.train if is_number(row.get(key))]
        return [row["tokens"] for row in rows], [row[key] for row in rows]

    def measured(self, kind: str) -> list[str]:
        """Names of what was evaluated, as their rows come: held-out datasets for `loss`, tasks for `accuracy`."""
        return list(dict.fromkeys(key.removeprefix(f"{kind}/") for row in self.evaluations for key in row
                                  if key.startswith(f"{kind}/")))

    def evaluation(self, kind: str, name: str) -> tuple[list[float], list[float]]:
        """Return tokens and values of one of them: nats per token, or shares of 1."""
        rows = [row for row in self.evaluations if is_number(row.get(f"{kind}/{name}"))]
        return [row["tokens"] for row in rows], [row[f"{kind}/{name}"] for row in rows]

    @property
    def energy_source(self) -> str:
        """How each component's energy came about: `cpu estimated, gpu measured`."""
        known = (row.get("energy_source") for row in reversed(self.train))
        sources = next((source for source in known if isinstance(source, dict)), {})
        return ", ".join(f"{component} {how}" for component, how in sorted(sources.items()))


def is_number(value: Any) -> bool:
    """Whether this is a finite number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def read_runs(folders: Iterable[str | Path]) -> list[Run]:
    """Read run folders; runs of one name are told apart by their paths.

    Raises:
        DataError: a folder has no rows of training or evaluation; all such folders at once.
    """
    paths = list(dict.fromkeys(Path(folder) for folder in folders))
    names = [printable(path.resolve().name) or "." for path in paths]
    names = [name if names.count(name) == 1 else printable(str(path)) for name, path in zip(names, paths, strict=True)]
    runs, faults = [], []
    for name, path in zip(names, paths, strict=True):
        with collected(faults, DataError):
            runs.append(_read_run(name, path))
    raise_faults(DataError, faults)
    return runs


def _read_run(name: str, folder: Path) -> Run:
    path = folder / METRICS
    kept: dict[tuple[str, Any], Row] = {}
    torn, incomplete, repeated = 0, 0, 0
    try:
        for row in read_rows(path):
            if row is None:
                torn += 1
                continue
            event, tokens = row.get("event"), row.get("tokens")
            if not isinstance(event, str) or not is_number(tokens) or tokens < 0:
                incomplete += 1
                continue
            before = kept.pop((event, tokens), {})
            repeated += bool(before.keys() & row.keys() - _OF_EVERY_ROW)
            wanted = _OF_TRAINING if event == "train" else row  # what else a row has would be kept a million times
            kept[event, tokens] = {**before, **{printable(key): row[key] for key in wanted if key in row}}
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); it must be the rows of a run; give the folder "
                        "that run.dir names") from None
    rows = sorted(kept.values(), key=lambda row: row["tokens"])
    train, evaluations = ([row for row in rows if row["event"] == event] for event in ("train", "evaluation"))
    if not train and not evaluations:
        raise DataError(f"{path}: has no row of training or evaluation; it must have one to show; let the run reach its "
                        "first log.every_steps")
    without_loss = sum(not is_number(row.get("loss")) for row in train)
    counts = ((torn, "lines are no whole row"), (incomplete, "rows lack event or tokens"),
              (repeated, "rows stand twice; the later ones count"), (without_loss, "rows of training have no loss"))
    warnings = [f"{path}: {count:,} {what}" for count, what in counts if count]
    parameters = _parameters(folder / SETTINGS, warnings)
    return Run(name, folder, train, evaluations, [row for row in rows if row["event"] in EVENTS], parameters, warnings)


def _parameters(path: Path, warnings: list[str]) -> int | None:
    """Count the parameters of the run's model; unknown, and said so, where its settings cannot be read."""
    try:
        return count_parameters(ModelConfig.model_validate(read_json_object(path)["run"]["model"]))
    except (CheckpointError, ValidationError, KeyError, TypeError):
        warnings.append(f"{path}: does not tell the model's size; predictions of loss are left out for this run")
        return None

