"""Keep scores as rows that say all that a score depends on, and say which of them may be compared.

`DEPENDENCIES` is the one place that knows what makes two rows the same score measured twice (an evaluation that goes on
leaves it out) and what must be equal for two rows to stand in one column of a table.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_ttl.console import print_warning
from megatron_ttl.errors import DataError, DiskError, raise_faults
from megatron_ttl.evaluate.task import Task, TaskData
from megatron_ttl.files import read_regular
from megatron_ttl.row_file import RowFile

SCORES_FILE = "scores.jsonl"
"""Name of the file of scores in a model folder or a run folder."""
_LARGEST_BYTES = 64 << 20  # a row has one or two kilobytes
_MOST_FAULTS = 20
_MODEL = ConfigDict(strict=True, frozen=True, extra="forbid", use_attribute_docstrings=True)


class ScoredModel(BaseModel):
    """Which weights were asked."""

    model_config = _MODEL

    name: str
    """Name of the model folder or the run, without its place."""
    checksum: str
    """Of the weights in fp32 by name: the same for a checkpoint of any layout and for its fp32 export."""
    parameters: int
    run: str | None = None
    step: int | None = None
    tokens: int | None = None
    """Training tokens seen."""
    kwh: float | None = None
    """Energy spent on training so far, as the run measured it."""


class ScoreRecord(BaseModel):
    """One score: a line of `scores.jsonl`."""

    model_config = _MODEL

    time: str
    """UTC, ISO 8601, seconds."""
    model: ScoredModel
    task: str
    version: str
    definition: str
    language: str
    prompt_language: str
    shots: int
    limit: int | None = None
    """Only the first so many items; None: all that are there."""
    metric: str
    main: bool = True
    """Whether this metric is the task's score, the one that averages take."""
    value: float
    stderr: float | None = None
    n: int
    """Items that were scored."""
    prompt_checksum: str
    data_checksum: str
    request_checksum: str
    data: str
    """Names of the data files, or the data set of the hub."""
    sample: bool = False
    """Whether the data are only a sample of the real test set: then no table shows it beside real ones."""
    truncated: int = 0
    """Requests whose context did not fit and was cut on the left."""
    contaminated: int | None = None
    """Items that share 13 words in a row with the training data; None: not looked for."""
    value_clean: float | None = None
    """The same metric over the other items; None: not looked for, or no mean over items."""
    baselines: dict[str, float] = Field(default_factory=dict)
    """The same metric for answers that need no model: `random`, `majority`, `longest`."""
    device: str = "cpu"
    dtype: str = "float32"
    batch: int = 1
    seed: int = 0
    seconds: float = 0.0
    versions: dict[str, str] = Field(default_factory=dict)
    """lm_eval, torch, megatron_ttl and whatever else decides."""


@dataclass(frozen=True)
class Dependency:
    """Something that a score depends on."""

    path: str
    """Where a record has it."""
    said: str
    """How it is said; `{}` stands for the value."""
    same_score: bool
    """Whether two rows that differ in it are two scores, and not one that was measured twice."""
    same_column: bool
    """Whether rows that differ in it must not stand in one column."""


DEPENDENCIES = (
    Dependency("model.checksum", "weights {}", True, False),
    Dependency("dtype", "{}", True, False),
    Dependency("seed", "seed {}", True, False),
    Dependency("task", "task {}", True, True),
    Dependency("metric", "metric {}", True, True),
    Dependency("version", "version {}", True, True),
    Dependency("definition", "defined by {}", True, True),
    Dependency("shots", "{} shots", True, True),
    Dependency("limit", "first {} items", True, True),
    Dependency("sample", "{}", True, True),
    Dependency("prompt_checksum", "prompt {}", True, True),
    Dependency("data_checksum", "data {}", True, True),
    Dependency("versions.lm_eval", "lm_eval {}", True, True),
    # Known only after the work: demonstrations that were drawn with another seed show here.
    Dependency("request_checksum", "questions {}", False, True),
)


def value_of(record: ScoreRecord, path: str) -> Any:
    """Return what a record has under a path of `DEPENDENCIES`; None where it says nothing."""
    value: Any = record
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else getattr(value, name)
    return value


def identity(record: ScoreRecord) -> tuple[Any, ...]:
    """Return what two rows have in common if they are the same score, measured twice."""
    return tuple(value_of(record, each.path) for each in DEPENDENCIES if each.same_score)


