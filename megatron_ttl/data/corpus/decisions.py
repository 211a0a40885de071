"""What becomes of each document after duplicates are known: written per shard, counted for the report."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from megatron_ttl.data.corpus.clusters import Numbers
from megatron_ttl.data.corpus.document import Document, Dropped
from megatron_ttl.data.corpus.paragraphs import without_paragraphs
from megatron_ttl.data.corpus.scan import Scan
from megatron_ttl.data.corpus.sorted_keys import map_file, repeats

_REMOVED = np.dtype([("place", "<u8"), ("number", "<u4"), ("characters", "<u4")])
_LARGEST, _SHOWN_IDS = 20, 10


@dataclass(frozen=True)
class Decision:
    """What becomes of a document that is not kept as it is."""

    dropped: Dropped | None = None
    """Why it goes, with the identifier of the document that stays; nothing where it is only shortened."""
    paragraphs: tuple[int, ...] = ()
    """Numbers of the paragraphs that are taken out of it."""
    characters: int = 0
    """Characters of those."""

    def apply(self, document: Document) -> Document | Dropped:
        """Return what is left of the document; a note says what was taken out."""
        if self.dropped is not None:
            return self.dropped
        note = {"removed": len(self.paragraphs), "characters": self.characters}
        return document.with_text(without_paragraphs(document.text, self.paragraphs)).with_note("paragraphs", note)


def read_decisions(path: Path) -> dict[int, Decision]:
    """Return the decisions for a shard, by line from 1; a document without one stays as it is."""
    decisions = {}
    with open(path, encoding="utf-8") as lines:
        for record in map(json.loads, lines):
            dropped = Dropped(*record["dropped"]) if "dropped" in record else None
            decisions[record["line"]] = Decision(dropped, tuple(record.get("paragraphs", ())), record.get("characters", 0))
    return decisions


@dataclass
class Verdict:
    """Clusters of all documents, and what follows from them.

    Attributes:
        scans: the shards.
        numbers: the order of their documents.
        first: of each document the first with the same text.  # int64 [documents]
        kept: of each document the one of its cluster that stays.  # int64 [documents]
    """

    scans: Sequence[Scan]
    numbers: Numbers
    first: np.ndarray
    kept: np.ndarray

    def write(self, folder: Path, paragraph_min_documents: int | None) -> dict[str, Any]:
        """Write `decisions-<shard>.jsonl` for every shard and return the counts of the report."""
        alive = self.kept == np.arange(self.numbers.count)
        removals = [] if paragraph_min_documents is None else list(self._removals(folder, alive, paragraph_min_documents))
        counts: Counter[str] = Counter()
        pairs: Counter[tuple[str, str, str]] = Counter()
        sources, names = self._sources()
        for shard in range(len(self.scans)):
            with open(folder / f"decisions-{shard:05}.jsonl", "x", encoding="utf-8", newline="\n") as out:
                for row, line in sorted([*self._copies(shard, alive, sources, names, pairs),
                                         *self._shortened(shard, removals, counts)], key=lambda item: item[0]):
                    counts[line["dropped"][0] if "dropped" in line else "edited"] += 1
                    _write_line(out, {"line": row + 1, **line})
        for path in removals:
            path.unlink()
        return {**self._totals(counts), **self._cluster_report(), "source_pairs": [
            {"kept": kept, "dropped": dropped, "rule": rule, "documents": count}
            for (kept, dropped, rule), count in sorted(pairs.items(), key=lambda item: (-item[1], item[0]))]}

    def _removals(self, folder: Path, alive: np.ndarray, min_documents: int) -> Iterator[Path]:
        """Write which paragraphs go, as files sorted by place, and yield them."""
        runs = self.numbers.runs([scan.paragraphs for scan in self.scans])
        for part, group in enumerate(repeats(runs, self.numbers.of_place, alive)):
            if not len(group.starts):
                continue
            new = np.diff(group.documents, prepend=-1) != 0
            new[group.starts] = True
            goes = np.repeat(np.add.reduceat(new.astype(np.int64), group.starts) >= min_documents, group.sizes)
            goes[group.starts] = False
            removed = np.empty(int(goes.sum()), _REMOVED)
            removed["place"] = self.numbers.places(group.documents[goes])
            removed["number"], removed["characters"] = group.entries["number"][goes], group.entries["characters"][goes]
            path = folder / f"removals-{part:06}.bin"
            np.sort(removed, order=("place", "number")).tofile(path)
            yield path

    def _sources(self) -> tuple[np.ndarray, list[str]]:
        """Return the source of each document by number, and the names of the sources."""
        known: dict[str, int] = {}
        codes = np.empty(self.numbers.count, np.uint32)
        for shard, scan in enumerate(self.scans):
            local = np.array([known.setdefault(name, len(known)) for name in scan.sources], np.uint32)
            if len(scan.documents):
                codes[self.numbers.of_shard(shard)] = local[scan.documents["source"]]
        return codes, list(known)

    def _identifiers(self, numbers: np.ndarray) -> list[str]:
        found = [""] * len(numbers)
        for shard, where, rows in self.numbers.by_shard(numbers):
            for place, name in zip(where.tolist(), self.scans[shard].identifiers(rows), strict=True):
                found[place] = name
        return found

    def _copies(self, shard: int, alive: np.ndarray, sources: np.ndarray, names: list[str],
                pairs: Counter[tuple[str, str, str]]) -> Iterator[tuple[int, dict[str, Any]]]:
        numbers = self.numbers.of_shard(shard)
        rows = np.flatnonzero(~alive[numbers])
        numbers = numbers[rows]
        kept = self.kept[numbers]
        exact = self.first[numbers] != numbers
        for row, number, stays, is_exact, name in zip(rows.tolist(), numbers.tolist(), kept.tolist(), exact.tolist(),
                                                      self._identifiers(kept), strict=True):
            rule = "dedup.exact" if is_exact else "dedup.near"
            pairs[names[sources[stays]], names[sources[number]], rule] += 1
            yield row, {"dropped": [rule, name, "one document per text" if is_exact else "one document per cluster"]}

    def _shortened(self, shard: int, removals: list[Path], counts: Counter[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        base, end = self.numbers.bases[shard:shard + 2].tolist()
        pieces = [np.empty(0, _REMOVED)]
        for path in removals:
            removed = map_file(path, _REMOVED)
            pieces.append(removed[slice(*np.searchsorted(removed["place"], (base, end)))])
        mine = np.sort(np.concatenate(pieces), order=("place", "number"))
        places, starts = np.unique(mine["place"], return_index=True)
        totals = self.scans[shard].documents["paragraphs"]
        for place, some in zip(places.tolist(), np.split(mine, starts[1:]), strict=bool(len(places))):
            characters = int(some["characters"].sum())
            counts["paragraphs"] += len(some)
            counts["characters"] += characters
            row = place - base
            if len(some) == totals[row]:
                yield row, {"dropped": ["dedup.paragraphs", len(some), "one paragraph that stands nowhere before"]}
            else:
                yield row, {"paragraphs": some["number"].tolist(), "characters": characters}

    def _totals(self, counts: Counter[str]) -> dict[str, Any]:
        dropped = {rule: counts[rule] for rule in ("dedup.exact", "dedup.near", "dedup.paragraphs")}
        return {"documents": self.numbers.count, "kept": self.numbers.count - sum(dropped.values()), "dropped": dropped,
                "edited": counts["edited"], "removed_paragraphs": counts["paragraphs"],
                "removed_characters": counts["characters"]}

    def _cluster_report(self) -> dict[str, Any]:
        """Count clusters by size, and name the largest: those of one size in the order of the documents that stay."""
        sizes = np.bincount(self.kept, minlength=self.numbers.count)
        stay = np.flatnonzero(sizes > 1)
        sizes = sizes[stay]
        histogram: dict[str, int] = {}
        for power in range(int(sizes.max(initial=1) - 1).bit_length()):
            low, high = 2**power + 1, 2 ** (power + 1)
            name = f"{low}-{high}" if low < high else str(low)
            histogram[name] = int(((sizes >= low) & (sizes <= high)).sum())
        largest = []
        for place in np.argsort(-sizes, kind="stable")[:_LARGEST].tolist():
            members = np.flatnonzero(self.kept == stay[place])
            shown = self._identifiers(members[:_SHOWN_IDS])
            largest.append({"documents": int(sizes[place]), "kept": shown[0], "others": shown[1:],
                            "exact": int((self.first[members] != members).sum())})
        return {"clusters": len(stay), "clusters_by_size": histogram, "largest_clusters": largest}


def _write_line(out: TextIO, record: dict[str, Any]) -> None:
    out.write(json.dumps(record, ensure_ascii=False) + "\n")
