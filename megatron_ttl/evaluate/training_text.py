"""Read what a model was trained on, in parts that workers share: tokenised datasets, or files of documents."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_ttl.data.documents import input_faults, parse_line, read_chunks
from megatron_ttl.data.indexed_dataset import IndexedDataset
from megatron_ttl.data.inspect import decoded_documents
from megatron_ttl.errors import DataError, collected, raise_faults
from megatron_ttl.files import checksum

_UNIT_BYTES = 16 << 20  # of text: what travels with it to a worker is small beside it
_UNIT_TOKENS = 4 << 20
_MOST_BAD_LINES = 0.001


@dataclass(frozen=True)
class Unit:
    """Some documents that stand together."""

    first: int
    """Number of the first line, from 1, or of the first document, from 0."""
    lines: list[bytes]
    """Lines of a file; none for a dataset, which is opened where it is read."""
    count: int
    """Lines or documents."""
    done: int
    """Bytes of the source up to its end."""


@dataclass
class Tally:
    """What was read."""

    documents: int = 0
    lines: int = 0
    """Lines that are not blank."""
    rejected: Counter[str] = field(default_factory=Counter)
    """Lines that are no documents, by reason."""

    def add(self, other: Tally) -> None:
        """Add what was read elsewhere."""
        self.documents += other.documents
        self.lines += other.lines
        self.rejected += other.rejected

    def require_good(self, name: str) -> None:
        """Refuse a source with too much that could not be looked at.

        Raises:
            DataError: more than one line in a thousand is no document.
        """
        bad = self.rejected.total()
        if bad > _MOST_BAD_LINES * self.lines:
            kinds = ", ".join(f"{count:,} x {reason}" for reason, count in self.rejected.most_common())
            raise DataError(f"{name}: {bad:,} of {self.lines:,} lines are no documents ({kinds}); at most "
                            f"{100 * _MOST_BAD_LINES:g} % may be; repair them, or name the file that was trained on")


@dataclass(frozen=True)
class TextFile:
    """Documents as they were written."""

    path: Path
    text_key: str
    name: str
    checksum: str
    size: int

    def units(self) -> Iterator[Unit]:
        """Yield some lines at a time."""
        for chunk in read_chunks(self.path, _UNIT_BYTES):
            yield Unit(chunk.first_line, chunk.lines, len(chunk.lines), chunk.input_bytes)

    def read(self, unit: Unit, tally: Tally) -> Iterator[tuple[str, str]]:
        """Yield (`<file>:<line>`, text) of each document."""
        for number, line in enumerate(unit.lines, unit.first):
            text = parse_line(line, self.text_key)
            tally.lines += text is not None
            if isinstance(text, str):
                tally.documents += 1
                yield f"{self.name}:{number}", text
            elif text is not None:
                tally.rejected[text.reason] += 1


@dataclass(frozen=True)
class TokenDataset:
    """Documents as ids, decoded with the copy of the tokenizer beside them."""

    prefix: str
    name: str
    checksum: str
    size: int

    def units(self) -> Iterator[Unit]:
        """Yield some documents at a time."""
        dataset = IndexedDataset(self.prefix)
        ends = dataset.document_ends()
        first = 0
        while first < len(ends):
            begin = int(ends[first - 1]) if first else 0
            after = max(first + 1, int(np.searchsorted(ends, begin + _UNIT_TOKENS, side="right")))
            yield Unit(first, [], after - first, int(ends[after - 1]) * dataset.dtype.itemsize)
            first = after

    def read(self, unit: Unit, tally: Tally) -> Iterator[tuple[str, str]]:
        """Yield (`<prefix>:<number>`, text) of each document."""
        for number, _, text in decoded_documents(self.prefix, unit.count, unit.first):
            tally.documents += 1
            yield f"{self.name}:{number}", text


Source = TextFile | TokenDataset


def open_sources(places: Sequence[str | os.PathLike[str]], text_key: str = "text") -> list[Source]:
    """Open training text: files of documents, packed or not, and prefixes of tokenised datasets.

    Args:
        places: each is read once, however often it is named.
        text_key: key of the text in files of documents.

    Raises:
        DataError: something is missing or damaged, or nobody knows a dataset's tokenizer; all faults at once.
    """
    faults: list[str] = []
    sources: list[Source] = []
    for place in dict.fromkeys(map(os.fspath, places)):
        with collected(faults, DataError):
            sources.append(_open_file(Path(place), text_key) if Path(place).is_file() else _open_dataset(place))
    raise_faults(DataError, faults)
    return sources


def _open_file(path: Path, text_key: str) -> TextFile:
    raise_faults(DataError, input_faults([path]))
    return TextFile(path, text_key, path.name, f"{checksum(path)} {text_key}", path.stat().st_size)


def _open_dataset(prefix: str) -> TokenDataset:
    dataset = IndexedDataset(prefix, verify=False)
    manifest = dataset.manifest
    if manifest is None:
        raise DataError(f"{prefix}: has no manifest, so its tokenizer is unknown; it must have one to be decoded; write it "
                        "with tools/adopt_dataset.py, or name the text that it was made of")
    return TokenDataset(prefix, Path(prefix).name, f"{manifest.bin.checksum} {manifest.tokenizer.checksum}",
                        dataset.token_count * dataset.dtype.itemsize)
