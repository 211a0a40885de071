"""Read documents from `.jsonl`, `.jsonl.gz` and `.jsonl.zst` files: one JSON object per line, its text under one key.

A line that holds no document becomes a `BadLine` with its reason; a file that cannot be read to its end is an
error, for nobody knows what is missing.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, BinaryIO

from megatron_ttl.data.zstd_file import ZSTD_MAGIC, ZstdDamaged, ZstdLines
from megatron_ttl.errors import DataError, raise_faults

LONGEST_LINE = 64 << 20
"""Bytes; what is longer is no document: a packed bomb, or a file without line ends."""
_MOST_LINES = 20_000  # in a chunk: that a file is hopeless is seen between chunks
_SUFFIXES = (".jsonl", ".json", ".ndjson")
_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGICS = (ZSTD_MAGIC, *(bytes([0x50 + number]) + b"\x2a\x4d\x18" for number in range(16)))  # or a frame to skip
_UTF8_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
_from_json = json.JSONDecoder().decode  # `json.loads` looks at seven arguments first, which a short line feels
_KIND = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string",
         list: "a list", dict: "an object"}


@dataclass(frozen=True)
class BadLine:
    """Why a line is no document."""

    reason: str


@dataclass(frozen=True)
class Chunk:
    """Some lines of one file, as bytes."""

    file: int
    """Number of the file among the inputs."""
    first_line: int
    """Number of its first line, from 1."""
    first_byte: int
    """Where that line begins in the (unpacked) file."""
    lines: list[bytes]
    """The lines, line ends included."""
    input_bytes: int
    """How far the (packed) file has been read: for the progress."""


def input_faults(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Name everything about the inputs that keeps them from being read, without reading them."""
    cure = "correct the path"
    faults, seen = [], set()
    for path in map(Path, paths):
        if not path.exists():
            faults.append(f"{path}: does not exist; it must be a file of documents; {cure}")
            continue
        plain = without_packing(path.name.lower())
        if not path.is_file():
            faults.append(f"{path}: is not a file; it must be a file of documents; {cure}")
        elif not plain.endswith(_SUFFIXES):
            faults.append(f"{path}: has an unknown suffix; it must end in {', '.join(_SUFFIXES)}, with or "
                          "without .gz or .zst; convert or rename it")
        elif not os.access(path, os.R_OK):
            faults.append(f"{path}: cannot be read; it must be readable by you; change its permissions")
        if path.resolve() in seen:
            faults.append(f"{path}: is given twice; every input is read once; to repeat a source, give it a "
                          "larger weight in training")
        seen.add(path.resolve())
    if not paths:
        faults.append("--input: is empty; it must name at least one file; give .jsonl, .jsonl.gz or .jsonl.zst files")
    return faults


def without_packing(name: str) -> str:
    """Return a name without the suffix that says how the file is packed."""
    return name.removesuffix(".gz") if name.endswith(".gz") else name.removesuffix(".zst")


def read_chunks(path: str | os.PathLike[str], chunk_bytes: int = 1 << 20, file: int = 0) -> Iterator[Chunk]:
    """Yield the lines of a file in chunks of about `chunk_bytes`; a longer line is a chunk of its own.

    Packed files are known by their first bytes, not by their name.

    Raises:
        DataError: the file cannot be read to its end, or is UTF-16; `<file>:<line>:<byte>` says where, the byte being
            where that line begins in the (unpacked) file.
    """
    path = Path(path)
    done, place = 0, 0  # lines and bytes of the chunks so far
    try:
        with open(path, "rb") as packed:
            head = packed.read(4)
            packed.seek(0)
            if head[:2] in _UTF16_BOMS:
                raise DataError(f"{path}:1:0: is UTF-16; it must be UTF-8; convert it")
            for suffix, magic, packer in ((".gz", _GZIP_MAGIC, "gzip"), (".zst", _ZSTD_MAGICS, "zstd")):
                if path.name.lower().endswith(suffix) and head and not head.startswith(magic):
                    raise DataError(f"{path}:1:0: is named {suffix} and is not packed with {packer}; its name must say "
                                    "what it is; rename or pack it")
            for chunk in _chunks_of(_unpacked(packed, head), packed, chunk_bytes, file):
                yield chunk
                done, place = done + len(chunk.lines), chunk.first_byte + sum(map(len, chunk.lines))
    except _Broken as error:
        raise DataError(f"{path}:{error.line}:{error.byte}: {error.what}; it must be whole; "
                        "copy or pack it again") from None
    except OSError as error:
        raise DataError(f"{path}:{done + 1}:{place}: cannot be read ({error.strerror or error}); it must be readable "
                        "to its end; check the disk or copy it again") from None


