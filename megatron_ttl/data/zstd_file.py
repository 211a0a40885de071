"""Read and write `.zst` files line by line, in bounded memory, through the library zstandard."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from megatron_ttl.errors import DataError

ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_LARGEST_WINDOW = 1 << 27
"""Bytes a packed file may ask to keep while it is unpacked: the limit of the command zstd; --long=31 would take 2 GiB."""
_STEP_BYTES = 1 << 10  # packed bytes at a time: one block of 128 KiB can be packed into four
_LEVEL = 3


class ZstdDamaged(Exception):
    """A packed file whose bytes are not what was packed."""


class ZstdLines:
    """Lines of a packed file, one frame after the other.

    Raises:
        EOFError: (while reading) the file ends within a frame.
        ZstdDamaged: (while reading) it cannot be unpacked.
    """

    def __init__(self, packed: BinaryIO) -> None:
        self._packed = packed
        self._library = zstandard()
        self._unpacker = self._library.ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
        self._frame: Any = None
        self._input = b""
        self._data = b""
        self._at = 0

    def readline(self, limit: int) -> bytes:
        """Return the next line, its end included, cut at `limit` bytes; empty at the end of the file."""
        pieces: list[bytes] = []
        size = 0
        while size < limit:
            if self._at == len(self._data):
                self._data, self._at = self._unpack(), 0
                if not self._data:
                    break
            end = self._data.find(b"\n", self._at) + 1
            piece = self._data[self._at:min(end or len(self._data), self._at + limit - size)]
            self._at += len(piece)
            size += len(piece)
            pieces.append(piece)
            if end and piece.endswith(b"\n"):
                break
        return b"".join(pieces)

    def _unpack(self) -> bytes:
        """Return some more bytes; none at the end of the last frame."""
        while True:
            if not self._input:
                self._input = self._packed.read(_STEP_BYTES)
            if not self._input:
                if self._frame is not None:
                    raise EOFError
                return b""
            if self._frame is None:
                self._frame = self._unpacker.decompressobj()
            try:
                data = self._frame.decompress(self._input)
            except self._library.ZstdError as error:
                raise ZstdDamaged(str(error).removeprefix("zstd decompressor error: ")) from None
            self._input = b""
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
            if data:
                return data


@contextmanager
def zstd_writer(handle: BinaryIO) -> Iterator[BinaryIO]:
    """Pack what is written into an open file: one frame with a checksum, the same bytes for the same lines."""
    packer = zstandard().ZstdCompressor(level=_LEVEL, write_checksum=True)
    with packer.stream_writer(handle, closefd=False) as writer:
        yield writer


def zstd_lines(path: str | os.PathLike[str]) -> Iterator[bytes]:
    """Yield the lines of a packed file that this package has written.

    Raises:
        DataError: it is damaged or cut short.
    """
    with open(path, "rb") as packed:
        lines = ZstdLines(packed)
        try:
            while line := lines.readline(1 << 40):
                yield line
        except (EOFError, ZstdDamaged) as error:
            raise DataError(f"{os.fspath(path)}: is damaged ({error or 'it ends in the middle'}); it must be whole; "
                            "delete it and start the same command again") from None


def zstandard() -> Any:
    """Import the library.

    Raises:
        DataError: it is not there.
    """
    try:
        import zstandard as library
    except ImportError:
        raise DataError("zstandard is not installed; it is needed for .zst files; "
                        "pip install 'megatron_ttl[corpus]'") from None
    return library
