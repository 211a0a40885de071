"""Score models on tasks: each pair of model and task once, kept as soon as it is done, so that any end may be gone on from.

What is wrong with names, files and rows is said before a model is loaded. A task that fails later does not stop the others.
"""

from __future__ import annotations

import gzip
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from megatron_ttl import console
from megatron_ttl.errors import DataError, DiskError, UserError, collected, raise_faults
from megatron_ttl.evaluate.answer import ModelAnswerer
from megatron_ttl.evaluate.baselines import baselines
from megatron_ttl.evaluate.contamination import CACHE_FOLDER, Contamination, find_contamination, with_contamination
from megatron_ttl.evaluate.harness import harness_versions, run_task, shots_of
from megatron_ttl.evaluate.harness_model import Bar
from megatron_ttl.evaluate.model_places import Place
from megatron_ttl.evaluate.packs import DEFAULT_DATA, choose_tasks
from megatron_ttl.evaluate.records import (
    ScoredModel,
    ScoreRecord,
    append_records,
    identity,
    planned_identities,
    read_records,
)
from megatron_ttl.evaluate.task import Task, TaskResult
from megatron_ttl.files import atomic_write, checksum_bytes, or_disk_error
from megatron_ttl.row_file import RowFile


@dataclass(frozen=True)
class TaskSettings:
    """What is to be scored, and how."""

    tasks: tuple[str, ...]
    """Names of tasks and groups."""
    data: Path = DEFAULT_DATA
    packs: tuple[Path, ...] = ()
    """Folders with packs of the user's own."""
    shots: int | None = None
    """Demonstrations; None: as many as each task is defined with."""
    limit: int | None = None
    """Only the first so many items of each task."""
    batch: int = 32
    seed: int = 0
    dtype: str = "float32"
    hub: bool = False
    """Whether rows that are not here may be fetched."""
    again: bool = False
    """Whether what is recorded already is scored once more."""
    contamination: tuple[str, ...] = ()
    """Training text in which the items are looked for."""


@dataclass
class Scores:
    """What came out."""

    path: Path
    records: list[ScoreRecord] = field(default_factory=list)
    """Of all that was asked for, whether it was scored now or before."""
    known: int = 0
    """How many of them were recorded before."""
    faults: list[str] = field(default_factory=list)
    """Of tasks that failed."""


def evaluate_tasks(find: Callable[[], Sequence[Place]], settings: TaskSettings, path: Path) -> Scores:
    """Score models on tasks, and append what comes out to a file of scores.

    Args:
        find: returns the models; what it refuses is told together with all else.
        settings: which tasks, and how.
        path: file of scores; the items behind them go into the folder of the same name beside it.

    Raises:
        UserError: every fault of numbers, models, names and rows, before anything is asked.
        DiskError: scores could not be written.
        KeyboardInterrupt: after saying what is kept.
    """
    faults = list(_number_faults(settings))
    places = _or_faults(find, faults)
    tasks = _or_faults(partial(_tasks_with_rows, settings), faults)
    raise_faults(UserError, faults)
    if fixed := [task.name for task in tasks if shots_of(task, settings.shots) != (settings.shots or task.shots)]:
        print(f"{', '.join(fixed)}: --shots is not for these: what they show is part of their prompt", file=sys.stderr)
    RowFile(path).close()  # cuts a torn line, and says now what the disk would refuse later
    work = _Work(settings, path, read_records(path))
    try:
        work.look_for(tasks)
        for place in places:
            work.ask(place, tasks)
    except KeyboardInterrupt:
        print(f"what was done is kept in {path}; the same command goes on with the rest", file=sys.stderr)
        raise
    return work.scores


