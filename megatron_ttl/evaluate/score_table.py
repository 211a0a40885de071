"""Put scores of several models side by side: tasks across, models down; only like beside like.

A column holds rows that agree in all that `records.DEPENDENCIES` demands of a column. What does not is refused with the
difference named, or, when asked for, gets a column of its own with the difference in its heading.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from megatron_ttl.errors import DataError, closest, collected, on_one_line, raise_faults
from megatron_ttl.evaluate.records import (
    DEPENDENCIES,
    SCORES_FILE,
    Dependency,
    ScoreRecord,
    differences,
    newest,
    read_records,
    say,
)

SURE = 1.96
"""Standard errors of a difference that count as more than chance: 95 of 100 times for normal errors."""
BASELINE_ORDER = ("random", "majority", "longest", "shortest")
LOWER_IS_BETTER = {"perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "nats_per_token", "mse", "ter"}
_NO_SHARES = LOWER_IS_BETTER | {"bleu", "chrf"}  # shown as they are, and never averaged with shares
_MOST_FAULTS = 20


@dataclass(frozen=True)
class Column:
    """One task and metric, asked in one way."""

    heading: str
    record: ScoreRecord
    """One of its rows, for all that they have in common."""
    factor: float
    """What values are multiplied by: 100 for shares, 1 for what is none."""
    lower_is_better: bool


@dataclass(frozen=True)
class Cell:
    """A score as it is shown."""

    value: float
    stderr: float | None = None
    record: ScoreRecord | None = None
    best: bool = False
    """Whether it is better than that of every other model by more than `SURE` standard errors of the difference."""
    above_baselines: bool = True
    """Whether it is better than every baseline by more than `SURE` standard errors."""


@dataclass(frozen=True)
class Row:
    """A model, or a baseline."""

    label: str
    cells: tuple[Cell | None, ...]
    average: Cell | None = None
    """Over the columns of the tasks' scores; None where one of them is missing."""
    baseline: bool = False


