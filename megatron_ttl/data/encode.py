"""Encode chunks of lines in worker processes, in the order of the input."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import xxhash

from megatron_ttl.data.documents import BadLine, Chunk, parse_line, read_chunks
from megatron_ttl.data.processes import in_processes
from megatron_ttl.tokenizer.tokenizer import Tokenizer

_SHOWN_BYTES = 10_000  # of a bad line; the whole line stands in the input


@dataclass(frozen=True)
class EncodeSettings:
    """How documents become tokens; what a worker needs to know."""

    tokenizer: str
    """Tokenizer folder."""
    text_key: str = "text"
    """Key of the text in each object."""
    bos: bool = True
    """Whether every document begins with BOS."""
    held_out_fraction: float = 0.01
    """Share of the documents that training never sees."""
    held_out_seed: int = 0
    """Seed of that choice."""


class Encoded(NamedTuple):
    """Documents of one chunk that lie on the same side of the split."""

    ids: np.ndarray
    """All ids, BOS and EOS included.  # [sum(lengths)]"""
    lengths: list[int]
    """Ids of each document."""
    text_bytes: int
    """UTF-8 bytes of their texts."""


class Outcome(NamedTuple):
    """What became of the lines of one chunk."""

    train: Encoded
    held_out: Encoded
    bad_lines: list[dict[str, Any]]
    """Entries of the quarantine file, but for the name of the file."""
    blank_lines: int


def is_held_out(text: bytes, fraction: float, seed: int) -> bool:
    """Say on which side of the split a document lies: a keyed hash of its UTF-8 text, and nothing else.

    Copies of a document fall on the same side, and adding or reordering files moves nothing.
    """
    # The prefix keeps the choice independent of the one that samples documents for the tokenizer.
    return xxhash.xxh3_64_intdigest(b"held out:" + text, seed) < fraction * 2.0**64


def encode_chunk(tokenizer: Tokenizer, settings: EncodeSettings, chunk: Chunk) -> Outcome:
    """Parse, split and encode the lines of one chunk."""
    sides: tuple[list[str], list[str]] = ([], [])
    text_bytes = [0, 0]
    bad_lines: list[dict[str, Any]] = []
    blank_lines, place = 0, chunk.first_byte
    for number, line in enumerate(chunk.lines, chunk.first_line):
        text = parse_line(line, settings.text_key)
        if isinstance(text, str):
            payload = text.encode("utf-8")
            side = is_held_out(payload, settings.held_out_fraction, settings.held_out_seed)
            sides[side].append(text)
            text_bytes[side] += len(payload)
        elif isinstance(text, BadLine):
            shown = line[:_SHOWN_BYTES].decode("utf-8", "replace").rstrip("\r\n")
            bad_lines.append({"line": number, "byte": place, "bytes": len(line), "reason": text.reason,
                              "raw": shown})
        else:
            blank_lines += 1
        place += len(line)
    train, held_out = (_encode_side(tokenizer, texts, size, settings.bos)
                       for texts, size in zip(sides, text_bytes, strict=True))
    return Outcome(train, held_out, bad_lines, blank_lines)


def _encode_side(tokenizer: Tokenizer, texts: list[str], text_bytes: int, bos: bool) -> Encoded:
    head = [tokenizer.bos_id] if bos else []
    documents = [
        np.array([*head, *ids, tokenizer.eos_id], dtype=np.int32) for ids in tokenizer.encode_batch(texts)
    ]
    ids = np.concatenate(documents) if documents else np.empty(0, np.int32)
    return Encoded(ids, [len(document) for document in documents], text_bytes)


def encode_files(
    inputs: Sequence[str | os.PathLike[str]], tokenizer: Tokenizer, settings: EncodeSettings, workers: int,
    chunk_bytes: int, on_progress: Callable[[float], None] | None = None,
    encode: Callable[[EncodeSettings, Chunk], Outcome] | None = None,
) -> Iterator[tuple[Chunk, Outcome]]:
    """Yield every chunk of the inputs with its outcome, in the order of the input.

    Args:
        workers: processes that encode; with 1 this process does it.
        on_progress: is given the bytes of input whose outcome is there.
        encode: what the workers run, instead of `encode_chunk`.

    Raises:
        DataError: a file cannot be read to its end, or a worker died.
    """
    before = 0
    chunks = (chunk for number, path in enumerate(inputs) for chunk in read_chunks(path, chunk_bytes, number))
    sizes = [os.path.getsize(path) for path in inputs]
    if workers == 1 and encode is None:
        results = ((chunk, encode_chunk(tokenizer, settings, chunk)) for chunk in chunks)
    else:
        results = in_processes(partial(encode or _encode_in_worker, settings), chunks, workers,
                               "a very long document needs about 50 bytes per character; use fewer --workers, or "
                               "split long documents")
    try:
        for chunk, outcome in results:
            yield chunk, outcome
            if on_progress is not None:
                before = sum(sizes[: chunk.file])
                on_progress(before + chunk.input_bytes)
    finally:
        results.close()


def _encode_in_worker(settings: EncodeSettings, chunk: Chunk) -> Outcome:
    return encode_chunk(_load_once(settings.tokenizer), settings, chunk)


@cache
def _load_once(directory: str) -> Tokenizer:
    return Tokenizer.load(directory)
