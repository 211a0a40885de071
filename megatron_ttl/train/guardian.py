"""Look after one training process from outside it: when its section moves no more, keep its stacks and end it.

A program of its own, of Python's standard library alone and about 8 MB: a thread inside the training could not act
where another thread holds the interpreter's lock, or where the whole process is stopped.

    guardian.py <process> <pipe of beats> <pipe of requests> <file of stacks> <where stacks are kept> <who>

A beat is a line `<section> <seconds it may take, 0 without end> <what it does>`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import time

_TICK_S = 0.5
_OTHERS_S = 4.0
"""Other processes began to wait for this one a little later: their guardians must see it too, and keep their stacks."""
_LEAVE_S = 2.0


def main(argv: list[str]) -> None:
    """Watch until the process ends."""
    process, beats, requests, stacks = map(int, argv[:4])
    path, who = argv[4:]
    section, limit, doing = "set-up", 0.0, ""
    waited, rest = 0.0, b""
    while os.getppid() == process:
        began = time.monotonic()
        if select.select([beats], [], [], _TICK_S)[0]:
            received = os.read(beats, 1 << 16)
            if not received:
                return
            *lines, rest = (rest + received).split(b"\n")
            if lines:
                section, seconds, doing = lines[-1].decode().split(" ", 2)
                limit, waited = float(seconds), 0.0
            continue
        # Ticks are counted, not hours: whoever sleeps at night with the whole machine has not been hanging.
        waited += min(time.monotonic() - began, 2 * _TICK_S)
        if limit and waited >= limit:
            os.write(2, f"watchdog: {who}: section {section!r}{doing} has not moved for {waited:.0f} s; the run ends; the stacks of "
                        f"all threads are in {path}\n".encode())
            return end(process, beats, requests, stacks, path)


def end(process: int, beats: int, requests: int, stacks: int, path: str) -> None:
    """Keep the stacks, ask the process to leave with the status of a hang, and kill it if it does not."""
    with contextlib.suppress(ProcessLookupError):
        _ask_for_stacks(process)
        _gone(beats, _OTHERS_S)
        with contextlib.suppress(OSError):
            os.write(requests, b"q")
        os.kill(process, signal.SIGCONT)  # one that was stopped writes its stacks now, and leaves
        if not _gone(beats, _LEAVE_S):
            os.kill(process, signal.SIGKILL)
    _keep(stacks, path)


def _ask_for_stacks(process: int) -> None:
    """Let faulthandler write them, whoever holds the interpreter's lock.

    Told to the main thread, which then writes before it does anything else when a stopped process goes on; told to the
    process, it could be any thread, and the main one would be further by then.
    """
    tell = getattr(ctypes.CDLL(None), "tgkill", None)
    if tell is None or tell(process, process, signal.SIGUSR2):
        os.kill(process, signal.SIGUSR2)


def _gone(beats: int, seconds: float) -> bool:
    """Wait until nobody holds the other end of the pipe."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        if select.select([beats], [], [], left)[0] and not os.read(beats, 1 << 16):
            return True
    return False


def _keep(stacks: int, path: str) -> None:
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as handle:
            handle.write(os.pread(stacks, 1 << 24, 0))
    except OSError as error:
        os.write(2, f"warning: {path}: could not be written ({error.strerror})\n".encode())


if __name__ == "__main__":
    main(sys.argv[1:])
