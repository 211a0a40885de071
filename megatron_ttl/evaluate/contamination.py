"""Find the items of tasks that share 13 words in a row with the training data, and where.

What counts as shared is what `data.corpus.decontaminate` removes from a corpus: runs of 13 words, case and punctuation
aside, and texts of 8 to 12 words as a whole. Every text of a row is looked for: question, choices, passage.

All tasks are looked for in one pass over each source of training text. What was found is kept per task and source, by
checksums of both, so that the next checkpoint of the same run reads nothing, and an interrupted search goes on with the
next source.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_ttl import console
from megatron_ttl.data.corpus.decontaminate import DecontaminateSettings, strings_in
from megatron_ttl.data.corpus.ngram_index import NgramIndex, OwnedTexts, index_owners, own_texts
from megatron_ttl.data.processes import in_processes
from megatron_ttl.evaluate.item_values import item_values
from megatron_ttl.evaluate.records import ScoreRecord
from megatron_ttl.evaluate.task import TaskData, TaskResult
from megatron_ttl.evaluate.training_text import Source, Tally, Unit, open_sources
from megatron_ttl.files import checksum_bytes, or_disk_error, read_regular, write_json

CACHE_FOLDER = "contamination"
"""Name of the folder of what was found, beside a file of scores."""
_RULE = DecontaminateSettings()
_REFERENCES = 5  # kept by item; all are counted
_LARGEST_CACHE = 64 << 20
_WORKER_BYTES = 64 << 20  # what is read in the time that a process needs to start is not worth one


class FoundItem(BaseModel):
    """Where one item was found."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", use_attribute_docstrings=True)

    documents: int
    """Documents that share words with it."""
    first: list[str]
    """The first of them: `<file>:<line>`, or `<prefix>:<number of the document>`, from 0 as tools/inspect_data.py counts."""


class SourceReport(BaseModel):
    """What one source of training text holds of one task: a file of the cache."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", use_attribute_docstrings=True)

    format: Literal["megatron_ttl contamination"] = "megatron_ttl contamination"
    key: str
    """Checksum of the task's data, of the source, and of the rule."""
    task: str
    source: str
    documents: int
    """Documents that were read."""
    rejected: dict[str, int] = Field(default_factory=dict)
    """Lines that are no documents, by reason."""
    items: dict[str, FoundItem]
    """By number of the item."""


@dataclass(frozen=True)
class Contamination:
    """What all sources hold of one task."""

    items: Mapping[int, FoundItem]
    """Items that were found."""
    too_short: frozenset[int]
    """Items that cannot be looked for: no text of theirs has as many as 8 words."""


@dataclass
class _Seen:
    """By owner the number of documents that share words with it, and the first of them."""

    owners: dict[int, FoundItem] = field(default_factory=dict)

    def add(self, owners: Mapping[int, FoundItem]) -> None:
        """Add what was found later."""
        for owner, later in owners.items():
            before = self.owners.get(owner)
            self.owners[owner] = later if before is None else FoundItem(
                documents=before.documents + later.documents, first=[*before.first, *later.first][:_REFERENCES])


def find_contamination(tasks: Mapping[str, TaskData], training: Sequence[str | os.PathLike[str]],
                       cache: Path | None = None, workers: int | None = None, text_key: str = "text") -> dict[str, Contamination]:
    """Look for the items of tasks in training text.

    Memory: 18 bytes per n-gram of the tasks and some 50 MB of text, in every worker; nothing grows with the training text
    but counts. Time: a process reads 1.7 MB of decoded tokens or 3.8 MB of text per second.

    Args:
        tasks: the data by the task's name.
        training: prefixes of tokenised datasets (decoded with their own tokenizer), or files of documents, packed or not.
        cache: folder for what was found; None: it is not kept.
        workers: processes that read; 1: this one; None: as many as the machine has, one per 64 MiB of a source.
        text_key: key of the text in files of documents.

    Raises:
        DataError: a source cannot be read, has no manifest, or too many lines that are no documents.
    """
    owners = {name: [own_texts(strings_in(dict(row)), _RULE.words, _RULE.short_words) for row in data.splits["test"]]
              for name, data in tasks.items()}
    reports: dict[str, list[SourceReport]] = {name: [] for name in tasks}
    for source in open_sources(training, text_key):
        keys = {name: _key(data, source) for name, data in tasks.items()}
        kept = {name: _read_report(cache, key) for name, key in keys.items()}
        missing = {name: owners[name] for name, report in kept.items() if report is None}
        found = _search(source, missing, keys, workers) if missing else {}
        for name, report in found.items():
            if cache is not None:
                with or_disk_error(cache):
                    write_json(cache / f"{report.key}.json", report.model_dump(mode="json"))
        for name in tasks:
            reports[name].append(kept[name] or found[name])
    return {name: _merged(reports[name], owners[name]) for name in tasks}


