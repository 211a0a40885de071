"""Make documents of records: find the text, keep all else as meta, and say why something is no document."""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from megatron_ttl.data.corpus.document import Document
from megatron_ttl.data.corpus.settings import SourceSettings
from megatron_ttl.data.documents import BadLine, parse_record, text_of

_DEEPEST = 64  # levels of meta: what is deeper is no description of a document
_HALVES = re.compile("[\ud800-\udfff]")
_SHOWN_BYTES = 10_000  # of a row that is no document


class Row(NamedTuple):
    """One line or row of an input, as it was read."""

    file: str
    """Input file, as the corpus file names it."""
    position: int
    """Line or row, from 1."""
    byte: int | None
    """Where it begins in the unpacked file; None where the format has no such place."""
    payload: bytes | dict[str, Any] | BadLine
    """A line of JSON, a text, a record, or why there is none."""


def to_document(row: Row, source: SourceSettings, is_text: bool) -> Document | BadLine | None:
    """Return the document of a row, why it is none, or None for a blank line.

    Args:
        row: what was read.
        source: where the text stands in a record.
        is_text: whether bytes are a text, and not a JSON object.
    """
    record: dict[str, Any] | BadLine | None
    if isinstance(row.payload, bytes):
        record = _text_record(row.payload, source) if is_text else parse_record(row.payload, source.text_keys)
    else:
        record = row.payload
    if not isinstance(record, dict):
        return record
    text = joined_text(record, source.join_keys) if source.join_keys else text_of(record, source.text_key)
    if isinstance(text, BadLine):
        return text
    left_out = {*source.text_keys, source.license_key}
    try:
        meta = {_plain(key, 0): _plain(value, 0) for key, value in record.items() if key not in left_out}
    except RecursionError:
        return BadLine(f"nested more than {_DEEPEST} deep")
    licence = record.get(source.license_key) if source.license_key else None
    if not isinstance(licence, str) or not licence.strip():
        licence = source.license
    return Document(text, source.name, _plain(licence, 0), row.file, row.position, meta)


def joined_text(record: Mapping[str, Any], keys: tuple[str, ...]) -> str | BadLine:
    """Return the turns under `keys`, joined by an empty line; a turn may be empty or null, all may not.

    A turn may be a list of turns: texts, or objects with a text under `content` or `value`.

    Source: the instruction part of the TeenyTinyLlama corpus joins turns the same way.
    """
    turns: list[str] = []
    for key in keys:
        if key not in record:
            return BadLine(f"no key '{key}'")
        for turn in record[key] if isinstance(record[key], list) else [record[key]]:
            if isinstance(turn, dict):
                turn = turn.get("content", turn.get("value"))
            if turn is None or turn == "" or (isinstance(turn, str) and turn.isspace()):
                continue
            text = text_of({key: turn}, key)
            if isinstance(text, BadLine):
                return BadLine(f"{text.reason} under '{key}'")
            turns.append(text)
    return "\n\n".join(turns) if turns else BadLine("the text is empty")


def shown(row: Row) -> dict[str, Any]:
    """Return what identifies a row that is no document: place, size, and its beginning."""
    if isinstance(row.payload, bytes):
        raw, size = row.payload[:_SHOWN_BYTES].decode("utf-8", "replace").rstrip("\r\n"), len(row.payload)
    else:
        raw, size = ("" if isinstance(row.payload, BadLine) else str(_plain(str(row.payload)[:_SHOWN_BYTES], 0))), None
    return {"file": row.file, "line": row.position, "byte": row.byte, "bytes": size, "raw": raw}


def _text_record(payload: bytes, source: SourceSettings) -> dict[str, Any] | BadLine | None:
    if not payload or payload.isspace():
        return None
    try:
        return {source.text_key: payload.removeprefix(b"\xef\xbb\xbf").decode("utf-8").strip("\r\n")}
    except UnicodeDecodeError:
        return BadLine("invalid UTF-8")


def _plain(value: Any, depth: int) -> Any:
    """Return a value as strict JSON and UTF-8 can hold it.

    NaN and infinity become null, half characters become U+FFFD, dates ISO 8601; of bytes only their number is kept.
    """
    if depth > _DEEPEST:
        raise RecursionError
    if isinstance(value, str):
        return value if value.isascii() else _HALVES.sub("\ufffd", value)
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {_plain(str(key), depth): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, depth + 1) for item in value]
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    return value.isoformat() if isinstance(value, datetime.date | datetime.time) else str(value)
