"""Read rows from files of every format, in blocks, from the beginning to the end, in bounded memory."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import Any, NamedTuple

from megatron_ttl.data.corpus.hub import dataset_rows
from megatron_ttl.data.corpus.inputs import Input
from megatron_ttl.data.corpus.records import Row
from megatron_ttl.data.corpus.settings import SourceSettings
from megatron_ttl.data.documents import LONGEST_LINE, BadLine, read_chunks
from megatron_ttl.errors import DataError

_BLOCK_BYTES = 1 << 20
_PARQUET_ROWS = 256  # at a time
_UTF8_BOM = "\ufeff"


class Block(NamedTuple):
    """Some rows that stand together."""

    rows: list[Row]
    input_bytes: float
    """How far the (packed) files have been read: for the progress."""


class Unit(NamedTuple):
    """The rows that one worker cleans at a time."""

    number: int
    """Place among the units of its input, from 0."""
    rows: list[Row]
    input_bytes: float


def read_units(wanted: Input, source: SourceSettings, unit_bytes: int) -> Iterator[Unit]:
    """Yield the rows of an input in units of about `unit_bytes`; where they begin depends on nothing else.

    Raises:
        DataError: a file cannot be read to its end.
    """
    rows: list[Row] = []
    number, size = 0, 0
    for block in read_blocks(wanted, source):
        for row in block.rows:
            rows.append(row)
            size += _size(row.payload)
            if size >= unit_bytes:
                yield Unit(number, rows, block.input_bytes)
                number, rows, size = number + 1, [], 0
    if rows:
        yield Unit(number, rows, wanted.size_bytes)


def read_blocks(wanted: Input, source: SourceSettings) -> Iterator[Block]:
    """Yield the rows of an input in blocks.

    Raises:
        DataError: a file cannot be read to its end, or has no column for the text.
    """
    if wanted.format == "dataset":
        yield from _dataset_blocks(wanted, source)
    elif wanted.format == "txt" and source.document == "file":
        yield from _whole_files(wanted)
    elif wanted.format == "txt" and source.document == "paragraph":
        yield from _paragraphs(wanted)
    elif wanted.format in ("jsonl", "txt"):
        yield from _lines(wanted)
    elif wanted.format == "parquet":
        yield from _parquet(wanted, source)
    else:
        yield from _csv(wanted, source, "\t" if wanted.format == "tsv" else ",")


def _size(payload: Any) -> int:
    if isinstance(payload, bytes):
        return len(payload)
    return sum(len(value) if isinstance(value, str) else 8 for value in payload.values()) if isinstance(payload, dict) else 1


def _lines(wanted: Input) -> Iterator[Block]:
    for chunk in read_chunks(wanted.name):
        rows, place = [], chunk.first_byte
        for number, line in enumerate(chunk.lines, chunk.first_line):
            rows.append(Row(wanted.name, number, place, line))
            place += len(line)
        yield Block(rows, chunk.input_bytes)


def _whole_files(wanted: Input) -> Iterator[Block]:
    done = 0
    for path in wanted.paths:
        pieces: list[bytes] = []
        done_here = 0
        for chunk in read_chunks(path):
            pieces += chunk.lines
            if chunk.first_byte > LONGEST_LINE:
                raise DataError(f"{path}: is longer than {LONGEST_LINE >> 20} MiB; a document must be shorter, a book has "
                                'one; split it, or set document = "paragraph"')
            done_here = chunk.input_bytes
        done += done_here
        yield Block([Row(path, 1, 0, b"".join(pieces))], done)


def _paragraphs(wanted: Input) -> Iterator[Block]:
    paragraph: list[bytes] = []
    began = (1, 0)
    for block in _lines(wanted):
        rows: list[Row] = []
        for row in block.rows:
            assert isinstance(row.payload, bytes) and row.byte is not None
            if row.payload.isspace():
                if paragraph:
                    rows.append(Row(wanted.name, *began, b"".join(paragraph)))
                paragraph = []
                continue
            if not paragraph:
                began = (row.position, row.byte)
            paragraph.append(row.payload)
            if row.byte - began[1] > LONGEST_LINE:
                raise DataError(f"{wanted.name}:{began[0]}: is a paragraph of more than {LONGEST_LINE >> 20} MiB; a "
                                'document must be shorter; split it, or set document = "line"')
        yield Block(rows, block.input_bytes)
    if paragraph:
        yield Block([Row(wanted.name, *began, b"".join(paragraph))], wanted.size_bytes)


class _CsvLines:
    """Lines of a file as texts, for the csv module; knows where it is."""

    def __init__(self, path: str) -> None:
        self.line = 0  # lines given out
        self.byte = 0  # where they end
        self.input_bytes = 0.0
        self.broken = False
        """Whether a line since this was last reset is not UTF-8."""
        self._lines = self._read(path)

    def _read(self, path: str) -> Iterator[bytes]:
        for chunk in read_chunks(path):
            self.input_bytes = chunk.input_bytes
            yield from chunk.lines

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.line += 1
        self.byte += len(line)
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError:
            self.broken, text = True, line.decode("utf-8", "replace")
        return text.removeprefix(_UTF8_BOM) if self.line == 1 else text


def _csv(wanted: Input, source: SourceSettings, delimiter: str) -> Iterator[Block]:
    csv.field_size_limit(LONGEST_LINE)
    lines = _CsvLines(wanted.name)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] = []
    rows: list[Row] = []
    size = 0
    while True:
        line, byte = lines.line + 1, lines.byte
        lines.broken = False
        payload: dict[str, Any] | BadLine
        try:
            values = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            if not header or "unexpected end" in str(error) or "field larger" in str(error):
                raise DataError(f"{wanted.name}:{line}: is no row ({error}); a quote that is opened must be closed, for "
                                "all that follows is lost; repair this line") from None
            values, payload = [], BadLine(f"broken row ({error})")
        else:
            if not header:
                header = _header(values, wanted, source)
                continue
            if not values:  # an empty line
                continue
            payload = dict(zip(header, values, strict=False))
            if lines.broken:
                payload = BadLine("invalid UTF-8")
            elif len(values) != len(header):
                payload = BadLine(f"{len(values)} fields instead of {len(header)}")
        rows.append(Row(wanted.name, line, byte, payload))
        size += lines.byte - byte
        if size >= _BLOCK_BYTES:
            yield Block(rows, lines.input_bytes)
            rows, size = [], 0
    yield Block(rows, lines.input_bytes)


def _header(names: list[str], wanted: Input, source: SourceSettings) -> list[str]:
    """Check the first row of a table."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{wanted.name}:1: names the column '{twice[0]}' twice; a name must stand for one column; "
                        "rename one")
    _require_columns(names, wanted, source)
    return names


