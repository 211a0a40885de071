"""Build shim.c and steer it from inside a process that has it loaded."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

COUNT, KILL, TORN, FAIL, SHORT, LOG = range(1, 7)
"""Do nothing; kill before the call; write half and kill; let the disk fail; write half, then let it fail; keep a log.

With a log the disk may fail as well; what failed is not in it.
"""
ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
EVER = 1 << 60


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
    library.ttl_disarm.restype = ctypes.c_long
    return library


def arm(folder: Path, mode: int, n: int = EVER, to: int = EVER, error: int = 0, log: Path | None = None) -> None:
    """Hit the calls that change `folder` or what is in it, from number n (of 1, 2, ...) up to before number `to`."""
    assert os.path.realpath(folder.parent) == str(folder.parent), "the shim compares paths as they are"
    refused = _library().ttl_arm(os.fsencode(folder), mode, n, to, error, os.fsencode(log) if log else None)
    assert refused == 0, "the shim could not open its log"


def disarm() -> int:
    """Stop; return how many calls there were."""
    return int(_library().ttl_disarm())


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
