"""Write files so that a reader sees the old one or the new one, never a half: temporary file, fsync, rename."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import xxhash

from megatron_ttl.errors import DiskError

_BLOCK_BYTES = 8 << 20


def fsync_directory(directory: Path) -> None:
    """Make the names inside `directory` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Make the bytes of a file that some library wrote survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(directory: str | os.PathLike[str]) -> None:
    """Make a folder, and those above it that are missing, so that their names survive a power cut.

    Raises:
        OSError: what the disk said.
    """
    missing = []
    place = Path(directory)
    while not place.is_dir():
        missing.append(place)
        place = place.parent
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        with suppress(PermissionError):  # a folder may let its owner write into it and not read it
            fsync_directory(folder.parent)


def open_regular(path: str | os.PathLike[str], flags: int = os.O_RDONLY, follow_links: bool = True) -> int:
    """Return a descriptor of a regular file. Opening a pipe would wait for ever, reading a device never end.

    Args:
        path: the file.
        flags: of `os.open`; a file that is made gets the usual rights.
        follow_links: whether `path` may be a symbolic link.

    Raises:
        OSError: it cannot be opened, or is something else.
    """
    try:
        flags |= os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow_links else os.O_NOFOLLOW)
        descriptor = os.open(path, flags, 0o666)
    except ValueError as error:  # a NUL in the name
        raise OSError(errno.EINVAL, f"no path: {error}", os.fspath(path)) from None
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    raise OSError(errno.EINVAL, "no regular file", os.fspath(path))


def read_regular(path: str | os.PathLike[str], limit_bytes: int, follow_links: bool = True) -> bytes:
    """Return the bytes of a regular file of at most `limit_bytes`; a larger one is refused unread.

    Raises:
        OSError: it cannot be read, is no regular file, or is too large.
    """
    descriptor = open_regular(path, follow_links=follow_links)
    with open(descriptor, "rb") as handle:
        size = os.fstat(descriptor).st_size
        if size > limit_bytes:
            raise OSError(errno.EFBIG, f"{size:,} bytes, more than {limit_bytes:,}", os.fspath(path))
        return handle.read(limit_bytes)


def open_own(path: str | os.PathLike[str], mode: str, buffering: int = -1) -> IO[Any]:
    """Open a file that is changed in place: to append, "ab", or to write into, "r+b"; it is made where it is missing.

    A link, symbolic or hard, could lead the writes of a run into a file that is not the run's.

    Raises:
        OSError: it cannot be opened, is a link, no regular file, or has a second name.
    """
    flags = {"ab": os.O_WRONLY | os.O_APPEND, "r+b": os.O_RDWR}[mode]
    descriptor = open_regular(path, flags | os.O_CREAT, follow_links=False)
    if os.fstat(descriptor).st_nlink > 1:
        os.close(descriptor)
        raise OSError(errno.EMLINK, "it has a second name, a hard link", os.fspath(path))
    return open(descriptor, mode, buffering)


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file beside `path`; on success it takes the name `path`, on failure it is gone.

    Raises:
        OSError: what the disk said; the file at `path` is untouched.
    """
    path = Path(path)
    make_directory(path.parent)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    encoding = None if "b" in mode else "utf-8"
    try:
        temporary.unlink(missing_ok=True)  # of a killed process that had our number; never followed, if it is a link
        newline = None if "b" in mode else "\n"
        with open(temporary, mode.replace("w", "x"), encoding=encoding, newline=newline) as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


@contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Fill a temporary folder beside `path`; on success it takes the name `path`, on failure it is gone.

    A folder already at `path` is replaced: it stays whole until the new one is complete and on the disk.

    Raises:
        OSError: what the disk said; the folder at `path` is untouched.
    """
    path = Path(path)
    make_directory(path.parent)
    temporary, former = (path.with_name(f".{path.name}.{kind}-{os.getpid()}") for kind in ("tmp", "former"))
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed process that had our number
    temporary.mkdir()
    try:
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in names:
                fsync_file(Path(folder, name))
            fsync_directory(Path(folder))
        if path.exists():
            os.rename(path, former)
        os.rename(temporary, path)
    except BaseException:
        if former.exists() and not path.exists():
            os.rename(former, path)
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_directory(path.parent)
    if former.is_symlink():  # what it leads to is somebody else's
        former.unlink()
    shutil.rmtree(former, ignore_errors=True)


def remove_leftovers(directory: Path, names: Iterable[str]) -> None:
    """Delete what killed atomic writes of these names have left; only for who knows that no other is at work.

    Raises:
        OSError: what the disk said.
    """
    leftover = re.compile(rf"\.(?:{'|'.join(map(re.escape, names))})\.(?:tmp|former)-[0-9]+")
    for entry in list(os.scandir(directory)):
        if leftover.fullmatch(entry.name):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)


@contextmanager
def or_disk_error(place: Path) -> Iterator[None]:
    """Let what the disk refuses inside end as one sentence about `place`.

    Raises:
        DiskError: for every OSError.
    """
    try:
        yield
    except OSError as error:
        reason = error.args[0][0][-1] if isinstance(error, shutil.Error) else error.strerror or error
        raise DiskError(f"{error.filename or place}: could not be written ({reason}); it must be, for the run to be "
                        "kept; free some space or repair the disk") from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` atomically as UTF-8."""
    with atomic_write(path, "w") as handle:
        handle.write(text)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` atomically as indented JSON; NaN and infinity are refused, for JSON has no word for them."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def checksum(path: str | os.PathLike[str]) -> str:
    """Return the xxh3-128 of a file as `xxh3:<32 hex digits>`: 20 GB/s, against accidents and not against attackers."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as handle:
        while block := handle.read(_BLOCK_BYTES):
            digest.update(block)
    return f"xxh3:{digest.hexdigest()}"


def checksum_bytes(payload: bytes | memoryview) -> str:
    """Return the checksum that `checksum` would give for a file with these bytes."""
    return f"xxh3:{xxhash.xxh3_128(payload).hexdigest()}"


def free_bytes(directory: Path) -> int:
    """Return how many bytes may be written where `directory` lies, or will lie."""
    place = directory.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def require_free_space(directory: Path, needed_bytes: int, what: str) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        DiskError: fewer than `needed_bytes` are free where `directory` lies (or will lie).
    """
    free = free_bytes(directory)
    if free < needed_bytes:
        raise DiskError(
            f"{directory}: {what} needs {human_bytes(needed_bytes)}, {human_bytes(free)} are free; "
            "the disk must hold it; free some space or choose another folder"
        )


def human_bytes(count: float) -> str:
    """Format a byte count with a binary unit: 1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