def _require_columns(names: list[str], wanted: Input, source: SourceSettings) -> None:
    for key in source.text_keys:
        if key not in names:
            shown = ", ".join(f"'{name}'" for name in names[:20])
            raise DataError(f"{wanted.name}: has no column '{key}'; its columns are {shown}; set text_key or join_keys of "
                            f"source '{source.name}'")


def _parquet(wanted: Input, source: SourceSettings) -> Iterator[Block]:
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError:
        raise DataError("pyarrow is not installed; it is needed for .parquet files; "
                        "pip install 'megatron_ttl[corpus]'") from None
    position = 0
    try:
        # Pages are read as they are needed: a row group may be a gigabyte.
        with parquet.ParquetFile(wanted.name, pre_buffer=False, buffer_size=_BLOCK_BYTES) as file:
            _require_columns(file.schema_arrow.names, wanted, source)
            total = max(1, file.metadata.num_rows)
            for batch in file.iter_batches(_PARQUET_ROWS, use_threads=False):
                records = _records(batch)
                rows = [Row(wanted.name, position + number, None, record) for number, record in enumerate(records, 1)]
                position += len(rows)
                yield Block(rows, wanted.size_bytes * position / total)
    except (arrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{wanted.name}:{position + 1}: cannot be read ({reason}); it must be a whole Parquet file; copy or "
                        "write it again") from None


def _records(batch: Any) -> list[dict[str, Any] | BadLine]:
    """Return the rows of a batch; where one cannot be told in Python, the others still can."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError):  # invalid UTF-8 is a ValueError, a date of the year 20000 another
        if batch.num_rows == 1:
            return [BadLine("a value that cannot be read")]
        return [record for number in range(batch.num_rows) for record in _records(batch.slice(number, 1))]


def _dataset_blocks(wanted: Input, source: SourceSettings) -> Iterator[Block]:
    rows: list[Row] = []
    size = 0
    for position, record in enumerate(dataset_rows(source), 1):
        if position == 1:
            _require_columns(list(record), wanted, source)
        rows.append(Row(wanted.name, position, None, record))
        size += _size(record)
        if size >= _BLOCK_BYTES:
            yield Block(rows, 0)
            rows, size = [], 0
    yield Block(rows, wanted.size_bytes)
