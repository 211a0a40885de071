"""The `.bin` of a tokenised dataset: ids by position, from the disk or, read once, from memory."""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import xxhash

from megatron_ttl.errors import DataError
from megatron_ttl.files import open_regular

_BLOCK_BYTES = 8 << 20
_CURE = "check the disk, or copy the file again"


class TokenFile:
    """Flat ids in a file that stays open: who replaces it under its name changes nothing here.

    Samples are read with `pread`, not through a memory map. Under a map, a file that was cut short meanwhile or a disk
    that fails ends the process by SIGBUS; here it is an error with the file's name. Other threads run while the disk is
    slow. And random windows of a file that is not in memory yet take what they ask for, where a page fault takes 128 KiB:
    on a sparse file of 12.4 GB, 400 million ids per second and core instead of 12 million.

    Args:
        path: the file.
        dtype: type of an id.
        count: number of ids; whoever opens it has compared it with the size.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """

    def __init__(self, path: Path, dtype: np.dtype, count: int) -> None:
        self.path = path
        self.dtype = dtype
        self.count = count
        self._descriptor = open_regular(path)
        weakref.finalize(self, os.close, self._descriptor)
        self._flat: np.ndarray | None = None  # mapped, or preloaded
        self._preloaded = False

    @property
    def size_bytes(self) -> int:
        """Bytes of the file as it is now."""
        return os.fstat(self._descriptor).st_size

    @property
    def tokens(self) -> np.ndarray:
        """Every id, read-only: a memory map, or the preloaded ids. The array keeps alive what it shows.  # [count]

        Raises:
            DataError: the file was cut short since it was opened.
        """
        if self._flat is None:
            if not self.count:
                return np.empty(0, self.dtype)  # an empty file cannot be mapped
            try:
                mapping = mmap.mmap(self._descriptor, self.count * self.dtype.itemsize, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise self._fault(0, str(error)) from None
            self._flat = np.frombuffer(mapping, self.dtype)
        return self._flat

    def __len__(self) -> int:
        """Return the number of ids."""
        return self.count

    def __getitem__(self, place: slice) -> np.ndarray:
        """Return the ids from `place.start` to before `place.stop`, fewer where the file ends; to be read only.

        Raises:
            DataError: the file was cut short since it was opened, or the disk fails.
        """
        assert place.step is None, place
        if self._preloaded:
            return self.tokens[place]
        start, stop, _ = place.indices(self.count)
        ids = np.empty(max(0, stop - start), self.dtype)
        if len(ids):
            self._fill(memoryview(ids).cast("B"), start * self.dtype.itemsize)
        return ids

    def preload(self, on_progress: Callable[[float], None] | None = None) -> str:
        """Read all ids into memory, from where they come from now on; return their checksum.

        Args:
            on_progress: is given the bytes read so far.

        Raises:
            DataError: as slicing.
        """
        flat = np.empty(self.count, self.dtype)
        digest, payload = xxhash.xxh3_128(), memoryview(flat).cast("B") if self.count else memoryview(b"")
        for start in range(0, len(payload), _BLOCK_BYTES):
            block = payload[start : start + _BLOCK_BYTES]
            self._fill(block, start)
            digest.update(block)
            if on_progress is not None:
                on_progress(start + len(block))
        flat.flags.writeable = False
        self._flat, self._preloaded = flat, True
        return f"xxh3:{digest.hexdigest()}"

    def checksum(self, stop: threading.Event | None = None) -> str | None:
        """Return the checksum of what is on the disk, as `files.checksum` gives it; None if `stop` was set before its end.

        Raises:
            DataError: as slicing.
        """
        digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(_BLOCK_BYTES))
        size = self.count * self.dtype.itemsize
        for start in range(0, size, _BLOCK_BYTES):
            if stop is not None and stop.is_set():
                return None
            block = buffer[: min(_BLOCK_BYTES, size - start)]
            self._fill(block, start)
            digest.update(block)
        return f"xxh3:{digest.hexdigest()}"

    def _fill(self, block: memoryview, offset: int) -> None:
        """Read as many bytes as `block` has, from byte `offset` on."""
        while len(block):
            try:
                count = os.preadv(self._descriptor, [block], offset)
            except OSError as error:
                raise self._fault(offset, error.strerror) from None
            if not count:
                raise self._fault(offset, f"it has {self.size_bytes:,} bytes")
            block, offset = block[count:], offset + count

    def _fault(self, offset: int, why: str) -> DataError:
        return DataError(f"{self.path}: cannot be read at byte {offset:,} ({why}); it had {self.count:,} ids, "
                         f"{self.count * self.dtype.itemsize:,} bytes, when it was opened, and must keep them while it is "
                         f"in use; {_CURE}")
