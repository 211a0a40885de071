"""Find equal keys among more of them than memory holds.

Each shard writes its entries sorted by key. Keys are hashes, so evenly spread: the entries of all shards are merged
one range of keys at a time, and a range has as many entries as memory allows.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

ENTRIES_AT_ONCE = 1 << 22
"""Entries of a range: about 400 MiB while they are sorted."""


class Run(NamedTuple):
    """The entries of one shard, sorted by key."""

    entries: np.ndarray
    """Fields "key" (uint64), "row" (uint32: a document of the shard), and others."""
    base: int
    """Documents in the shards before."""


class Repeats(NamedTuple):
    """Entries that share their key with another one, key by key, and by number of the document within a key."""

    entries: np.ndarray
    documents: np.ndarray
    """Number of each entry's document.  # int64 [entries]"""
    starts: np.ndarray
    """Where each key begins.  # int64 [keys]"""

    @property
    def firsts(self) -> np.ndarray:
        """The first document of each entry's key.  # int64 [entries]"""
        return np.repeat(self.documents[self.starts], self.sizes)

    @property
    def sizes(self) -> np.ndarray:
        """Entries of each key.  # int64 [keys]"""
        return np.diff(self.starts, append=len(self.documents))


def sort_entries(entries: np.ndarray) -> np.ndarray:
    """Return the entries of a shard sorted by key, those of one key in their order."""
    return entries[np.argsort(entries["key"], kind="stable")]


def map_file(path: Path, dtype: np.dtype | str) -> np.ndarray:
    """Map a file of plain numbers or records for reading; an empty one is an empty array."""
    if not path.stat().st_size:
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r")


def repeats(runs: Sequence[Run], numbers: np.ndarray | None, alive: np.ndarray | None) -> Iterator[Repeats]:
    """Yield all entries whose key occurs twice or more, a range of keys at a time.

    Where the entries have a field "check", it must be equal too.

    Args:
        runs: the entries of every shard, in order.
        numbers: the number of each document, where it is not its place in the order of the shards.  # [documents]
        alive: the documents that are looked at, by number; all by default.  # bool [documents]
    """
    total = sum(len(run.entries) for run in runs)
    ranges = -(-total // ENTRIES_AT_ONCE) or 1
    bounds = [part * 2**64 // ranges for part in range(ranges + 1)]
    places = [[_first_at(run.entries, bound) for bound in bounds] for run in runs]
    for part in range(ranges):
        pieces, documents = [], []
        for run, place in zip(runs, places, strict=True):
            piece = np.array(run.entries[place[part]:place[part + 1]])
            number = piece["row"].astype(np.int64) + run.base
            if numbers is not None:
                number = numbers[number]
            if alive is not None:
                piece, number = piece[alive[number]], number[alive[number]]
            pieces.append(piece)
            documents.append(number)
        if pieces:
            yield _repeats_of(np.concatenate(pieces), np.concatenate(documents))


def _first_at(entries: np.ndarray, bound: int) -> int:
    return bisect_left(entries, bound, key=lambda entry: int(entry["key"]))


def _repeats_of(entries: np.ndarray, documents: np.ndarray) -> Repeats:
    order = np.argsort(entries["key"], kind="stable")
    entries, documents = entries[order], documents[order]
    differs = entries["key"][1:] != entries["key"][:-1]
    if "check" in (entries.dtype.names or ()):
        differs |= entries["check"][1:] != entries["check"][:-1]
    begins = np.concatenate(([True], differs))[: len(entries)]
    several = ~(begins & np.concatenate((begins[1:], [True]))[: len(entries)])
    entries, documents, begins = entries[several], documents[several], begins[several]
    group = np.cumsum(begins)
    if (np.diff(documents)[~begins[1:]] < 0).any():  # documents are numbered otherwise than they lie in the shards
        order = np.lexsort((documents, group))
        entries, documents = entries[order], documents[order]
    return Repeats(entries, documents, np.flatnonzero(begins))
