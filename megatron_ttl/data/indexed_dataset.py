"""Write and read tokenised documents in Megatron's format: `.bin` and `.idx`, with a manifest beside.

`<prefix>.bin` holds nothing but ids, document after document; `<prefix>.idx` says where each one begins (its
layout is drawn in `index_file.py`). We write one sequence per document; the reader takes several, as Megatron
makes them with `--split-sentences`.

Source: megatron/core/datasets/indexed_dataset.py of megatron-core 0.16.1; the tests compare byte for byte.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Literal

import numpy as np
import xxhash

from megatron_ttl.data.index_file import LONGEST_SEQUENCE, IndexFile, index_blocks
from megatron_ttl.data.manifest import (
    DatasetManifest,
    Description,
    FileRecord,
    dataset_paths,
    dump_manifest,
    read_manifest,
    require_files,
)
from megatron_ttl.data.token_file import TokenFile
from megatron_ttl.errors import DataError, DiskError, raise_faults
from megatron_ttl.files import fsync_directory, open_own

CHECKED_AT_OPEN = 256 << 20
"""Bytes; a `.bin` of at most so many is compared with its checksum whenever it is opened: a tenth of a second."""


def token_dtype(vocab_size: int) -> Literal["uint16", "int32"]:
    """Choose the type of an id as Megatron does: uint16 below 65,500 entries, else int32.

    Source: DType.optimal_dtype in megatron/core/datasets/indexed_dataset.py.
    """
    return "uint16" if vocab_size < 65_500 else "int32"


class IndexedDatasetWriter:
    """Write documents one after another; `finish` puts all files in place, else nothing is left behind.

    Ids are streamed to the disk; in memory are four bytes per document. Use it as a context manager:
    leaving it without `finish` removes the unfinished files.

    Args:
        prefix: path without suffix.
        dtype: "uint16" or "int32", see `token_dtype`.
        vocab_size: every id must be in [0, vocab_size).
        eos_id: every document must end with it and hold it nowhere else.
        overwrite: replace a dataset that is there; it stays readable until `finish`.

    Raises:
        DataError: the prefix is taken, cannot be written, or another process is writing it.
    """

    def __init__(self, prefix: str | os.PathLike[str], dtype: str, vocab_size: int, eos_id: int,
                 overwrite: bool = False) -> None:
        assert dtype in ("uint16", "int32"), dtype
        assert 0 <= eos_id < vocab_size <= np.iinfo(dtype).max + 1, (eos_id, vocab_size, dtype)
        self.prefix = os.fspath(prefix)
        self.paths = dataset_paths(prefix)
        self.vocab_size = vocab_size
        self.eos_id = eos_id
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.document_count = 0
        self.token_count = 0
        self._overwrite = overwrite
        self._lengths = array("i")
        assert self._lengths.itemsize == 4
        self._digest = xxhash.xxh3_128()
        self._temporaries = {path: path.with_name(f".{path.name}.partial") for path in self.paths[:3]}
        self._refuse_existing()
        self._bin = self._open_bin()

    def _refuse_existing(self) -> None:
        taken = [path for path in self.paths[:3] if path.exists()]
        if taken and not self._overwrite:
            raise DataError(*(
                f"{path}: exists already; a dataset is not overwritten unasked; "
                "choose another prefix, or ask for overwriting" for path in taken
            ))

    def _open_bin(self) -> BinaryIO:
        # The partial file has a fixed name and is locked: what a killed process left is taken over, and two
        # live processes never write the same dataset.
        path = self._temporaries[self.paths.bin]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = open_own(path, "ab", 1 << 20)
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error.strerror}); its folder must be writable; "
                            "choose another prefix") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.close()
            raise DataError(f"{self.prefix}: another process is writing this dataset; only one may; "
                            "wait for it, or choose another prefix") from None
        except OSError:
            pass  # a file system without locks: go on without
        handle.truncate(0)
        return handle

    def add_document(self, ids: np.ndarray | Sequence[int]) -> None:
        """Append one document, its EOS included.

        Raises:
            DataError: an id is out of range, or EOS is not exactly once, at the end; it is not written.
            DiskError: the disk is full.
        """
        ids = np.asarray(ids)
        self.add_documents(ids, [ids.size])

    def add_documents(self, ids: np.ndarray, lengths: np.ndarray | Sequence[int]) -> None:
        """Append several documents at once.

        Args:
            ids: all their ids, one document after the other.  # [sum(lengths)]
            lengths: ids of each document.

        Raises:
            DataError: as `add_document`, with the number of the first wrong document; none is written.
            DiskError: the disk is full.
        """
        ids, lengths = np.asarray(ids), np.asarray(lengths, dtype=np.int64)
        assert ids.ndim == 1 and int(lengths.sum()) == ids.size, "lengths must add up to the ids"
        raise_faults(DataError, self._faults_of(ids, lengths))
        payload = np.ascontiguousarray(ids, dtype=self.dtype)
        with self._disk_faults():
            self._bin.write(payload.data)
        self._digest.update(payload.data)
        self._lengths.frombytes(lengths.astype(np.int32).tobytes())
        self.document_count += len(lengths)
        self.token_count += ids.size

    def _faults_of(self, ids: np.ndarray, lengths: np.ndarray) -> list[str]:
        if not len(lengths):
            return []
        if lengths.max() > LONGEST_SEQUENCE:
            number = int(lengths.argmax())
            return [self._fault(number, f"has {lengths[number]:,} tokens; a sequence has at most "
                                        f"{LONGEST_SEQUENCE:,}; split the document")]
        if lengths.min() <= 0:
            number = int(lengths.argmin())
            return [self._fault(number, "has no tokens; it must have at least its EOS; leave it out")]
        if ids.dtype.kind not in "iu":
            return [self._fault(0, f"has ids of type {ids.dtype}; they must be integers in "
                                   f"[0, {self.vocab_size}); pass what the tokenizer returned")]
        ends = np.cumsum(lengths)
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            place = int(np.flatnonzero((ids < 0) | (ids >= self.vocab_size))[0])
            number = int(np.searchsorted(ends, place, side="right"))
            return [self._fault(number, f"holds id {ids[place]}; ids must be in [0, {self.vocab_size}); "
                                        "use the tokenizer that this dataset is declared for")]
        is_eos = ids == self.eos_id
        if np.count_nonzero(is_eos) != len(ends) or not is_eos[ends - 1].all():
            counts = np.add.reduceat(is_eos, ends - lengths, dtype=np.int64)
            number = int(np.flatnonzero((counts != 1) | ~is_eos[ends - 1])[0])
            last = ids[ends[number] - 1]
            return [self._fault(number, f"holds EOS (id {self.eos_id}) {counts[number]} times and ends with "
                                        f"id {last}; EOS must be there exactly once, last; encode the text "
                                        "without special tokens and append one EOS")]
        return []

    def _fault(self, number: int, text: str) -> str:
        return f"{self.prefix}: document {self.document_count + number} {text}"

    def finish(self, description: Description | None = None) -> DatasetManifest | None:
        """Put the dataset in place: `.bin`, `.idx`, then the manifest, each complete when its name appears.

        Args:
            description: what the manifest says beyond the files; absent: no manifest is written.

        Returns:
            The manifest, if there is one. Its `documents` may be 0: an empty dataset is written too.

        Raises:
            DiskError: the disk is full; nothing of the new dataset is left, what was there is untouched.
        """
        assert not self._bin.closed, "finish or abort was called before"
        manifest = None
        try:
            with self._disk_faults():
                self._bin.flush()
                os.fsync(self._bin.fileno())
                index_record = self._write_index(self._temporaries[self.paths.idx])
                if description is not None:
                    manifest = self._manifest(description, index_record)
                    with _new_file(self._temporaries[self.paths.manifest]) as handle:
                        handle.write(dump_manifest(manifest).encode())
                        handle.flush()
                        os.fsync(handle.fileno())
            self._refuse_existing()
            self._put_in_place(with_manifest=manifest is not None)
        except BaseException:
            self.abort()
            raise
        self._bin.close()
        return manifest

    def _put_in_place(self, with_manifest: bool) -> None:
        folder = self.paths.bin.parent
        # The old index goes first, so that it never stands beside new ids.
        for path in (self.paths.manifest, self.paths.idx):
            path.unlink(missing_ok=True)
        fsync_directory(folder)
        for path in self.paths[:3] if with_manifest else self.paths[:2]:
            os.replace(self._temporaries[path], path)
            fsync_directory(folder)

    def _manifest(self, description: Description, index_record: FileRecord) -> DatasetManifest:
        tokenizer = description.tokenizer
        assert (tokenizer.vocab_size, tokenizer.eos_id) == (self.vocab_size, self.eos_id), "another tokenizer"
        bin_record = FileRecord(bytes=self.token_count * self.dtype.itemsize,
                                checksum=f"xxh3:{self._digest.hexdigest()}")
        return DatasetManifest(
            dtype=self.dtype.name, documents=self.document_count, tokens=self.token_count, bin=bin_record,
            idx=index_record, **{name: getattr(description, name) for name in Description.model_fields},
        )

    def _write_index(self, path: Path) -> FileRecord:
        digest, size = xxhash.xxh3_128(), 0
        with _new_file(path) as handle:
            for block in index_blocks(np.frombuffer(self._lengths, dtype=np.int32), self.dtype):
                handle.write(block)
                digest.update(block)
                size += len(block)
            handle.flush()
            os.fsync(handle.fileno())
        return FileRecord(bytes=size, checksum=f"xxh3:{digest.hexdigest()}")

    def abort(self) -> None:
        """Remove the unfinished files; a dataset that was there before stays. May be called twice."""
        for path in self._temporaries.values():
            path.unlink(missing_ok=True)
        try:
            self._bin.close()
        except OSError:
            pass  # what a full disk refused to take is thrown away anyhow

    def __enter__(self) -> IndexedDatasetWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if not self._bin.closed:
            self.abort()

    @contextmanager
    def _disk_faults(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise DiskError(f"{self.prefix}: the disk took no more after {self.token_count:,} tokens "
                            f"({error.strerror}); it must hold the whole dataset; free some space or choose "
                            "another folder") from None


def _new_file(path: Path) -> BinaryIO:
    """Open a file that is not there yet; what a killed process left under its name is removed, and no link followed."""
    path.unlink(missing_ok=True)
    return open(path, "xb", buffering=1 << 20)


class IndexedDataset:
    """Tokenised documents on the disk, checked before they are trusted.

    Args:
        prefix: path without suffix.
        verify: compare the checksum of the `.bin` with the manifest's, seconds per 10 GB; absent: of a `.bin` of at most
            `CHECKED_AT_OPEN` bytes.

    Attributes:
        ids: every id of every document, flat; `ids[a:b]` reads them by position, safe from a file that changes meanwhile.
        manifest: None for a dataset that another program wrote.
        verified: whether every byte was compared with a checksum of the manifest.

    Raises:
        DataError: a file is missing, damaged, cut short or does not belong to the others.
    """

    def __init__(self, prefix: str | os.PathLike[str], verify: bool | None = None) -> None:
        self.prefix = os.fspath(prefix)
        self.paths = dataset_paths(prefix)
        require_files(prefix)
        self._index = IndexFile(self.paths.idx)
        self.manifest = read_manifest(self.paths.manifest) if self.paths.manifest.exists() else None
        self.dtype = self._index.dtype
        self.token_count = self._index.token_count
        self.sequence_count = len(self._index.lengths)
        self.document_count = len(self._index.boundaries) - 1
        try:
            self.ids = TokenFile(self.paths.bin, self.dtype, self.token_count)
        except OSError as error:
            raise DataError(f"{self.paths.bin}: cannot be read ({error.strerror}); it must be; copy it again, or change "
                            "its permissions") from None
        bin_bytes = self.ids.size_bytes
        raise_faults(DataError, [*self._bin_size_faults(bin_bytes), *self._manifest_faults(bin_bytes)])
        self.verified = False
        if verify or (verify is None and bin_bytes <= CHECKED_AT_OPEN):
            raise_faults(DataError, self.checksum_faults())
            self.verified = self.manifest is not None

    def _bin_size_faults(self, bin_bytes: int) -> list[str]:
        wanted = self.token_count * self.dtype.itemsize
        if bin_bytes == wanted:
            return []
        where = (f"ends {wanted - bin_bytes:,} bytes early" if bin_bytes < wanted
                 else f"has {bin_bytes - wanted:,} bytes too many")
        return [f"{self.paths.bin}: {where}; its index {self.paths.idx.name} counts {self.token_count:,} "
                f"tokens, {wanted:,} bytes; copy both files again, or write the dataset again"]

    def _manifest_faults(self, bin_bytes: int) -> list[str]:
        if self.manifest is None:
            return []
        manifest = self.manifest
        pairs = [
            (self.paths.bin, "bytes", bin_bytes, manifest.bin.bytes),
            (self.paths.idx, "bytes", self._index.size_bytes, manifest.idx.bytes),
            (self.paths.idx, "documents", self.document_count, manifest.documents),
            (self.paths.idx, "sequences", self.sequence_count, manifest.documents),
            (self.paths.idx, "tokens", self.token_count, manifest.tokens),
            (self.paths.idx, "type of an id", self.dtype.name, manifest.dtype),
            (self.paths.idx, "checksum", self._index.checksum(), manifest.idx.checksum),
        ]
        return [
            f"{path}: {name}: {value}; the manifest {self.paths.manifest.name} says {wanted}; "
            "the files must come from one run: copy them again, or write the dataset again"
            for path, name, value, wanted in pairs if value != wanted
        ]

    def checksum_faults(self, stop: threading.Event | None = None) -> list[str]:
        """Compare the whole `.bin` with the manifest's checksum; return the fault if they differ and `stop` was not set."""
        return self._checksum_faults(self.ids.checksum(stop)) if self.manifest is not None else []

    def _checksum_faults(self, found: str | None) -> list[str]:
        if self.manifest is None or found in (None, self.manifest.bin.checksum):
            return []
        return [f"{self.paths.bin}: its checksum is {found}; the manifest {self.paths.manifest.name} says "
                f"{self.manifest.bin.checksum}; one of them was damaged or changed: copy both files again, or write the "
                "dataset again"]

    @property
    def tokens(self) -> np.ndarray:
        """The ids as one read-only array over a memory map, which it keeps alive: for a look.  # [token_count]"""
        return self.ids.tokens

    def preload(self, on_progress: Callable[[float], None] | None = None) -> None:
        """Read all ids into memory and compare them with the manifest; they are the same ids, read more quickly.

        Raises:
            DataError: they were damaged, or cannot be read.
        """
        raise_faults(DataError, self._checksum_faults(self.ids.preload(on_progress)))
        self.verified = self.manifest is not None

    def document(self, number: int) -> np.ndarray:
        """Return the ids of a document, its EOS included."""
        assert 0 <= number < self.document_count, (number, self.document_count)
        self._index.require_whole()
        first, after = self._index.boundaries[number : number + 2]
        return self.ids[self._token_offset(int(first)) : self._token_offset(int(after))]

    def document_ends(self) -> np.ndarray:
        """Return for each document the position in `tokens` after its last id (eight bytes per document)."""
        self._index.require_whole()
        if not self.sequence_count:
            return np.zeros(self.document_count, np.int64)
        ends = np.append(np.asarray(self._index.pointers) // self.dtype.itemsize, self.token_count)
        return ends[np.asarray(self._index.boundaries[1:])]

    def _token_offset(self, sequence: int) -> int:
        if sequence == self.sequence_count:
            return self.token_count
        return int(self._index.pointers[sequence]) // self.dtype.itemsize
