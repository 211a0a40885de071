"""Call a function in a fork, and say what it cost: what a hostile file does to a process stays there."""

from __future__ import annotations

import json
import os
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from megatron_ttl.errors import UserError


@dataclass(frozen=True)
class Outcome:
    """How a call ended."""

    kind: str
    """`returned`, `refused` (a UserError), `raised` (anything else), `hung` or `died`."""
    text: str
    cpu_s: float
    extra_bytes: int
    """By how much the largest resident size grew."""


def in_fork(function: Callable[[], object], timeout_s: int = 30) -> Outcome:
    """Call `function` in a fork of this process and return how it ended.

    Args:
        function: what to call; what it returns is dropped.
        timeout_s: seconds after which it counts as hanging.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(timeout_s)
            os.write(writer, json.dumps(_called(function)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as handle:
        answer = handle.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        kind = "hung" if os.WTERMSIG(status) == signal.SIGALRM else "died"
        return Outcome(kind, signal.Signals(os.WTERMSIG(status)).name, 0.0, 0)
    return Outcome(**json.loads(answer))


def _called(function: Callable[[], object]) -> dict[str, object]:
    before, begun = resource.getrusage(resource.RUSAGE_SELF), time.process_time()
    try:
        function()
        kind, text = "returned", ""
    except UserError as error:
        kind, text = "refused", str(error)
    except BaseException as error:
        kind, text = "raised", f"{type(error).__name__}: {error}"
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {"kind": kind, "text": text[:2000], "cpu_s": time.process_time() - begun,
            "extra_bytes": (after.ru_maxrss - before.ru_maxrss) * 1024}
