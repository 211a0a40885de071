"""Join documents into clusters: a number per document, and of every cluster the smallest number stays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from megatron_ttl.data.corpus.dedup_settings import DedupSettings
from megatron_ttl.data.corpus.scan import Scan
from megatron_ttl.data.corpus.sorted_keys import Repeats, Run, repeats
from megatron_ttl.files import atomic_write

_PAIRS_AT_ONCE, _DOCUMENTS_AT_ONCE = 1 << 14, 1 << 17
_MOST_LEADERS = 64  # of one key: a crowd of documents that share a band and are unlike is not compared all with all


def join(parents: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
    """Join the clusters of the documents left[i] and right[i], for every i; the order of the pairs does not matter.

    Args:
        parents: of each document one of its cluster with a smaller number, or itself; changed in place.  # int64 [documents]
        left: documents.  # int64 [pairs]
        right: documents.  # int64 [pairs]
    """
    while len(left):
        left, right = roots(parents, left), roots(parents, right)
        apart = left != right
        left, right = left[apart], right[apart]
        np.minimum.at(parents, np.maximum(left, right), np.minimum(left, right))


def roots(parents: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Return the smallest number of the cluster of each document, and shorten the ways to them.  # int64 [documents]"""
    while True:
        above = parents[documents]
        top = parents[above]
        if np.array_equal(above, top):
            return above
        parents[documents] = top


def settle(parents: np.ndarray) -> np.ndarray:
    """Give every document the smallest number of its cluster; changes and returns `parents`."""
    for start in range(0, len(parents), _DOCUMENTS_AT_ONCE):
        some = np.arange(start, min(start + _DOCUMENTS_AT_ONCE, len(parents)))
        parents[some] = roots(parents, some)
    return parents


class Numbers:
    """The order of the documents: by preferred source, then shard, then line. The first of a cluster stays."""

    def __init__(self, scans: Sequence[Scan], prefer: Sequence[str]) -> None:
        self._scans = scans
        self.bases = np.cumsum([0, *(len(scan.documents) for scan in scans)])
        """Documents in the shards before each shard, and in all.  # int64 [shards + 1]"""
        self.count = int(self.bases[-1])
        self.of_place: np.ndarray | None = None
        """Number of the document at each place in the order of the shards, where they differ.  # int64 [documents]"""
        self.place_of: np.ndarray | None = None
        """The inverse."""
        if prefer:
            priorities = np.empty(self.count, np.uint16)
            for scan, base in zip(scans, self.bases[:-1], strict=True):
                known = [prefer.index(name) if name in prefer else len(prefer) for name in scan.sources]
                priorities[base:base + len(scan.documents)] = np.array(known, np.uint16)[scan.documents["source"]]
            self.place_of = np.argsort(priorities, kind="stable")
            self.of_place = np.empty_like(self.place_of)
            self.of_place[self.place_of] = np.arange(self.count)

    def places(self, numbers: np.ndarray) -> np.ndarray:
        """Return where documents lie in the order of the shards.  # int64 [documents]"""
        return numbers if self.place_of is None else self.place_of[numbers]

    def of_shard(self, shard: int) -> np.ndarray:
        """Return the numbers of the documents of a shard, in its order.  # int64 [documents]"""
        places = np.arange(self.bases[shard], self.bases[shard + 1])
        return places if self.of_place is None else self.of_place[places]

    def by_shard(self, numbers: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield shard, positions in `numbers`, and rows in the shard, for every shard that some document lies in."""
        places = self.places(numbers)
        shards = np.searchsorted(self.bases, places, side="right") - 1
        for shard in np.unique(shards).tolist():
            where = np.flatnonzero(shards == shard)
            yield shard, where, places[where] - self.bases[shard]

    def runs(self, entries: Sequence[np.ndarray]) -> list[Run]:
        """Return the entries of every shard with the number of documents before it."""
        return [Run(each, base) for each, base in zip(entries, self.bases[:-1].tolist(), strict=True)]


def exact_clusters(scans: Sequence[Scan], numbers: Numbers) -> np.ndarray:
    """Return of each document the first one with the same text.  # int64 [documents]"""
    first = np.arange(numbers.count)
    for group in repeats(numbers.runs([scan.exact for scan in scans]), numbers.of_place, None):
        first[group.documents] = group.firsts
    return first


def join_band(scans: Sequence[Scan], numbers: Numbers, band: int, settings: DedupSettings, parents: np.ndarray,
              alive: np.ndarray) -> None:
    """Join the documents that share the key of one band.

    With a `min_similarity` the first document of a key leads: those that are like it are joined with it; of the rest the
    first leads next, until none is left, or 64 have led.

    Args:
        parents: as `join` has them; changed in place.
        alive: documents that are looked at.  # bool [documents]
    """
    for group in repeats(numbers.runs([scan.bands(settings.bands)[band] for scan in scans]), numbers.of_place, alive):
        if settings.min_similarity == 0:
            join(parents, group.documents, group.firsts)
            continue
        for _ in range(_MOST_LEADERS):
            if not len(group.documents):
                break
            leaders = group.firsts
            share = _share_of_equal(scans, numbers, group.documents, leaders, settings.num_hashes)
            like = share >= settings.min_similarity
            join(parents, group.documents[like], leaders[like])
            group = _rest(group, ~like & (group.documents != leaders))


def _rest(group: Repeats, stays: np.ndarray) -> Repeats:
    key = np.repeat(np.arange(len(group.starts)), group.sizes)[stays]
    return Repeats(group.entries[stays], group.documents[stays], np.flatnonzero(np.diff(key, prepend=-1)))


def _share_of_equal(scans: Sequence[Scan], numbers: Numbers, left: np.ndarray, right: np.ndarray,
                    num_hashes: int) -> np.ndarray:
    share = np.empty(len(left))
    for start in range(0, len(left), _PAIRS_AT_ONCE):
        part = slice(start, start + _PAIRS_AT_ONCE)
        sides = []
        for documents in (left[part], right[part]):
            rows = np.empty((len(documents), num_hashes), np.uint32)
            for shard, where, places in numbers.by_shard(documents):
                rows[where] = scans[shard].signatures(num_hashes)[places]
            sides.append(rows)
        share[part] = (sides[0] == sides[1]).mean(axis=1)
    return share


def save_parents(folder: Path, stage: int, parents: np.ndarray) -> None:
    """Keep the clusters after a stage, so that a later run goes on from there."""
    with atomic_write(folder / f"stage-{stage:03}.bin") as handle:
        parents.tofile(handle)


def load_parents(folder: Path, stage: int) -> np.ndarray | None:
    """Return what `save_parents` kept, if it did."""
    path = folder / f"stage-{stage:03}.bin"
    return np.fromfile(path, np.int64) if path.is_file() else None
