"""Clean shards: packed files with one document per line, its provenance and notes beside the text."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from typing import Any

from megatron_ttl.data.corpus.document import Document, Dropped
from megatron_ttl.data.zstd_file import zstd_lines, zstd_writer
from megatron_ttl.errors import DataError
from megatron_ttl.files import atomic_write


def to_record(document: Document) -> dict[str, Any]:
    """Return what a line of a shard holds, in its order."""
    return {"text": document.text, "id": document.id, "source": document.source, "license": document.license,
            "file": document.file, "position": document.position, "hash": document.hash,
            "meta": dict(document.meta), "notes": dict(document.notes)}


def from_record(record: dict[str, Any]) -> Document:
    """Return the document of a line's object."""
    return Document(record["text"], record["source"], record["license"], record["file"], record["position"],
                    record["meta"], record["notes"])


def dropped_record(document: Document, dropped: Dropped) -> dict[str, Any]:
    """Return what a list of dropped documents holds: why, then the document."""
    return {"rule": dropped.rule, "value": dropped.value, "limit": dropped.limit, **to_record(document)}


def to_line(record: dict[str, Any]) -> bytes:
    """Return one object as a line of UTF-8."""
    return json.dumps(record, ensure_ascii=False).encode("utf-8") + b"\n"


def write_lines(path: str | os.PathLike[str], lines: Iterable[bytes]) -> None:
    """Write packed lines atomically.

    Raises:
        OSError: what the disk said.
    """
    with atomic_write(path) as handle, zstd_writer(handle) as packed:
        for line in lines:
            packed.write(line)


def write_shard(path: str | os.PathLike[str], documents: Iterable[Document]) -> None:
    """Write documents as a shard, atomically.

    Raises:
        OSError: what the disk said.
    """
    write_lines(path, (to_line(to_record(document)) for document in documents))


def read_shard(path: str | os.PathLike[str]) -> Iterator[Document]:
    """Yield the documents of a shard.

    Raises:
        DataError: it cannot be read to its end, or a line of it is no document.
    """
    number = 0
    try:
        for number, line in enumerate(zstd_lines(path), 1):
            yield from_record(json.loads(line))
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}:{number}: is no document of a clean shard ({type(error).__name__}: {error}); it must be as "
                        "it was written; remove the shard and prepare it again") from None