class _Broken(Exception):
    """A packed file that cannot be unpacked after some line."""

    def __init__(self, line: int, byte: int, what: str) -> None:
        super().__init__(what)
        self.line = line
        self.byte = byte
        self.what = what


def _unpacked(packed: BinaryIO, head: bytes) -> BinaryIO:
    if head.startswith(_GZIP_MAGIC):
        # No BufferedReader around it: it would lose the lines before the place where a damaged file breaks.
        return gzip.GzipFile(fileobj=packed, mode="rb")  # type: ignore[return-value]
    if head.startswith(_ZSTD_MAGICS):
        return ZstdLines(packed)  # type: ignore[return-value]
    return packed


def _chunks_of(handle: BinaryIO, packed: BinaryIO, chunk_bytes: int, file: int) -> Iterator[Chunk]:
    number, start, size = 1, 0, 0
    lines: list[bytes] = []
    try:
        for line in iter(partial(handle.readline, LONGEST_LINE + 1), b""):
            if len(line) > LONGEST_LINE:
                raise DataError(f"{packed.name}:{number + len(lines)}:{start + size}: is longer than "
                                f"{LONGEST_LINE >> 20} MiB; a line is one document, a book has 1 MiB; split it, or leave it out")
            lines.append(line)
            size += len(line)
            if size >= chunk_bytes or len(lines) >= _MOST_LINES:
                yield Chunk(file, number, start, lines, packed.tell())
                number, start, size, lines = number + len(lines), start + size, 0, []
    except EOFError:
        raise _Broken(number + len(lines), start + size, "the packed file ends in the middle") from None
    except (gzip.BadGzipFile, zlib.error, ZstdDamaged) as error:
        raise _Broken(number + len(lines), start + size, f"the packed file is damaged ({error})") from None
    if lines:
        yield Chunk(file, number, start, lines, packed.tell())


def parse_line(line: bytes, text_key: str) -> str | BadLine | None:
    """Return the text of a line, why it has none, or None for a blank line.

    LF or CRLF may end the line, a byte order mark may begin it. NaN and Infinity are let through outside of
    the text, for Python writes them; a NUL in a text is text.
    """
    record = parse_record(line, (text_key,))
    return text_of(record, text_key) if isinstance(record, dict) else record


def parse_record(line: bytes, text_keys: Sequence[str]) -> dict[str, Any] | BadLine | None:
    """Return the object of a line, why there is none, or None for a blank line; `text_keys` stand in it once at most."""
    line = line.removeprefix(_UTF8_BOM)
    if not line or line.isspace():
        return None
    try:
        record = _from_json(line.decode("utf-8"))
    except UnicodeDecodeError:
        return BadLine("invalid UTF-8")
    except (ValueError, RecursionError):
        return BadLine("broken JSON")
    if not isinstance(record, dict):
        return BadLine(f"{_KIND[type(record)]} instead of an object")
    for text_key in text_keys:
        if not isinstance(record.get(text_key), str):
            continue
        if line.count(_key_as_written(text_key)) > 1 and _times_given(line, text_key) > 1 and isinstance(text_of(record, text_key), str):
            return BadLine(f"the key '{text_key}' is given twice")
    return record


