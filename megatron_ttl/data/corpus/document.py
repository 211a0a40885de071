"""What flows through the corpus pipeline: a document with its provenance, or why it was dropped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import xxhash


@dataclass(frozen=True, slots=True)
class Document:
    """A text and where it came from."""

    text: str
    """Any Unicode text without lone surrogates."""
    source: str
    """Name of the source in the corpus file."""
    license: str
    """Licence of the source, or of the document where its record says so."""
    file: str
    """Input file, as the corpus file names it (a hub or local dataset: its name and split)."""
    position: int
    """Line or row in that file, from 1."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """What else the record says: JSON values."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """What the steps found or changed, by step: JSON values (`{"language": {"pt": 0.98}, "mojibake": 3}`)."""

    @property
    def id(self) -> str:
        """Name that no other document of a corpus has, and that a rerun gives again."""
        return f"{self.source}/{self.file}:{self.position}"

    @property
    def hash(self) -> str:
        """xxh3-128 of the text in UTF-8, 32 hexadecimal digits."""
        return xxhash.xxh3_128_hexdigest(self.text.encode("utf-8"))

    def with_text(self, text: str) -> Document:
        """Return the document with another text."""
        return replace(self, text=text)

    def with_note(self, name: str, value: Any) -> Document:
        """Return the document with one more note."""
        return replace(self, notes={**self.notes, name: value})


class Dropped(NamedTuple):
    """Why a document is left out."""

    rule: str
    """Name of the rule, as in the report: `gopher.mean_word_length`."""
    value: float | str
    """What was measured."""
    limit: float | str
    """What it had to keep to, in words or as a number."""


Step = Callable[[Document], Document | Dropped]
"""One stage for one document: returns it (perhaps changed), or why it goes. Pure: no state, no randomness."""
