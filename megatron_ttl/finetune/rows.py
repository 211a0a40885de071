"""Read labelled rows, each checked; keep the test split shut until training is over."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from megatron_ttl.data.documents import BadLine, parse_record, read_chunks, text_of
from megatron_ttl.errors import DataError, raise_faults
from megatron_ttl.files import checksum_bytes
from megatron_ttl.finetune.tasks import ClassificationTask

_MOST_FAULTS = 100  # a screen shows 40


@dataclass(frozen=True)
class Row:
    """One text or pair of texts, and its class."""

    texts: tuple[str, ...]
    label: int
    line: bytes
    """As it stands in the file, without the end of the line."""
    group: str
    """What is the same for rows that are not independent."""

    @property
    def key(self) -> str:
        """What makes two rows the same: their texts, without regard to case and white space."""
        return row_key(self.texts)


def row_key(texts: Sequence[str]) -> str:
    """Return texts without what does not tell rows apart: case, and the kind and amount of white space."""
    return "\x1f".join(" ".join(text.casefold().split()) for text in texts)


def row_place(key: str, seed: int) -> int:
    """Return the place of a text in the order by which parts are cut: a keyed hash of the text alone."""
    return xxhash.xxh3_64_intdigest(key.encode(), seed)


def read_rows(path: str | os.PathLike[str], task: ClassificationTask) -> list[Row]:
    """Read the rows of a file.

    Raises:
        DataError: the file cannot be read, has no rows, or rows that are none of the task's; the first hundred of them.
    """
    rows: list[Row] = []
    faults: list[str] = []
    for where, record, line in _records(path, task, faults):
        texts, row_faults = _texts(record, task)
        label = task.label_of(record.get(task.label))
        if label is None:
            row_faults.append(_label_fault(record, task))
        if label is not None and not row_faults:
            group = record.get(task.group) if task.group else None
            rows.append(Row(texts, label, line, row_key(texts) if group is None else str(group)))
        faults += [f"{where}: {fault}; a row of {task.name} has a text under {' and '.join(map(repr, task.texts))} and "
                   f"a label under {task.label!r}; repair or remove it" for fault in row_faults]
        if len(faults) >= _MOST_FAULTS:
            break
    if not rows and not faults:
        faults.append(f"{path}: has no rows; it must have some; copy it again")
    raise_faults(DataError, faults)
    return rows


def read_texts(path: str | os.PathLike[str], task: ClassificationTask) -> list[tuple[str, ...]]:
    """Read texts without labels, to predict them.

    Raises:
        DataError: as for `read_rows`.
    """
    found: list[tuple[str, ...]] = []
    faults: list[str] = []
    for where, record, _ in _records(path, task, faults):
        texts, row_faults = _texts(record, task)
        found.append(texts)
        faults += [f"{where}: {fault}; a row has a text under {' and '.join(map(repr, task.texts))}; repair or remove it"
                   for fault in row_faults]
    raise_faults(DataError, faults[:_MOST_FAULTS])
    return found


def _records(path: str | os.PathLike[str], task: ClassificationTask,
             faults: list[str]) -> Iterator[tuple[str, dict[str, Any], bytes]]:
    """Yield where a line stands, its object and its bytes; a line that holds no object is a fault."""
    for chunk in read_chunks(path):
        for number, line in enumerate(chunk.lines, chunk.first_line):
            record = parse_record(line, task.texts)
            if isinstance(record, dict):
                yield f"{path}:{number}", record, line.rstrip(b"\r\n")
            elif record is not None and len(faults) < _MOST_FAULTS:
                faults.append(f"{path}:{number}: {record.reason}; a line holds one JSON object; repair or remove it")


def _texts(record: dict[str, Any], task: ClassificationTask) -> tuple[tuple[str, ...], list[str]]:
    found = [text_of(record, key) for key in task.texts]
    return (tuple(text for text in found if isinstance(text, str)),
            [text.reason if "key" in text.reason else f"{key!r}: {text.reason}"
             for key, text in zip(task.texts, found, strict=True) if isinstance(text, BadLine)])


def _label_fault(record: dict[str, Any], task: ClassificationTask) -> str:
    if task.label not in record:
        return f"no key {task.label!r}"
    spelled = ", ".join("/".join(spellings) for spellings in task.labels)
    return f"the label is {json.dumps(record[task.label])[:60]}, which is none of {spelled}"


def without_repeats(rows: Sequence[Row]) -> tuple[list[Row], dict[str, int]]:
    """Keep each text once; one that has several labels teaches nothing and is left out wholly.

    Returns:
        The rows in their order, and how many were left out: `repeated`, `contradictory`.
    """
    labels: dict[str, set[int]] = {}
    for row in rows:
        labels.setdefault(row.key, set()).add(row.label)
    kept: dict[str, Row] = {}
    for row in rows:
        if len(labels[row.key]) == 1:
            kept.setdefault(row.key, row)
    contradictory = sum(len(labels[row.key]) > 1 for row in rows)
    counts = {"repeated": len(rows) - contradictory - len(kept), "contradictory": contradictory}
    return list(kept.values()), counts


def cut(rows: Sequence[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Cut off a share of the rows, the same share of every class; rows of a group stay together.

    Which rows is decided by a keyed hash of the texts (or groups) alone: the order of the rows and the model have no
    part in it.

    Returns:
        What is left, and the share; both in the order of `rows`.
    """
    members: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        members.setdefault(row.group, []).append(number)
    strata: dict[tuple[int, ...], list[str]] = {}
    for group, numbers in members.items():
        strata.setdefault(tuple(sorted({rows[number].label for number in numbers})), []).append(group)
    chosen: set[int] = set()
    for _, groups in sorted(strata.items()):
        groups.sort(key=lambda group: (row_place(group, seed), group))
        for group in groups[: round(fraction * len(groups))]:
            chosen.update(members[group])
    return ([row for number, row in enumerate(rows) if number not in chosen],
            [row for number, row in enumerate(rows) if number in chosen])


