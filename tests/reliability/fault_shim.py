"""Build shim.c and steer it from inside a process that has it loaded."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

COUNT, KILL, TORN, FAIL, SHORT, LOG = range(1, 7)
"""Do nothing; kill before the call; write half and kill; let the disk fail; write half, then let it fail; keep a log.

With a log the disk may fail as well; what failed is not in it.
"""
ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
EVER = 1 << 60
KINDS = 29
"""How many kinds of calls Python can make."""


def build(folder: Path) -> Path:
    """Compile the shim; without a compiler the test is skipped."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler (cc) is on this machine; the shim that kills and fails is written in C")
    library = folder / "shim.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-o", str(library),
                    str(Path(__file__).with_name("shim.c")), "-ldl", "-lpthread"], check=True)
    return library


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(None)
    library.ttl_arm.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_long, ctypes.c_long, ctypes.c_int,
                                ctypes.c_char_p]
    library.ttl_disarm.restype = library.ttl_refused.restype = ctypes.c_long
    return library


def arm(folder: Path, mode: int, n: int = EVER, to: int = EVER, error: int = 0, log: Path | None = None) -> None:
    """Hit the calls that change `folder` or what is in it, from number n (of 1, 2, ...) up to before number `to`."""
    assert os.path.realpath(folder.parent) == str(folder.parent), "the shim compares paths as they are"
    refused = _library().ttl_arm(os.fsencode(folder), mode, n, to, error, os.fsencode(log) if log else None)
    assert refused == 0, "the shim could not open its log"


def disarm() -> int:
    """Stop; return how many calls there were."""
    return int(_library().ttl_disarm())


def refused() -> int:
    """Return at how many of the calls the disk has failed."""
    return int(_library().ttl_refused())


def note(word: str) -> None:
    """Put a word into the log, between the calls."""
    _library().ttl_note(word.encode())


@dataclass(frozen=True)
class Operation:
    """One line of the log."""

    what: str
    """create, truncate, write, fsync, rename, mkdir, unlink, change or note."""
    path: str
    other: str
    offset: int
    size: int
    payload: bytes = b""


def read_log(path: Path) -> list[Operation]:
    """Return what was done, in order."""
    found, rest = [], path.read_bytes()
    while rest:
        line, _, rest = rest.partition(b"\n")
        what, name, other, offset, size = line.decode().split("\t")
        taken = int(size) if what == "write" else 0
        found.append(Operation(what, name, other, int(offset), int(size), rest[:taken]))
        rest = rest[taken:]
    return found


def make_every_call(folder: Path, other: Path) -> list[list[int]]:
    """Make every kind of call; return how often each was counted in `folder`, then in `other`, which nobody watches.

    And how often each was refused, in `folder` again, with the disk failing for good.
    """
    found = []
    for place, mode in ((folder, COUNT), (other, COUNT), (folder, FAIL)):
        place.mkdir(exist_ok=True)
        found.append([_counted(folder, place, mode, call) for call in range(KINDS)])
        shutil.rmtree(place)
    return found


def _counted(watched: Path, place: Path, mode: int, number: int) -> int:
    """Make one call in a fresh folder."""
    shutil.rmtree(place)
    (place / "sub").mkdir(parents=True)
    for name in ("file", "source"):
        (place / name).write_bytes(b"0123456789")
    calls = _calls(place)
    assert len(calls) == KINDS
    call = calls[number]
    arm(watched, mode, n=1, error=errno.EIO)
    try:
        call()
    except OSError as error:
        assert error.errno == errno.EIO, error
    counted = disarm()
    return refused() if mode == FAIL else counted


def _calls(place: Path) -> list[Callable[[], object]]:
    path, new = str(place / "file"), str(place / "new")
    fd, source = os.open(path, os.O_RDWR), os.open(place / "source", os.O_RDONLY)
    inside = os.open(place, os.O_RDONLY)
    times = (1, 1)
    return [
        lambda: os.open(new, os.O_CREAT | os.O_WRONLY), lambda: os.open(path, os.O_TRUNC | os.O_WRONLY),
        lambda: os.open("new", os.O_CREAT | os.O_WRONLY, dir_fd=inside), lambda: open(new, "x").close(),
        lambda: os.write(fd, b"abc"), lambda: os.pwrite(fd, b"abc", 2), lambda: os.writev(fd, [b"abc", b"d"]),
        lambda: os.pwritev(fd, [b"abc", b"d"], 2), lambda: os.sendfile(fd, source, 0, 10),
        lambda: os.copy_file_range(source, fd, 10), lambda: os.truncate(path, 3), lambda: os.ftruncate(fd, 3),
        lambda: os.fsync(fd), lambda: os.fdatasync(fd), lambda: os.fsync(inside), lambda: os.mkdir(new),
        lambda: os.mkdir("new", dir_fd=inside), lambda: os.rename(path, new), lambda: os.replace(path, new),
        lambda: os.rename("file", "new", src_dir_fd=inside, dst_dir_fd=inside), lambda: os.link(path, new),
        lambda: os.symlink(path, new), lambda: os.unlink(path), lambda: os.unlink("file", dir_fd=inside),
        lambda: os.rmdir(place / "sub"), lambda: os.rmdir("sub", dir_fd=inside), lambda: os.chmod(path, 0o600),
        lambda: os.fchmod(fd, 0o600), lambda: os.utime(path, times)]


def every_call(folder: str) -> list[list[int]]:
    """For the server."""
    return make_every_call(Path(folder) / "watched", Path(folder) / "watched-not")
