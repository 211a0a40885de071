"""Turn TinyLlama's packed chunks (LITPKDS) into a dataset: documents found again, filler taken out and counted.

A chunk is one file, `<chain>_<number, 10 digits>.bin`, everything little-endian:

    offset   size  content
    0           7  b"LITPKDS"
    7           8  uint64 version, 1
    15          1  uint8 type of an id: 1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 8 uint16
    16          8  uint64 n, ids in the chunk
    24      n * i  ids; documents follow each other and go on in the next chunk of the chain

Nothing says where a document begins but its BOS, or the EOS of the one before. Every process of the preparation wrote a
chain of its own, and filled its last chunk up with the separator, up to two million BOS in a row, which a model then learnt.

Source: lit_gpt/packed_dataset.py of jzhang38/TinyLlama.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_ttl.data.index_file import DTYPE_CODES
from megatron_ttl.data.indexed_dataset import IndexedDatasetWriter, token_dtype
from megatron_ttl.data.manifest import Description, SourceRecord, dataset_paths
from megatron_ttl.data.tokenizer_copy import holds_tokenizer, place_tokenizer, text_bytes_of
from megatron_ttl.errors import ConfigError, DataError, raise_faults
from megatron_ttl.files import open_regular, or_disk_error
from megatron_ttl.tokenizer.tokenizer import Tokenizer

MAGIC = b"LITPKDS"
HEADER = struct.Struct("<7sQBQ")  # magic, version, type code, ids
_BLOCK = 1 << 20  # ids read at a time
_LONGEST_DOCUMENT = 1 << 26  # ids; a book has a million
_LLAMA_BOS, _LLAMA_EOS = 1, 2
_NAME = re.compile(r"(?P<chain>.*)_(?P<number>[0-9]{10})\.bin")
_DTYPES = {code: np.dtype(name).newbyteorder("<") for name, code in DTYPE_CODES.items()}
_CURE = "copy the file again, or leave its chain out"


@dataclass
class _Tally:
    """What was found in the chunks."""

    ids: int = 0
    text_ids: int = 0
    documents: int = 0
    filler: int = 0
    filler_runs: int = 0
    longest_filler: tuple[int, str] = (0, "")  # ids, file and place
    cut_documents: int = 0
    counts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


def import_litpkds(inputs: Sequence[str | os.PathLike[str]], prefix: str | os.PathLike[str],
                   tokenizer_folder: str | os.PathLike[str] | None = None, vocab_size: int | None = None, *,
                   filler_id: int | None = None, bos: bool = True, overwrite: bool = False,
                   on_progress: Callable[[float], None] | None = None) -> dict[str, Any]:
    """Write the documents of LITPKDS chunks as `[BOS] ids EOS` into the dataset `prefix`.

    A document is what lies between BOS and EOS, however many. Between two documents stand at most one EOS and one BOS;
    what is there more is filler: taken out, and counted. The last document of a chain may have been cut by the program
    that packed it; it is kept, and counted.

    Args:
        inputs: all chunks, of one chain or of several, in any order.
        prefix: path of the dataset without suffix.
        tokenizer_folder: the tokenizer that made the ids: the dataset gets a manifest.
        vocab_size: instead of a tokenizer: ids are below it, BOS is 1 and EOS 2 (Llama's); no manifest is written.
        filler_id: the id that chunks were filled up with, if it was neither BOS nor EOS.
        bos: whether every document begins with BOS.
        overwrite: replace a dataset that is there.
        on_progress: is given the bytes that were read.

    Returns:
        Counts, flat: ids = text_ids + separators + filler.

    Raises:
        ConfigError: not exactly one of tokenizer and vocabulary is given.
        DataError: a chunk is missing, damaged, cut, or holds ids that the tokenizer has not; nothing is written.
        DiskError: the disk is full.
    """
    if (tokenizer_folder is None) == (vocab_size is None):
        raise ConfigError("--tokenizer: must be given, or --vocab-size without it; the one makes a dataset to train on, the "
                          "other one without a manifest; give one of them")
    tokenizer = Tokenizer.load(tokenizer_folder) if tokenizer_folder is not None else None
    size = tokenizer.vocab_size if tokenizer else int(vocab_size or 0)
    if not _LLAMA_EOS < size <= 2**31 - 1:
        raise ConfigError(f"--vocab-size: is {size}; it must be from 3 to 2^31 - 1; Llama 2 has 32000")
    bos_id, eos_id = (tokenizer.bos_id, tokenizer.eos_id) if tokenizer else (_LLAMA_BOS, _LLAMA_EOS)
    chains, copy = _chains(inputs), dataset_paths(prefix).tokenizer
    if copy.exists() and not holds_tokenizer(copy, tokenizer) and not overwrite:
        raise DataError(f"{copy}: exists already; a tokenizer is not overwritten unasked; choose another prefix, or give "
                        "--overwrite")
    tally, sources = _Tally(), []
    with IndexedDatasetWriter(prefix, token_dtype(size), size, eos_id, overwrite) as writer:
        for name, chain in chains.items():
            before = tally.documents
            documents = _Documents(chain, size, (bos_id, eos_id), filler_id, tally, on_progress)
            for ids in documents:
                writer.add_document(np.concatenate(([bos_id] if bos else [], ids, [eos_id])).astype(np.int64))
            sources.append(SourceRecord(file=Path(name).name, documents=tally.documents - before))
        if not tally.documents:
            raise DataError("--input: holds nothing but separators; there must be a document; give other chunks")
        description = None
        if tokenizer is not None:
            with or_disk_error(copy):
                record = place_tokenizer(tokenizer, copy)
            description = Description(text_bytes=text_bytes_of(tokenizer, tally.counts), bos=bos, tokenizer=record,
                                      sources=tuple(sources))
        writer.finish(description)
        assert writer.token_count == tally.text_ids + (1 + bos) * tally.documents
    return {
        "dataset": os.fspath(prefix), "chunks": sum(map(len, chains.values())), "chains": len(chains), "ids": tally.ids,
        "text_ids": tally.text_ids, "separators": tally.ids - tally.text_ids - tally.filler, "filler": tally.filler,
        "filler_runs": tally.filler_runs, "longest_filler": tally.longest_filler[0],
        "longest_filler_at": tally.longest_filler[1] or None, "documents": tally.documents,
        "cut_documents": tally.cut_documents, "tokens": writer.token_count,
    }


def _chains(inputs: Sequence[str | os.PathLike[str]]) -> dict[str, list[Path]]:
    """Return the chunks of each chain in their order, and refuse chains with a gap."""
    chains: dict[str, dict[int, Path]] = {}
    faults = [] if inputs else ["--input: is empty; it must name at least one chunk; give .bin files"]
    for path in sorted(map(Path, inputs)):
        match = _NAME.fullmatch(str(path))
        if match is None:
            faults.append(f"{path}: is not named like a chunk; it must end in _ and ten digits and .bin, for they order the "
                          "chunks; give it the name it had")
        elif chains.setdefault(match["chain"], {}).setdefault(int(match["number"]), path) is not path:
            faults.append(f"{path}: is given twice; every chunk is read once; leave one out")
    for name, chunks in chains.items():
        missing = next(number for number in range(len(chunks) + 1) if number not in chunks)
        if missing < len(chunks):
            faults.append(f"{name}: has {len(chunks)} chunks and not number {missing}; documents go on from one chunk to "
                          "the next, so all must be there; give the missing ones")
    raise_faults(DataError, faults)
    return {name: list(chunks.values()) for name, chunks in chains.items()}


class _Documents:
    """The documents of a chain, each without BOS and EOS; what is found on the way is tallied."""

    def __init__(self, chain: list[Path], vocab_size: int, ends: tuple[int, int], filler_id: int | None, tally: _Tally,
                 on_progress: Callable[[float], None] | None) -> None:
        self._chain = chain
        self._vocab_size = vocab_size
        self._ends = ends  # BOS and EOS
        self._separators = [*ends] if filler_id is None else [*ends, filler_id]
        self._tally = tally
        self._on_progress = on_progress
        self._parts: list[np.ndarray] = []  # of the document that is being read
        self._kinds: set[int] = set()  # of the separators since the last document
        self._run = (0, "")  # how many these are, and where they begin

    def __iter__(self) -> Iterator[np.ndarray]:
        for path in self._chain:
            for start, block in self._blocks(path):
                self._count(block)
                is_separator = np.isin(block, self._separators)
                changes = np.flatnonzero(is_separator[1:] != is_separator[:-1]) + 1
                for begin, end in zip([0, *changes.tolist()], [*changes.tolist(), len(block)], strict=True):
                    if not is_separator[begin]:
                        self._end_run()
                        self._add(path, block[begin:end])
                        continue
                    if self._parts:
                        yield self._document()
                    length, place = self._run
                    self._run = (length + end - begin, place or f"{path}, id {start + begin:,}")
                    self._kinds.update(np.unique(block[begin:end]).tolist())
        self._end_run()
        if self._parts:
            self._tally.cut_documents += 1
            yield self._document()

    def _add(self, path: Path, ids: np.ndarray) -> None:
        self._parts.append(ids)
        if sum(map(len, self._parts)) > _LONGEST_DOCUMENT:
            raise DataError(f"{path}: has more than {_LONGEST_DOCUMENT:,} ids without BOS and EOS {self._ends}; every "
                            "document must have one of them; check the tokenizer")

    def _document(self) -> np.ndarray:
        ids = np.concatenate(self._parts)
        self._parts = []
        self._tally.documents += 1
        self._tally.text_ids += len(ids)
        return ids

    def _end_run(self) -> None:
        length, place = self._run
        filler = length - len(self._kinds.intersection(self._ends))
        if filler > 0:
            self._tally.filler += filler
            self._tally.filler_runs += 1
            self._tally.longest_filler = max(self._tally.longest_filler, (filler, place), key=lambda run: run[0])
        self._run, self._kinds = (0, ""), set()

    def _count(self, block: np.ndarray) -> None:
        counts, found = self._tally.counts, np.bincount(block, minlength=self._vocab_size)
        self._tally.counts = found if not len(counts) else counts + found
        self._tally.ids += len(block)

    def _blocks(self, path: Path) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the ids of a chunk, and the place of the first one, block by block; each in the vocabulary."""
        before = self._tally.ids
        try:
            with os.fdopen(open_regular(path), "rb") as handle:
                dtype, count = _read_header(path, handle)
                for start in range(0, count, _BLOCK):
                    block = np.fromfile(handle, dtype, min(_BLOCK, count - start))
                    wrong = np.flatnonzero((block < 0) | (block >= self._vocab_size))
                    if len(wrong):
                        raise DataError(f"{path}: holds id {block[wrong[0]]} (id {start + wrong[0]:,} of the chunk); ids "
                                        f"must be in [0, {self._vocab_size}); check the tokenizer, or {_CURE}")
                    yield start, block
                    if self._on_progress:
                        self._on_progress((before + start + len(block)) * dtype.itemsize)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); it must be; {_CURE}") from None


def _read_header(path: Path, handle: BinaryIO) -> tuple[np.dtype, int]:
    size, head = os.fstat(handle.fileno()).st_size, handle.read(HEADER.size)
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise DataError(f"{path}: begins with {head[:7]!r}; a chunk begins with {MAGIC!r} and a header of {HEADER.size} "
                        f"bytes; {_CURE}")
    _, version, code, count = HEADER.unpack(head)
    faults = [] if version == 1 else [f"{path}: has version {version}; only version 1 is known; {_CURE}"]
    if code not in _DTYPES:
        faults.append(f"{path}: its type code {code} is no integer's; ids must be integers ({sorted(_DTYPES)}); {_CURE}")
    elif size != HEADER.size + count * _DTYPES[code].itemsize:
        faults.append(f"{path}: has {size:,} bytes; its header counts {count:,} ids, "
                      f"{HEADER.size + count * _DTYPES[code].itemsize:,} bytes; {_CURE}")
    raise_faults(DataError, faults)
    return _DTYPES[code], count
