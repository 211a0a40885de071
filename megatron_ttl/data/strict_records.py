"""Read small, curated files in which every line must be right: labelled texts, texts to compare tokenizers on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_ttl.data.documents import LONGEST_LINE, input_faults, parse_line, read_chunks
from megatron_ttl.errors import DataError, raise_faults
from megatron_ttl.files import read_regular

_MOST_FAULTS = 100  # a screen shows 40
_UTF8_BOM = "\ufeff"


class StrictRecord(NamedTuple):
    """One line."""

    where: str
    """`<file>:<line>`."""
    text: str
    """What stands under the key of the text."""
    fields: dict[str, Any]
    """The whole object."""


def read_records(paths: Sequence[str | os.PathLike[str]], text_key: str,
                 on_progress: Callable[[float], None] | None = None) -> Iterator[StrictRecord]:
    """Yield the records of files of documents.

    Args:
        paths: as `data.documents` reads them.
        text_key: key of the text in each object.
        on_progress: told how many (packed) bytes have been read.

    Raises:
        DataError: (while iterating) a file cannot be read; at the end, if lines are no documents, for the first of them.
    """
    faults: list[str] = []
    before = 0
    for path in map(Path, paths):
        for chunk in read_chunks(path):
            for number, line in enumerate(chunk.lines, chunk.first_line):
                text = parse_line(line, text_key)
                if isinstance(text, str):
                    yield StrictRecord(f"{path}:{number}", text, json.loads(line.decode("utf-8-sig")))
                elif text is not None and len(faults) < _MOST_FAULTS:
                    faults.append(f"{path}:{number}: {text.reason}; every line must be an object with a text under "
                                  f"'{text_key}'; repair or remove it")
            if on_progress is not None:
                on_progress(before + chunk.input_bytes)
        before += path.stat().st_size
    raise_faults(DataError, faults)


def read_sourced_texts(paths: Sequence[str | os.PathLike[str]], text_key: str = "text", source_key: str = "source",
                       on_progress: Callable[[float], None] | None = None) -> Iterator[tuple[str, str]]:
    """Yield (source, text) of plain text files and files of documents.

    A `.txt` file is one text, with its line ends, and its name without the suffix is the source; a document names its
    source under `source_key`, or has the file's.

    Raises:
        DataError: a path is wrong (all of them, before anything is read), or a file is not what it must be.
    """
    plain = [path for path in map(Path, paths) if path.suffix.lower() == ".txt"]
    documents = [path for path in map(Path, paths) if path.suffix.lower() != ".txt"]
    faults = [f"{path}: is no file; it must be a file of text; correct the path" for path in plain if not path.is_file()]
    raise_faults(DataError, faults + (input_faults(documents) if documents else []))
    before = 0

    def report(done: float) -> None:
        if on_progress is not None:
            on_progress(before + done)

    for path in map(Path, paths):
        if path in plain:
            yield path.stem, _read_text(path)
        else:
            for record in read_records([path], text_key, report):
                source = record.fields.get(source_key)
                yield source if isinstance(source, str) and source else path.name.split(".")[0], record.text
        before += path.stat().st_size
        report(0)


def _read_text(path: Path) -> str:
    try:
        return read_regular(path, LONGEST_LINE).decode("utf-8").removeprefix(_UTF8_BOM)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start:,} is no UTF-8; text must be; convert it") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); a plain text must be a file of at most "
                        f"{LONGEST_LINE >> 20} MiB; correct the path, or make it .jsonl") from None