class _Work:
    """Asks one model after the other; what the rows alone decide is computed once."""

    def __init__(self, settings: TaskSettings, path: Path, recorded: Sequence[ScoreRecord]) -> None:
        self.scores = Scores(path)
        self._settings, self._recorded = settings, recorded
        self._versions = harness_versions()
        self._baselines: dict[str, Mapping[str, dict[str, float]]] = {}
        self._contamination: Mapping[str, Contamination] = {}

    def look_for(self, tasks: Sequence[Task]) -> None:
        """Look for the items in the training text, where there is some."""
        if self._settings.contamination:
            self._contamination = find_contamination({task.name: task.load() for task in tasks},
                                                     self._settings.contamination, self.scores.path.parent / CACHE_FOLDER)

    def ask(self, place: Place, tasks: Sequence[Task]) -> None:
        """Ask one model; a task that fails, or a model that cannot be opened, leaves faults."""
        settings, scores = self._settings, self.scores
        try:
            chosen = place.open()
        except UserError as error:
            scores.faults += error.faults
            return
        answerer = ModelAnswerer(chosen.opened, settings.batch, settings.seed)
        for number, task in enumerate(tasks, 1):
            if not settings.again and (kept := self._kept(chosen.scored, task)):
                scores.known += len(kept)
                scores.records += kept
                continue
            bar = partial(console.progress, f"{place.label}{task.name} ({number} of {len(tasks)})", unit="requests")
            try:
                records = self._score(chosen.scored, task, answerer, bar)
            except DiskError:
                raise
            except UserError as error:
                scores.faults += [f"{place.label}{fault}" for fault in error.faults]
            else:
                append_records(scores.path, records)
                scores.records += records

    def _score(self, model: ScoredModel, task: Task, answerer: ModelAnswerer, bar: Bar) -> list[ScoreRecord]:
        """Run a task, and keep the items behind its scores."""
        settings, began = self._settings, time.perf_counter()
        result = run_task(task, answerer, settings.shots, settings.limit, settings.seed, bar)
        seconds = round(time.perf_counter() - began, 3)
        if task.name not in self._baselines:
            self._baselines[task.name] = baselines(task, partial(run_task, standard_errors=False), settings.limit,
                                                   settings.seed)
        records = [
            ScoreRecord(
                time=datetime.now(UTC).isoformat(timespec="seconds"), model=model, task=task.name, version=task.version,
                definition=task.definition, language=task.language, prompt_language=task.prompt_language,
                shots=result.shots, limit=settings.limit, metric=metric, main=metric == task.metrics[0],
                value=measured.value, stderr=measured.stderr, n=len(result.items), prompt_checksum=task.prompt_checksum,
                data_checksum=result.data.checksum, request_checksum=result.request_checksum, data=result.data.origin,
                sample=result.data.sample, truncated=result.truncated,
                baselines=self._baselines[task.name].get(metric, {}), device=str(answerer.opened.device),
                dtype=settings.dtype, batch=settings.batch, seed=settings.seed, seconds=seconds, versions=self._versions)
            for metric, measured in result.metrics.items()]
        if task.name in self._contamination:
            records = [with_contamination(record, result, self._contamination[task.name]) for record in records]
        _write_items(items_path(self.scores.path, records[0]), result)
        return records

    def _kept(self, model: ScoredModel, task: Task) -> list[ScoreRecord]:
        """Return the scores of a model on a task that are recorded; none where one is missing."""
        settings, data = self._settings, task.load()

        def planned(metric: str) -> list[tuple[Any, ...]]:
            return planned_identities(replace(task, metrics=(metric,)), data, model.checksum,
                                      shots_of(task, settings.shots), settings.limit, settings.seed, settings.dtype,
                                      self._versions.get("lm_eval", ""))

        found = [record for record in self._recorded
                 if record.task == task.name and identity(record) in planned(record.metric)]
        whole = len(data.splits["test"][: settings.limit])
        looked_for = not settings.contamination or all(record.contaminated is not None or record.n != whole
                                                       for record in found)
        return found if looked_for and {record.metric for record in found} >= set(task.metrics) else []


def items_path(scores: Path, record: ScoreRecord) -> Path:
    """Return where the items behind a score are: the same file for all metrics of a task."""
    folder = scores.with_suffix("") if scores.suffix else scores.with_name(f"{scores.name}-items")
    words = identity(record.model_copy(update={"metric": ""}))
    step = "" if record.model.step is None else f"-step{record.model.step}"
    digest = checksum_bytes(json.dumps(words).encode()).removeprefix("xxh3:")[:12]
    return folder / f"{record.task}-{record.shots}shot{step}-{digest}.jsonl.gz"


def _write_items(path: Path, result: TaskResult) -> None:
    with or_disk_error(path), atomic_write(path) as handle, gzip.GzipFile("", "wb", fileobj=handle, mtime=0) as packed:
        for item in result.items:
            packed.write(json.dumps(item, ensure_ascii=False).encode() + b"\n")


def _or_faults(find: Callable[[], Sequence[Any]], faults: list[str]) -> Sequence[Any]:
    """Return what is found; nothing, and the faults beside the others, where it is refused."""
    with collected(faults):
        return find()
    return []


def _tasks_with_rows(settings: TaskSettings) -> list[Task]:
    """Return the tasks, their rows read once."""
    tasks, faults = [], []
    for task in choose_tasks(settings.tasks, settings.data, settings.packs, settings.hub):
        data = _or_faults(lambda task=task: [task.load()], faults)
        tasks += [replace(task, load=lambda rows=rows: rows) for rows in data]
    raise_faults(DataError, faults)
    return tasks


def _number_faults(settings: TaskSettings) -> Iterator[str]:
    for name, value, least in (("--shots", settings.shots, 0), ("--limit", settings.limit, 1), ("--batch", settings.batch, 1),
                               ("--seed", settings.seed, 0)):
        if value is not None and value < least:
            yield f"{name}: {value}; it must be at least {least}; leave it out for the usual value"
