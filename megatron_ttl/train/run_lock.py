"""One run folder has one run: a lock that goes with its process. No torch: a second run leaves within a moment."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import socket
import struct
import time
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from megatron_ttl.console import print_warning
from megatron_ttl.errors import ConfigError
from megatron_ttl.files import make_directory, open_own
from megatron_ttl.runtime import describe_process

# What a file system without such locks answers: Lustre mounted without `flock`, NFS without its lock service.
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
_OWNER = re.compile(r"host (?P<host>\S+), pid (?P<pid>\d+)")
_OWNER_WRITES_S = 1.0
_LARGE_RUN_FILE = 1 << 20  # bytes


class RunLock:
    """The right to write into a run folder: an flock on its `run.lock`, taken by the first process of a run.

    The kernel frees it when the process ends, however it ends, so none is ever stale; the text in the file only tells
    others who has it. A context manager that gives it back.
    """

    def __init__(self, takes: bool = True) -> None:
        """Prepare.

        Args:
            takes: whether this process takes it; of several, one does it for all.
        """
        self._takes = takes
        self._run_dir: Path | None = None
        self._handle: IO[bytes] | None = None
        self._early: socket.socket | None = None

    def take_early(self, run_config: str, overrides: Iterable[str]) -> None:
        """Take the folder that unchecked settings name if it has a lock; nothing is made, for they may be wrong.

        Reading run.dir takes a tenth of the time of the check, and a second run in a folder may leave so much earlier.
        Where there is no lock yet, a name among the sockets of this machine stands for it, which leaves nothing behind.

        Raises:
            ConfigError: another run has it.
        """
        run_dir = _run_dir_at_a_glance(run_config, overrides)
        if run_dir and os.path.exists(os.path.join(run_dir, "run.lock")):
            self.take(run_dir)
        elif run_dir and self._takes:
            self._early, owner = _take_name(run_dir)
            if owner:
                raise _in_use(run_dir, owner)

    def take(self, run_dir: str | os.PathLike[str]) -> None:
        """Take a folder for this process, and let go of another; nothing happens if it has it already.

        Where the file system has no locks the run goes on with a warning: such clusters are in use, and a folder that
        one run uses is safe without.

        Raises:
            ConfigError: another run has it, or it cannot be written.
        """
        run_dir = Path(run_dir)
        if not self._takes or run_dir == self._run_dir:
            return
        self._let_go()
        try:
            make_directory(run_dir)
            handle = open_own(run_dir / "run.lock", "r+b", 0)
        except OSError as error:
            raise ConfigError(f"run.dir: '{error.filename or run_dir}' cannot be written ({error.strerror}); it must "
                              "be a folder of yours, and its run.lock a file; choose another run.dir") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                owner = _owner(handle)
                handle.close()
                raise _in_use(run_dir, owner) from None
            print_warning(f"run.dir: '{run_dir}' is on a file system without locks ({error.strerror}); nobody keeps a "
                          "second run out; see that there is one, or choose a run.dir elsewhere")
        self._handle, self._run_dir = handle, run_dir
        try:
            handle.truncate(0)
            handle.write(f"{describe_process()}, since {time.strftime('%F %T')}\n".encode())
        except OSError:  # a full disk; those who want room on it will say so
            pass

    def release(self) -> None:
        """Let the next run in."""
        self._let_go()
        if self._early is not None:
            self._early.close()
            self._early = None

    def _let_go(self) -> None:
        if self._handle is not None:
            self._handle.close()
            self._handle = self._run_dir = None

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _in_use(run_dir: str | os.PathLike[str], owner: str) -> ConfigError:
    return ConfigError(f"run.dir: '{os.fspath(run_dir)}' is in use by {owner}; a run folder has one run at a time; wait for "
                       "it, stop it, or choose another run.dir")


def _take_name(run_dir: str) -> tuple[socket.socket | None, str]:
    """Return a socket with a name that only one process of this machine can have (Linux), or else who has it.

    The kernel gives the name back when the process ends. Whoever connects is told the owner's process; a name that
    another user has taken means nothing.
    """
    name = "\0megatron_ttl run " + hashlib.sha256(os.path.realpath(run_dir).encode()).hexdigest()
    try:
        own = socket.socket(socket.AF_UNIX)
        try:
            own.bind(name)
            own.listen(1024)
            return own, ""
        except OSError as error:
            own.close()
            if error.errno != errno.EADDRINUSE:
                return None, ""
        with socket.socket(socket.AF_UNIX) as other:
            other.setblocking(False)
            other.connect(name)
            peer = other.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    except (OSError, AttributeError):  # the owner has just ended, or this is another system
        return None, ""
    pid, user, _ = struct.unpack("3i", peer)
    return None, f"host {socket.gethostname()}, pid {pid}, since a moment ago" if user == os.getuid() else ""


def _run_dir_at_a_glance(run_config: str, overrides: Iterable[str]) -> str:
    """Return the run.dir of a run file and overrides without checking them; empty where that is not so simple."""
    try:
        path = Path(run_config)
        if not path.is_file() or path.stat().st_size > _LARGE_RUN_FILE:  # a pipe can be read once only
            return ""
        found = tomllib.loads(path.read_bytes().decode("utf-8-sig"))["run"]["dir"]
        for key, _, text in (override.partition("=") for override in overrides):
            if key.strip() == "run.dir":
                found = text.strip()
        if found[:1] in ("'", '"'):
            found = tomllib.loads(f"value = {found}")["value"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return ""  # the check will say what is wrong
    return found if isinstance(found, str) else ""


def _owner(handle: IO[bytes]) -> str:
    """Return what the owner wrote of itself.

    It may hold the lock and not have written yet; then the file is empty, or names an owner before it that is dead.
    """
    end = time.monotonic() + _OWNER_WRITES_S
    while True:
        handle.seek(0)
        text = "".join(filter(str.isprintable, handle.read(200).decode(errors="replace").strip()))
        # Still dead after a while: a number that means something in the owner's container only, or a child of the dead.
        if (text and not _is_of_a_dead_process(text)) or time.monotonic() > end:
            return text or "an unknown process"
        time.sleep(0.01)


def _is_of_a_dead_process(text: str) -> bool:
    """Return whether a process of this machine is named that is gone; of another machine nothing is known here."""
    named = _OWNER.match(text)
    if named is None or named["host"] != socket.gethostname():
        return False
    try:
        os.kill(int(named["pid"]), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:  # another user's
        pass
    return False