def with_contamination(record: ScoreRecord, result: TaskResult, found: Contamination) -> ScoreRecord:
    """Return a record that says how many of its items were found, and what it is over the others.

    Where the items are not the rows of the data (a task that leaves some out), nobody knows, and the record stays as it is.
    """
    rows = result.data.splits["test"][: result.limit]
    if len(rows) != len(result.items):
        return record
    hit = {row["item"] for row in result.items} & set(found.items)
    values = item_values(result.items, record.metric, record.value)
    clean = [value for row, value in zip(result.items, values or (), strict=False) if row["item"] not in hit]
    return record.model_copy(update={"contaminated": len(hit),
                                     "value_clean": float(np.mean(clean)) if clean and values else None})


def _merged(reports: Iterable[SourceReport], owners: Sequence[OwnedTexts]) -> Contamination:
    seen = _Seen()
    for report in reports:
        seen.add({int(number): item for number, item in report.items.items()})
    return Contamination({number: seen.owners[number] for number in sorted(seen.owners)},
                         frozenset(number for number, owner in enumerate(owners) if not len(owner.hashes)))


def _search(source: Source, tasks: Mapping[str, Sequence[OwnedTexts]], keys: Mapping[str, str],
            workers: int | None) -> dict[str, SourceReport]:
    """Read a source once for all tasks."""
    workers = workers or max(1, min(os.cpu_count() or 1, source.size // _WORKER_BYTES))
    index = index_owners([owner for owners in tasks.values() for owner in owners], _RULE.words, _RULE.short_words)
    look = partial(_look, index, source)
    pairs = (in_processes(look, source.units(), workers, "evaluate with fewer workers") if workers > 1 else
             ((unit, look(unit)) for unit in source.units()))
    seen, tally = _Seen(), Tally()
    with closing(pairs), console.progress(f"looking for items in {source.name}", source.size, "B") as report:
        for unit, (owners, read) in pairs:
            seen.add(owners)
            tally.add(read)
            report(unit.done)
    tally.require_good(source.name)
    starts = dict(zip(tasks, accumulate([0, *map(len, tasks.values())]), strict=False))
    return {name: SourceReport(
        key=keys[name], task=name, source=source.name, documents=tally.documents, rejected=dict(tally.rejected),
        items={str(owner - starts[name]): seen.owners[owner] for owner in sorted(seen.owners)
               if starts[name] <= owner < starts[name] + len(owners)}) for name, owners in tasks.items()}


def _look(index: NgramIndex, source: Source, unit: Unit) -> tuple[dict[int, FoundItem], Tally]:
    seen, tally = _Seen(), Tally()
    for reference, text in source.read(unit, tally):
        seen.add({owner: FoundItem(documents=1, first=[reference]) for owner in index.shared(text)})
    return seen.owners, tally


def _key(data: TaskData, source: Source) -> str:
    # The checksum of a task's data does not depend on the order of its rows, the numbers of items do.
    rows = checksum_bytes(json.dumps([dict(row) for row in data.splits["test"]], sort_keys=True, default=str).encode())
    parts = [1, data.checksum, rows, source.name, source.checksum, _RULE.words, _RULE.short_words]
    return checksum_bytes(json.dumps(parts).encode()).removeprefix("xxh3:")


def _read_report(cache: Path | None, key: str) -> SourceReport | None:
    """Return what was found before; what is missing or damaged is searched again."""
    if cache is None:
        return None
    try:
        report = SourceReport.model_validate_json(read_regular(cache / f"{key}.json", _LARGEST_CACHE))
    except (OSError, ValidationError):
        return None
    return report if report.key == key and all(number.isdecimal() for number in report.items) else None
