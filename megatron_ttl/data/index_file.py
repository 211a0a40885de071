"""The `.idx` file of a tokenised dataset: write it in blocks, read it believing nothing that was not checked.

Everything is little-endian, nothing is aligned:

    offset        size  content
    0                9  b"MMIDIDX\\0\\0"
    9                8  uint64 version, 1
    17               1  uint8 type of an id: 1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 8 uint16
    18               8  uint64 N, number of sequences
    26               8  uint64 D, number of document boundaries: documents + 1
    34             4 N  int32 length of every sequence in tokens
    34 +  4 N      8 N  int64 offset of every sequence in the .bin in bytes
    34 + 12 N      8 D  int64 boundaries: sequence where each document starts; the first is 0, the last is N

Source: megatron/core/datasets/indexed_dataset.py of megatron-core 0.16.1; for the codes 6 and 7, float64 and float32
there and float32 and float64 in GPT-NeoX, megatron/data/indexed_dataset.py of EleutherAI/gpt-neox.
"""

from __future__ import annotations

import mmap
import os
import struct
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_ttl.errors import DataError, raise_faults
from megatron_ttl.files import checksum_bytes, open_regular

MAGIC = b"MMIDIDX\x00\x00"
_OLDER_MAGIC = b"TNTIDX"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, type code, sequences, document boundaries
DTYPE_CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}
_FLOATS = {6: ("float64", "float32"), 7: ("float32", "float64")}  # for Megatron-LM, for GPT-NeoX
LONGEST_SEQUENCE = 2**31 - 1
_DTYPE_NAMES = {code: name for name, code in DTYPE_CODES.items()}
_CHUNK = 1 << 18  # entries handled at a time: bounds the memory for any number of documents
_CURE = "copy the file again, or write the dataset again"


def index_blocks(lengths: np.ndarray, dtype: np.dtype) -> Iterator[bytes]:
    """Yield the content of an index with one sequence per document, block by block.

    Args:
        lengths: tokens of each document, int32.  # [N]
        dtype: type of an id in the `.bin`.
    """
    count = len(lengths)
    yield HEADER.pack(MAGIC, 1, DTYPE_CODES[dtype.name], count, count + 1)
    for start in range(0, count, _CHUNK):
        yield lengths[start : start + _CHUNK].astype("<i4").tobytes()
    offset = 0
    for start in range(0, count, _CHUNK):
        sizes = lengths[start : start + _CHUNK].astype(np.int64) * dtype.itemsize
        yield (offset + np.cumsum(sizes) - sizes).astype("<i8").tobytes()
        offset += int(sizes.sum())
    for start in range(0, count + 1, _CHUNK):
        yield np.arange(start, min(start + _CHUNK, count + 1), dtype="<i8").tobytes()