def text_of(record: Mapping[str, Any], text_key: str) -> str | BadLine:
    """Return the text of a record, or why it has none."""
    if text_key not in record:
        return BadLine(f"no key '{text_key}'")
    text = record[text_key]
    if not isinstance(text, str):
        return BadLine(f"the text is {_KIND.get(type(text), type(text).__name__)}")
    if not text or text.isspace():
        return BadLine("the text is empty")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            return BadLine("lone surrogate")
    return text


@cache  # it took a tenth of the time of a short line
def _key_as_written(text_key: str) -> bytes:
    return json.dumps(text_key, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _times_given(line: bytes, text_key: str) -> int:
    """Count a key of the outermost object: JSON lets it stand there twice, and Python would take the last."""
    count = 0

    def pairs(items: list[tuple[str, Any]]) -> None:
        nonlocal count
        count = sum(key == text_key for key, _ in items)  # the outermost object comes last

    json.loads(line, object_pairs_hook=pairs)
    return count


@dataclass
class DocumentReader:
    """Iterate over the texts of files, count what is no document, and refuse a corpus with too much of it.

    Attributes:
        sources: one entry per file read so far: name, size, documents, rejected lines.
        rejected: lines that became no document, by reason.
        bad_lines: the first few of them, as `<file>:<line>:<byte>: <reason>`; the byte is where the line begins.

    Raises:
        DataError: (while iterating) a file cannot be read, or more than `max_bad_fraction` of the lines are
            bad; the latter at the end, with all counts.
    """

    paths: Sequence[str | os.PathLike[str]]
    text_key: str = "text"
    max_bad_fraction: float = 0.001
    on_progress: Callable[[float], None] | None = None
    sources: list[dict[str, Any]] = field(default_factory=list)
    rejected: Counter[str] = field(default_factory=Counter)
    bad_lines: list[str] = field(default_factory=list)

    @property
    def size_bytes(self) -> int:
        """Bytes of all files, packed as they are: what `on_progress` counts."""
        return sum(os.path.getsize(path) for path in self.paths)

    def __iter__(self) -> Iterator[str]:
        raise_faults(DataError, input_faults(self.paths))
        before, lines = 0, 0
        for path in map(Path, self.paths):
            source = {"file": path.name, "bytes": path.stat().st_size, "documents": 0, "rejected": 0}
            self.sources.append(source)
            for chunk in read_chunks(path):
                lines += len(chunk.lines)
                yield from self._texts(path, chunk, source)
                if self.on_progress is not None:
                    self.on_progress(before + chunk.input_bytes)
            before += source["bytes"]
        count = sum(self.rejected.values())
        if count > self.max_bad_fraction * lines:
            raise DataError(*self.bad_lines, bad_lines_fault(self.rejected, lines, self.max_bad_fraction))

    def _texts(self, path: Path, chunk: Chunk, source: dict[str, Any]) -> Iterable[str]:
        after = chunk.first_byte
        for number, line in enumerate(chunk.lines, chunk.first_line):
            place, after = after, after + len(line)
            text = parse_line(line, self.text_key)
            if isinstance(text, str):
                source["documents"] += 1
                yield text
            elif text is not None:
                source["rejected"] += 1
                self.rejected[text.reason] += 1
                if len(self.bad_lines) < 5:
                    self.bad_lines.append(f"{path}:{number}:{place}: {text.reason}; every line must be an object "
                                          f"with a text under '{self.text_key}'; repair or remove it")


def bad_lines_fault(rejected: Counter[str], lines: int, max_bad_fraction: float) -> str:
    """Say how many lines are bad, of which kinds, and what can be done."""
    kinds = ", ".join(f"{count:,} x {reason}" for reason, count in rejected.most_common())
    count = sum(rejected.values())
    return (f"--input: {count:,} of {lines:,} lines are no documents ({kinds}); at most "
            f"{100 * max_bad_fraction:g} % may be; repair them, or allow more with --max-bad-fraction")
