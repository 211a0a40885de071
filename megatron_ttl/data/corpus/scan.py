"""Take from one shard what duplicates are found by: hashes, bands, signatures and paragraphs of its documents.

A scan is a folder that appears when it is whole. Its name says which settings, shard and versions it belongs to.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO

import numpy as np

from megatron_ttl.data.corpus.dedup_settings import DedupSettings
from megatron_ttl.data.corpus.minhash import band_keys, signature_version, signatures
from megatron_ttl.data.corpus.ngrams import content_hash, ngram_hashes, normalise, words_of
from megatron_ttl.data.corpus.paragraphs import paragraphs_of
from megatron_ttl.data.corpus.shards import read_shard
from megatron_ttl.data.corpus.sorted_keys import map_file, sort_entries
from megatron_ttl.files import atomic_directory, checksum, checksum_bytes, or_disk_error, write_json

_FORMAT = 1  # raised when what a scan holds or how it is computed changes
_DOCUMENTS_AT_ONCE, _SHINGLES_AT_ONCE = 512, 1 << 21
_EXACT = np.dtype([("key", "<u8"), ("check", "<u8"), ("row", "<u4")])
_BAND = np.dtype([("key", "<u8"), ("row", "<u4")])
_PARAGRAPH = np.dtype([("key", "<u8"), ("check", "<u8"), ("row", "<u4"), ("number", "<u4"), ("characters", "<u4")])
_DOCUMENT = np.dtype([("source", "<u4"), ("paragraphs", "<u4"), ("id_end", "<u8")])
_PLAIN_FIELDS = ("exact", "near", "bands", "rows", "shingle_words", "min_words", "paragraphs", "paragraph_min_characters")


@dataclass(frozen=True)
class Scan:
    """What is known of one shard."""

    folder: Path

    @cached_property
    def _summary(self) -> dict[str, object]:
        return json.loads((self.folder / "summary.json").read_text(encoding="utf-8"))

    @property
    def sources(self) -> list[str]:
        """Names of the sources; documents point into it."""
        return self._summary["sources"]  # type: ignore[return-value]

    @cached_property
    def documents(self) -> np.ndarray:
        """Source, number of paragraphs and end of the identifier of each document.  # record [documents]"""
        return map_file(self.folder / "documents.bin", _DOCUMENT)

    @property
    def exact(self) -> np.ndarray:
        """Hash of each normalised text.  # record [documents]"""
        return map_file(self.folder / "exact.bin", _EXACT)

    def bands(self, count: int) -> np.ndarray:
        """Keys of each band of each document that is long enough.  # record [count, documents or fewer]"""
        return map_file(self.folder / "bands.bin", _BAND).reshape(count, -1)

    @property
    def paragraphs(self) -> np.ndarray:
        """Hash, place and length of each paragraph that is long enough.  # record [paragraphs]"""
        return map_file(self.folder / "paragraphs.bin", _PARAGRAPH)

    def signatures(self, num_hashes: int) -> np.ndarray:
        """Signature of each document; of a short one it is zeros.  # uint32 [documents, num_hashes]"""
        return map_file(self.folder / "signatures.bin", "<u4").reshape(-1, num_hashes)

    def identifiers(self, rows: np.ndarray) -> list[str]:
        """Return the identifiers of some documents."""
        with open(self.folder / "ids.bin", "rb") as handle:
            names = []
            for row in rows.tolist():
                start = int(self.documents[row - 1]["id_end"]) if row else 0
                handle.seek(start)
                names.append(handle.read(int(self.documents[row]["id_end"]) - start).decode("utf-8"))
        return names


def scan_shard(settings: DedupSettings, work: Path, numbered: tuple[int, Path]) -> str:
    """Scan a shard, unless its scan is there, and return the name of the scan's folder in `work`.

    Raises:
        DataError: the shard cannot be read, or a library is missing.
        DiskError: the scan cannot be written.
    """
    number, shard = numbered
    plain: dict[str, object] = {name: getattr(settings, name) for name in _PLAIN_FIELDS}
    plain |= {"format": _FORMAT, "signatures": settings.near and settings.min_similarity > 0, "shard": checksum(shard)}
    if settings.near:
        plain["version"] = signature_version()
    key = checksum_bytes(json.dumps(plain, sort_keys=True).encode("utf-8")).removeprefix("xxh3:")
    folder = work / f"scan-{number:05}-{key}"
    if not folder.is_dir():
        with or_disk_error(folder), atomic_directory(folder) as draft, open(draft / "signatures.bin", "xb") as kept:
            collected = _Collected(settings, kept)
            for document in read_shard(shard):
                collected.add(document.id, document.source, document.text)
            collected.write(draft)
    return folder.name