def planned_identities(task: Task, data: TaskData, weights: str, shots: int | None, limit: int | None, seed: int,
                       dtype: str, lm_eval: str) -> list[tuple[Any, ...]]:
    """Return the identities that the scores of a task will have, one per metric, before anything is asked.

    Args:
        task, data: what is to be scored.
        weights: checksum of the model.
        shots: demonstrations; None: as many as the task says.
        limit, seed, dtype: as the record will have them.
        lm_eval: version of the harness.
    """
    known = {"model.checksum": weights, "dtype": dtype, "seed": seed, "task": task.name, "version": task.version,
             "definition": task.definition, "shots": task.shots if shots is None else shots, "limit": limit,
             "sample": data.sample, "prompt_checksum": task.prompt_checksum, "data_checksum": data.checksum,
             "versions.lm_eval": lm_eval}
    return [tuple((known | {"metric": metric})[each.path] for each in DEPENDENCIES if each.same_score)
            for metric in task.metrics]


def newest(records: Iterable[ScoreRecord]) -> list[ScoreRecord]:
    """Leave of each score the newest row, where its first one stood; of two with one time the later one."""
    found: dict[tuple[Any, ...], ScoreRecord] = {}
    for record in records:
        key = identity(record)
        if key not in found or record.time >= found[key].time:
            found[key] = record
    return list(found.values())


def differences(first: ScoreRecord, second: ScoreRecord) -> list[Dependency]:
    """Return what keeps two rows from standing in one column; the questions only where nothing else explains them."""
    found = [each for each in DEPENDENCIES if each.same_column
             and value_of(first, each.path) != value_of(second, each.path)]
    return [each for each in found if each.path != "request_checksum"] or found


def say(dependency: Dependency, record: ScoreRecord) -> str:
    """Say in some words what a row has, for headings and messages."""
    value = value_of(record, dependency.path)
    if dependency.path == "sample":
        return "sample data" if value else "whole data"
    if dependency.path == "limit" and value is None:
        return "all items"
    if isinstance(value, str) and "checksum" in dependency.path:
        value = value.removeprefix("xxh3:")[:8]
    return dependency.said.format("unknown" if value in (None, "") else value)


def append_records(path: str | os.PathLike[str], records: Sequence[ScoreRecord]) -> None:
    """Append scores to a file, which is made where it is missing; a torn last line is cut first.

    Raises:
        DataError: a number of a record is not finite; nothing is written.
        DiskError: the disk took not all of them.
    """
    path = Path(path)
    raise_faults(DataError, (f"{path}: {record.task}: {record.metric}: {name} is {value}; a score must be a finite number; "
                             "look at the model's answers" for record in records for name, value in _not_finite(record)))
    file = RowFile(path)
    try:
        for record in records:
            file.append(record.model_dump(mode="json"))
        if not file.complete:
            raise DiskError(f"{path}: the scores could not be written; the disk must have room for some kilobytes; free "
                            "some space and evaluate again")
    finally:
        file.close()


def _not_finite(record: ScoreRecord) -> Iterator[tuple[str, float]]:
    for part in (record, record.model):
        for name, value in part:
            numbers = value.items() if name == "baselines" else [(name, value)]
            yield from ((f"{name} {key}" if key != name else name, number) for key, number in numbers
                        if isinstance(number, float) and not math.isfinite(number))


def read_records(path: str | os.PathLike[str]) -> list[ScoreRecord]:
    """Read the scores of a file: of each the newest row, in the order in which they first came.

    A last line that was torn by a kill is left out with a warning; whoever appends next cuts it.

    Raises:
        DataError: the file cannot be read, or a line is no score; the first of them are named.
    """
    path = Path(path)
    try:
        payload = read_regular(path, _LARGEST_BYTES)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); it must be a file of scores; evaluate the model, or "
                        "correct the path") from None
    records, faults = [], []
    for number, line in enumerate(io.BytesIO(payload), 1):
        if not line.endswith(b"\n"):
            print_warning(f"{path}: the last {len(line)} bytes are no whole row; they are left out")
            break
        try:
            records.append(ScoreRecord.model_validate_json(line))
        except ValidationError as error:
            fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
            what = ".".join(map(str, fault["loc"])) or "the line"
            faults.append(f"{path}:{number}: {what}: {fault['msg']}; every line must be a score as tools/evaluate.py writes "
                          "it; remove the line")
        if len(faults) == _MOST_FAULTS:
            break
    raise_faults(DataError, faults)
    return newest(records)