class IndexFile:
    """The arrays of an `.idx`, mapped and checked.

    Attributes:
        lengths: tokens of each sequence, int32.  # [N]
        pointers: offset of each sequence in the `.bin` in bytes, int64.  # [N]
        boundaries: sequence where each document starts, and the number of sequences, int64.  # [D]

    Raises:
        DataError: the file is no index, is cut short, or contradicts itself.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = open_regular(path)
            weakref.finalize(self, os.close, self._descriptor)
            self.size_bytes = os.fstat(self._descriptor).st_size
            if self.size_bytes < HEADER.size:
                raise DataError(f"{path}: ends in its header, after {self.size_bytes} bytes; the header has "
                                f"{HEADER.size}; {_CURE}")
            # The arrays below refer to this mapping and keep it alive; it is never closed by hand.
            mapping = mmap.mmap(self._descriptor, self.size_bytes, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: it has become shorter
            raise DataError(f"{path}: cannot be read ({error}); it must be; {_CURE}") from None
        self._mapping = np.frombuffer(mapping, np.uint8)
        self.dtype, count, boundary_count = self._read_header()
        self.lengths = self._array("<i4", HEADER.size, count)
        self.pointers = self._array("<i8", HEADER.size + 4 * count, count)
        self.boundaries = self._array("<i8", HEADER.size + 12 * count, boundary_count)
        # Lengths are looked at first: the other two arrays cannot be longer without a fault that shows at once.
        raise_faults(DataError, [fault for fault in (self._length_fault(), self._boundary_fault()) if fault])
        self.token_count = self._check_pointers()

    def require_whole(self) -> None:
        """Refuse to look into a file that was cut short since it was opened: that would end the process (SIGBUS).

        Raises:
            DataError: it has another size now.
        """
        found = os.fstat(self._descriptor).st_size
        if found != self.size_bytes:
            raise DataError(f"{self.path}: has {found:,} bytes; it had {self.size_bytes:,} when it was opened, and must "
                            f"keep them while it is in use; {_CURE}")

    def checksum(self) -> str:
        """Return the checksum of the file."""
        return checksum_bytes(memoryview(self._mapping))

    def _read_header(self) -> tuple[np.dtype, int, int]:
        magic, version, code, count, boundary_count = HEADER.unpack(self._mapping[: HEADER.size].tobytes())
        if magic.startswith(_OLDER_MAGIC):
            raise DataError(f"{self.path}: is an index of the older kind (fairseq's TNTIDX, Megatron's 'lazy' and 'cached')"
                            "; it must be of the kind 'mmap'; write it again with --dataset-impl mmap")
        if magic != MAGIC:
            raise DataError(f"{self.path}: begins with {magic!r}; an index begins with {MAGIC!r}; "
                            f"check the prefix, {_CURE}")
        faults = []
        if version != 1:
            faults.append(f"{self.path}: has version {version}; only version 1 is known; {_CURE}")
        if code not in _DTYPE_NAMES:
            known = ", ".join(f"{number} {name}" for number, name in sorted(_DTYPE_NAMES.items()))
            faults.append(f"{self.path}: its type code {code} is {self._what_is(code, count)}; ids must be integers "
                          f"({known}); {_CURE}")
        # Python's integers do not overflow, so absurd counts are caught here, before anything is allocated.
        wanted = HEADER.size + 12 * count + 8 * boundary_count
        if boundary_count < 1:
            faults.append(f"{self.path}: counts no document boundary; the first, 0, is always there; {_CURE}")
        elif boundary_count > count + 1:  # a sparse file of terabytes could say so
            faults.append(f"{self.path}: counts {boundary_count - 1:,} documents and {count:,} sequences; a document "
                          f"has at least one; {_CURE}")
        elif self.size_bytes == wanted + count and count:
            faults.append(f"{self.path}: has one byte too many per sequence, as multimodal data has; "
                          "only text is read here; write the dataset without modes")
        elif self.size_bytes != wanted:
            where = (f"ends {wanted - self.size_bytes:,} bytes early" if self.size_bytes < wanted
                     else f"has {self.size_bytes - wanted:,} bytes too many")
            faults.append(f"{self.path}: {where}; its header counts {count:,} sequences and "
                          f"{boundary_count:,} document boundaries, {wanted:,} bytes; {_CURE}")
        raise_faults(DataError, faults)
        return np.dtype(_DTYPE_NAMES[code]).newbyteorder("<"), count, boundary_count

    def _what_is(self, code: int, count: int) -> str:
        """Say what a type code means that is none of ours: Megatron and GPT-NeoX write 6 and 7 the other way round."""
        if code not in _FLOATS:
            return "unknown"
        megatron, neox = _FLOATS[code]
        what = f"floating point ({megatron} as Megatron-LM writes it, {neox} as GPT-NeoX does)"
        end = HEADER.size + 4 * count + 16  # of the second pointer, which is the size of the first sequence in bytes
        if not 2 <= count <= self.size_bytes or end > self.size_bytes:
            return what
        length = int(self._array("<i4", HEADER.size, 1)[0])
        first_bytes = int(self._array("<i8", end - 8, 1)[0])
        name = {4 * length: "float32", 8 * length: "float64"}.get(first_bytes)
        return f"{name}, written by {'Megatron-LM' if name == megatron else 'GPT-NeoX'}" if name and length else what

    def _array(self, dtype: str, offset: int, count: int) -> np.ndarray:
        return np.frombuffer(self._mapping, dtype=dtype, count=count, offset=offset)

    def _length_fault(self) -> str | None:
        for start in range(0, len(self.lengths), _CHUNK):  # a sparse file of terabytes ends in the first one
            wrong = self.lengths[start : start + _CHUNK] <= 0
            if wrong.any():
                number = start + int(np.argmax(wrong))
                break
        else:
            return None
        return (f"{self.path}: sequence {number} has {self.lengths[number]} tokens; every one has at least "
                f"one; {_CURE}")

    def _boundary_fault(self) -> str | None:
        first, last, count = int(self.boundaries[0]), int(self.boundaries[-1]), len(self.lengths)
        if first != 0 or last != count:
            return (f"{self.path}: its documents span the sequences {first} to {last}; they must span 0 to "
                    f"{count}; {_CURE}")
        for start in range(0, len(self.boundaries) - 1, _CHUNK):
            block = self.boundaries[start : start + _CHUNK + 1]
            falls = block[1:] < block[:-1]
            if falls.any():
                number = start + int(np.argmax(falls))
                return (f"{self.path}: document {number} ends before it begins (sequences "
                        f"{self.boundaries[number]} to {self.boundaries[number + 1]}); boundaries "
                        f"never fall; {_CURE}")
        return None

    def _check_pointers(self) -> int:
        """Compare the pointers with the running sum of the lengths; return the number of tokens."""
        tokens = 0
        for start in range(0, len(self.lengths), _CHUNK):
            lengths = self.lengths[start : start + _CHUNK].astype(np.int64)
            ends = np.cumsum(lengths)
            wrong = self.pointers[start : start + _CHUNK] != (tokens + ends - lengths) * self.dtype.itemsize
            if wrong.any():
                number = start + int(np.argmax(wrong))
                raise DataError(f"{self.path}: sequence {number} points to byte {self.pointers[number]}, not "
                                f"to the end of the one before; sequences follow without gaps; {_CURE}")
            tokens += int(ends[-1])
        return tokens