@dataclass(frozen=True)
class ScoreTable:
    """What is printed."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    averaged: tuple[int, ...]
    """Columns that averages are over; none: there is no average."""
    notes: tuple[str, ...]


def read_scores(places: Iterable[str | os.PathLike[str]]) -> list[ScoreRecord]:
    """Read the scores of model folders, run folders or files of scores; of the same score the newest row is taken.

    Raises:
        DataError: a place has no scores or damaged ones; all faults at once.
    """
    records, faults = [], []
    for place in map(Path, places):
        with collected(faults, DataError):
            records += read_records(place / SCORES_FILE if place.is_dir() else place)
    raise_faults(DataError, faults)
    return newest(records)


def choose_scores(records: Sequence[ScoreRecord], tasks: Sequence[str] = (), metrics: Sequence[str] = ()) -> list[ScoreRecord]:
    """Return the rows of some tasks (none named: all) and metrics (none named: each task's score; `all`: all).

    Raises:
        DataError: nobody has a score of a task or a metric that was named.
    """
    faults = []
    for name, wanted, known in (("--tasks", tasks, {record.task for record in records}),
                                ("--metrics", metrics, {"all", *(record.metric for record in records)})):
        faults += [f"{name}: {word}: no model has such a score; it must be one of {', '.join(sorted(known))}; "
                   f"{closest(word, known) or 'correct it'}" for word in wanted if word not in known]
    raise_faults(DataError, faults)
    chosen = [record for record in records if (not tasks or record.task in tasks)
              and ("all" in metrics or (record.metric in metrics if metrics else record.main))]
    if not chosen:
        raise DataError("scores: there is none; at least one is needed for a table; evaluate a model with tools/evaluate.py")
    return chosen


def build_table(records: Sequence[ScoreRecord], show_differences: bool = False) -> ScoreTable:
    """Arrange scores: columns in the order in which their tasks first came, models likewise, baselines last.

    Args:
        records: the newest row of each score.
        show_differences: give unlike rows columns of their own instead of refusing them.

    Raises:
        DataError: rows of one task and metric were asked differently, samples stand beside whole data, or one data set
            was asked under two definitions; every difference is named.
    """
    labels = _labels(records)
    groups: dict[tuple[str, str], list[list[ScoreRecord]]] = {}
    for record in records:
        variants = groups.setdefault((record.task, record.metric), [])
        for variant in variants:
            if not differences(variant[0], record):
                variant.append(record)
                break
        else:
            variants.append([record])
    if not show_differences:
        raise_faults(DataError, [*_unlike(groups, labels), *_mixed(groups)][:_MOST_FAULTS])
    columns, members = [], []
    for variants in groups.values():
        for variant in variants:
            columns.append(_column(variant[0], variants))
            members.append({_row_key(record): record for record in variant})
    averaged = _averaged(columns)
    rows = _judged([*_model_rows(labels, columns, members, averaged), *_baseline_rows(columns, members, averaged)], columns)
    return ScoreTable(tuple(columns), tuple(rows), averaged,
                      tuple(map(on_one_line, _notes(columns, members, labels, averaged))))


def _row_key(record: ScoreRecord) -> tuple[object, ...]:
    return record.model.name, record.model.checksum, record.model.step, record.dtype, record.seed


def _labels(records: Iterable[ScoreRecord]) -> dict[tuple[object, ...], str]:
    """Name each row as briefly as tells it from the others."""
    ways: tuple[Callable[[ScoreRecord], str], ...] = (
        lambda record: "" if record.model.step is None else f" @ {record.model.step:,}",
        lambda record: f" ({record.dtype})", lambda record: f" (seed {record.seed})",
        lambda record: f" ({record.model.checksum.removeprefix('xxh3:')[:8]})")
    first: dict[tuple[object, ...], ScoreRecord] = {}
    for record in records:
        first.setdefault(_row_key(record), record)
    labels = {key: record.model.name + ways[0](record) for key, record in first.items()}
    for way in ways[1:]:
        for label, count in Counter(labels.values()).items():
            alike = [key for key in first if labels[key] == label]
            if count > 1 and len({way(first[key]) for key in alike}) > 1:
                labels |= {key: label + way(first[key]) for key in alike}
    return {key: on_one_line(label) for key, label in labels.items()}


def _unlike(groups: dict[tuple[str, str], list[list[ScoreRecord]]], labels: dict[tuple[object, ...], str]) -> Iterator[str]:
    for (task, metric), variants in groups.items():
        for other in variants[1:]:
            a, b = variants[0][0], other[0]
            what = "; ".join(f"{say(each, a)} in {labels[_row_key(a)]}, {say(each, b)} in {labels[_row_key(b)]}"
                             for each in differences(a, b))
            yield (f"{task}: {metric}: {what}; a column must hold scores of one kind; evaluate again, leave one out, or "
                   "give each kind a column with --show-differences")


def _mixed(groups: dict[tuple[str, str], list[list[ScoreRecord]]]) -> Iterator[str]:
    every = [variant[0] for variants in groups.values() for variant in variants]
    samples = sorted({record.task for record in every if record.sample})
    whole = sorted({record.task for record in every if not record.sample})
    if samples and whole:
        yield (f"{', '.join(samples)}: sample data; {', '.join(whole)}: whole data; a table must hold one or the other; "
               "choose with --tasks, or mark them with --show-differences")
    for a, b in _twice_defined(every):
        yield (f"{a.task}: defined by {a.definition}, {b.task} by {b.definition}, on the same data; a table must hold one "
               "definition of a task; choose with --tasks, or mark them with --show-differences")


def _twice_defined(records: Iterable[ScoreRecord]) -> list[tuple[ScoreRecord, ScoreRecord]]:
    """Return pairs of tasks that ask the same data in two definitions."""
    first = {(record.task, record.definition): record for record in records}
    return [(a, b) for a, b in combinations(first.values(), 2)
            if a.task != b.task and a.data_checksum == b.data_checksum and a.definition != b.definition]


def _column(record: ScoreRecord, variants: Sequence[Sequence[ScoreRecord]]) -> Column:
    marks = ["sample"] if record.sample else []
    marks += [f"first {record.limit}"] if record.limit is not None else []
    apart: dict[Dependency, None] = {}
    for other in variants:
        apart |= dict.fromkeys(differences(record, other[0]))
    marks += [say(each, record) for each in DEPENDENCIES if each in apart
              and not (each.path == "sample" and record.sample or each.path == "limit" and record.limit is not None)]
    base = record.metric.split(",")[0]
    return Column(on_one_line(f"{record.task} {record.metric}" + (f" ({', '.join(marks)})" if marks else "")), record,
                  1.0 if base in _NO_SHARES else 100.0, base in LOWER_IS_BETTER)


def _averaged(columns: Sequence[Column]) -> tuple[int, ...]:
    """Return the columns of the tasks' scores, or the only ones of their tasks; none unless all are shares of one kind."""
    tasks = Counter(column.record.task for column in columns)
    scores = [number for number, column in enumerate(columns) if column.record.main or tasks[column.record.task] == 1]
    records = [columns[number].record for number in scores]
    once = len({record.task for record in records}) == len(records) and not _twice_defined(records)
    alike = len({record.sample for record in records}) == 1 and all(columns[number].factor == 100 for number in scores)
    return tuple(scores) if len(scores) > 1 and once and alike else ()


def _average(cells: Sequence[Cell | None], averaged: Sequence[int]) -> Cell | None:
    taken = [cells[number] for number in averaged]
    whole = [cell for cell in taken if cell is not None]
    if not averaged or len(whole) < len(taken):
        return None
    errors = [cell.stderr for cell in whole if cell.stderr is not None]
    stderr = math.hypot(*errors) / len(whole) if len(errors) == len(whole) else None
    return Cell(sum(cell.value for cell in whole) / len(whole), stderr)


def _model_rows(labels: dict[tuple[object, ...], str], columns: Sequence[Column],
                members: Sequence[dict[tuple[object, ...], ScoreRecord]], averaged: Sequence[int]) -> Iterator[Row]:
    for key, label in labels.items():
        found = [member.get(key) for member in members]
        cells = tuple(None if record is None else
                      Cell(record.value * column.factor, None if record.stderr is None else record.stderr * column.factor, record)
                      for record, column in zip(found, columns, strict=True))
        yield Row(label, cells, _average(cells, averaged))


def _baseline_rows(columns: Sequence[Column], members: Sequence[dict[tuple[object, ...], ScoreRecord]],
                   averaged: Sequence[int]) -> Iterator[Row]:
    known: list[dict[str, float]] = [{} for _ in columns]
    for place, member in enumerate(members):
        for record in sorted(member.values(), key=lambda record: record.time):
            known[place] |= record.baselines
    names = {name for found in known for name in found}
    for name in [*(name for name in BASELINE_ORDER if name in names), *sorted(names - set(BASELINE_ORDER))]:
        cells = tuple(Cell(found[name] * column.factor) if name in found else None
                      for found, column in zip(known, columns, strict=True))
        yield Row(on_one_line(name), cells, _average(cells, averaged), baseline=True)


def _judged(rows: Sequence[Row], columns: Sequence[Column]) -> list[Row]:
    """Mark the best score of each column, and those that are not above the baselines."""
    signs = [-1.0 if column.lower_is_better else 1.0 for column in columns]
    judged = []
    for row in rows:
        others = [other for other in rows if other is not row]
        cells = tuple(None if cell is None else _judged_cell(cell, row, [(other, other.cells[place]) for other in others], sign)
                      for place, (cell, sign) in enumerate(zip(row.cells, signs, strict=True)))
        average = None if row.average is None else _judged_cell(row.average, row,
                                                                [(other, other.average) for other in others], 1.0)
        judged.append(Row(row.label, cells, average, row.baseline))
    return judged


def _judged_cell(cell: Cell, row: Row, others: Sequence[tuple[Row, Cell | None]], sign: float) -> Cell:
    if row.baseline:
        return cell
    models = [other for owner, other in others if other is not None and not owner.baseline]
    baselines = [other for owner, other in others if other is not None and owner.baseline]
    return Cell(cell.value, cell.stderr, cell.record, bool(models) and all(surely_above(cell, other, sign) for other in models),
                cell.stderr is None or all(surely_above(cell, Cell(other.value, 0.0), sign) for other in baselines))


def surely_above(a: Cell, b: Cell, sign: float = 1.0) -> bool:
    """Return whether `a` is above `b` by more than `SURE` standard errors of the difference of two unpaired scores."""
    if a.stderr is None or b.stderr is None:
        return False
    return sign * (a.value - b.value) > SURE * math.hypot(a.stderr, b.stderr)


def _notes(columns: Sequence[Column], members: Sequence[dict[tuple[object, ...], ScoreRecord]],
           labels: dict[tuple[object, ...], str], averaged: Sequence[int]) -> Iterator[str]:
    shares = any(column.factor == 100 for column in columns)
    yield (("values x 100 " if shares else "values ") + "± standard error; best: better than every other model by more than "
           f"{SURE} standard errors of the difference, unpaired; †: not better than every baseline by as much")
    if averaged:
        yield f"average of {', '.join(columns[number].record.task for number in averaged)}"
    told: set[tuple[str, str, str]] = set()
    for column, member in zip(columns, members, strict=True):
        record = column.record
        yield (f"{column.heading}: {record.n:,} items, {_shots(record.shots)}, version {record.version}, "
               f"defined by {record.definition}, data {record.data}{' (a sample)' if record.sample else ''}, "
               f"lm_eval {record.versions.get('lm_eval', 'unknown')}")
        for key, found in member.items():
            what = "; ".join(_conditions(found, column.factor))
            if what and (record.request_checksum, labels[key], what) not in told:  # other metrics of the same answers
                told.add((record.request_checksum, labels[key], what))
                yield f"{column.heading}: {labels[key]}: {what}"


def _shots(count: int) -> str:
    return "1 shot" if count == 1 else f"{count} shots"


def _conditions(record: ScoreRecord, factor: float) -> Iterator[str]:
    if record.truncated:
        yield f"{record.truncated:,} requests cut on the left"
    if record.contaminated is not None:
        clean = "" if record.value_clean is None or not record.contaminated else f", {record.value_clean * factor:.2f} without them"
        yield f"{record.contaminated:,} items in its training data{clean}"
