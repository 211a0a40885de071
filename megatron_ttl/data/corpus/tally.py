"""Count what becomes of documents, and choose the examples that a report shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import xxhash

_AROUND = 60  # characters shown on either side of a change
_EXCERPT = 300  # characters shown of a dropped document


@dataclass
class Amount:
    """So many documents, their bytes in UTF-8, and their tokens where these are counted."""

    documents: int = 0
    bytes: int = 0
    tokens: int = 0

    def add(self, documents: int, bytes_: int, tokens: int) -> None:
        """Add some documents."""
        self.documents += documents
        self.bytes += bytes_
        self.tokens += tokens

    def as_list(self) -> list[int]:
        """Return the three numbers."""
        return [self.documents, self.bytes, self.tokens]


@dataclass
class Tally:
    """What became of the rows of a unit, or of a source.

    rows = blank + unreadable + documents read; documents read = kept + lost, and so are their bytes and tokens, but for
    what changes took away.
    """

    rows: int = 0
    blank: int = 0
    unreadable: Counter[str] = field(default_factory=Counter)
    read: Amount = field(default_factory=Amount)
    kept: Amount = field(default_factory=Amount)
    lost: dict[str, Amount] = field(default_factory=dict)
    """By rule."""
    stage: dict[str, int] = field(default_factory=dict)
    """Number of the stage of each rule."""
    changed: dict[str, Amount] = field(default_factory=dict)
    """By step: documents it changed, and the bytes and tokens that went."""
    unknown: Counter[str] = field(default_factory=Counter)
    """By predicate: documents that do not have its field."""

    def lose(self, rule: str, stage: int, bytes_: int, tokens: int) -> None:
        """Count one dropped document."""
        self.lost.setdefault(rule, Amount()).add(1, bytes_, tokens)
        self.stage[rule] = stage

    def change(self, step: str, bytes_: int, tokens: int) -> None:
        """Count one changed document and what went."""
        self.changed.setdefault(step, Amount()).add(1, bytes_, tokens)

    def rules(self) -> list[str]:
        """Return the rules that dropped something, in the order of their stages."""
        return sorted(self.lost, key=lambda rule: (self.stage[rule], rule))

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {"rows": self.rows, "blank": self.blank, "unreadable": dict(self.unreadable), "read": self.read.as_list(),
                "kept": self.kept.as_list(), "lost": {rule: amount.as_list() for rule, amount in self.lost.items()},
                "stage": self.stage, "changed": {step: amount.as_list() for step, amount in self.changed.items()},
                "unknown": dict(self.unknown)}

    def merge(self, other: Mapping[str, Any]) -> None:
        """Add what another has counted, as its `to_json` gives it."""
        self.rows += other["rows"]
        self.blank += other["blank"]
        self.unreadable.update(other["unreadable"])
        self.read.add(*other["read"])
        self.kept.add(*other["kept"])
        for mine, theirs in ((self.lost, other["lost"]), (self.changed, other["changed"])):
            for name, amount in theirs.items():
                mine.setdefault(name, Amount()).add(*amount)
        self.stage.update(other["stage"])
        self.unknown.update(other["unknown"])


class Examples:
    """A few random entries per label: those whose ids have the smallest keyed hashes, in whatever order they come."""

    def __init__(self, count: int, seed: int) -> None:
        self._count = count
        self._seed = seed
        self._chosen: dict[str, list[tuple[int, str, dict[str, Any]]]] = {}

    def wants(self, label: str, id_: str) -> bool:
        """Say whether an entry would be among the chosen so far."""
        chosen = self._chosen.get(label, [])
        return len(chosen) < self._count or (bool(chosen) and self._key(label, id_) < chosen[-1][:2])

    def add(self, label: str, id_: str, entry: dict[str, Any]) -> None:
        """Offer an entry."""
        chosen = self._chosen.setdefault(label, [])
        chosen.append((*self._key(label, id_), entry))
        chosen.sort(key=lambda item: item[:2])
        del chosen[self._count:]

    def to_json(self) -> dict[str, list[dict[str, Any]]]:
        """Return the entries by label."""
        return {label: [entry for _, _, entry in chosen] for label, chosen in sorted(self._chosen.items())}

    def merge(self, entries: Mapping[str, list[dict[str, Any]]]) -> None:
        """Offer what another has chosen, as its `to_json` gives it; every entry has its `id`."""
        for label, chosen in entries.items():
            for entry in chosen:
                self.add(label, entry["id"], entry)

    def _key(self, label: str, id_: str) -> tuple[int, str]:
        return xxhash.xxh3_64_intdigest(f"{label}:{id_}".encode("utf-8", "replace"), self._seed), id_


def excerpt(text: str) -> str:
    """Return the beginning of a text, for a report."""
    return text if len(text) <= _EXCERPT else text[:_EXCERPT] + "..."


def difference(before: str, after: str) -> dict[str, str]:
    """Return where two texts begin to differ, with a little around it."""
    at = next((place for place, (x, y) in enumerate(_pairs(before, after)) if x != y), min(len(before), len(after)))
    start = max(0, at - _AROUND)
    return {"before": before[start:at + _AROUND], "after": after[start:at + _AROUND]}


def _pairs(before: str, after: str) -> Iterator[tuple[str, str]]:
    return zip(before, after, strict=False)