def rows_checksum(rows: Sequence[Row]) -> str:
    """Return a checksum of texts and classes in their order; two results with the same one are about the same rows."""
    return checksum_bytes(json.dumps([[*row.texts, row.label] for row in rows], ensure_ascii=False).encode())


def class_faults(rows: Sequence[Row], task: ClassificationTask, what: str) -> list[str]:
    """Say which classes have no row."""
    counts = Counter(row.label for row in rows)
    return [f"{what}: has no row of {name!r}; every class must have one; give more rows"
            for number, name in enumerate(task.label_names) if not counts[number]]


class TestSplit:
    """The test rows, unread: nothing but a path, until every training that is to be judged by them is over.

    There is no other way to them, so no epoch, no setting and no seed can be chosen by what they say.
    """

    __test__ = False  # pytest takes the name for a class of tests

    def __init__(self, path: str | os.PathLike[str], task: ClassificationTask, awaited: Sequence[str]) -> None:
        """Remember where the rows are, and which trainings must be over first."""
        self.path = Path(path)
        self._task = task
        self._awaited = list(awaited)
        self.opened_for: str | None = None

    def finished(self, training: str) -> None:
        """Note that a training is over: its weights are on the disk and will not change."""
        self._awaited.remove(training)

    def open_once(self, reason: str) -> list[Row]:
        """Read the rows, for the first and the last time.

        Raises:
            RuntimeError: a training is not over, or the split was opened before; a fault of the program.
            DataError: as for `read_rows`.
        """
        if self._awaited:
            raise RuntimeError(f"the test split stays shut: {', '.join(self._awaited)} not finished")
        if self.opened_for is not None:
            raise RuntimeError(f"the test split was opened before, for {self.opened_for}")
        self.opened_for = reason
        return read_rows(self.path, self._task)