@dataclass
class _Collected:
    """What has been taken from the documents so far: about 900 bytes per document; signatures are on the disk."""

    settings: DedupSettings
    signatures: IO[bytes]
    count: int = 0
    id_end: int = 0
    sources: dict[str, int] = field(default_factory=dict)
    ids: list[bytes] = field(default_factory=list)
    documents: list[tuple[int, int, int]] = field(default_factory=list)
    exact: list[bytes] = field(default_factory=list)
    paragraphs: list[np.ndarray] = field(default_factory=list)
    bands: list[np.ndarray] = field(default_factory=list)
    band_rows: list[int] = field(default_factory=list)
    shingles: list[np.ndarray] = field(default_factory=list)
    shingled: list[int] = field(default_factory=list)
    waiting: int = 0

    def add(self, identifier: str, source: str, text: str) -> None:
        """Take what is needed from one document."""
        normalised = normalise(text)
        if self.settings.exact:
            self.exact.append(content_hash(normalised))
        paragraphs = self._add_paragraphs(text) if self.settings.paragraphs else 0
        if self.settings.near:
            words = words_of(normalised)
            if len(words) >= self.settings.min_words:
                *_, hashes = ngram_hashes(words, self.settings.shingle_words)
                self.shingles.append(hashes)
                self.shingled.append(self.count)
                self.waiting += len(hashes)
        name = identifier.encode("utf-8")
        self.ids.append(name)
        self.id_end += len(name)
        self.documents.append((self.sources.setdefault(source, len(self.sources)), paragraphs, self.id_end))
        self.count += 1
        if len(self.shingled) >= _DOCUMENTS_AT_ONCE or self.waiting >= _SHINGLES_AT_ONCE:
            self._sign()

    def _add_paragraphs(self, text: str) -> int:
        count, long = 0, []
        for number, paragraph in paragraphs_of(text):
            count += 1
            if len(paragraph) >= self.settings.paragraph_min_characters:
                key, check = np.frombuffer(content_hash(normalise(paragraph)), ">u8").tolist()
                long.append((key, check, self.count, number, len(paragraph)))
        if long:
            self.paragraphs.append(np.array(long, _PARAGRAPH))
        return count

    def _sign(self) -> None:
        """Turn the waiting shingles into signatures and bands."""
        rows = signatures(self.shingles, self.settings.num_hashes)
        self.bands.append(band_keys(rows, self.settings.bands))
        self.band_rows += self.shingled
        if self.settings.min_similarity > 0:
            written = self.signatures.tell() // (4 * self.settings.num_hashes)
            full = np.zeros((self.count - written, self.settings.num_hashes), "<u4")
            full[np.array(self.shingled, np.int64) - written] = rows
            self.signatures.write(full.tobytes())
        self.shingles, self.shingled, self.waiting = [], [], 0

    def write(self, folder: Path) -> None:
        """Write all of it, sorted by key."""
        if self.settings.near:
            self._sign()
            keys = np.concatenate(self.bands, axis=1)
            with open(folder / "bands.bin", "xb") as handle:
                for number in range(self.settings.bands):
                    band = np.empty(len(self.band_rows), _BAND)
                    band["key"], band["row"] = keys[number], self.band_rows
                    sort_entries(band).tofile(handle)
        if self.settings.exact:
            halves = np.frombuffer(b"".join(self.exact), ">u8").reshape(-1, 2)
            exact = np.empty(self.count, _EXACT)
            exact["key"], exact["check"], exact["row"] = halves[:, 0], halves[:, 1], np.arange(self.count)
            sort_entries(exact).tofile(folder / "exact.bin")
        if self.settings.paragraphs:
            sort_entries(np.concatenate([np.empty(0, _PARAGRAPH), *self.paragraphs])).tofile(folder / "paragraphs.bin")
        (folder / "ids.bin").write_bytes(b"".join(self.ids))
        np.array(self.documents, _DOCUMENT).tofile(folder / "documents.bin")
        write_json(folder / "summary.json", {"documents": self.count, "sources": list(self.sources)})
