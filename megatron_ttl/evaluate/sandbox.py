"""Run programs that nobody has read, such as those that a model wrote, in processes that can do no harm.

A program gets a Python of its own, without site-packages, and may compute and print. The kernel refuses sockets, new
processes, writing any file, signals to others (seccomp: without it nothing is run); besides it knows no network
(a network namespace, where the system permits one) and can read only Python's own files (Landlock, where the kernel has
it). Time, memory and output are bounded. What a program prints is all that comes back.
"""

from __future__ import annotations

import json
import os
import resource
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_ttl import jail
from megatron_ttl.errors import ConfigError
from megatron_ttl.files import or_disk_error

_MIB = 1 << 20
_PROBE_SECONDS = 60
_LARGEST_PROGRAM = 1 * _MIB
_BLOCK = 1 << 16
_LONGEST_WAIT = 1.0  # seconds: a Ctrl-C that another thread received is noticed between two waits


@dataclass(frozen=True)
class Limits:
    """What a program may use up."""

    seconds: int = 3
    """Of processor time, all threads together. 3 is what HumanEval's authors give (Chen et al. 2021)."""
    wall_seconds: float = 15.0
    """By the clock, for programs that wait; wider, so that a busy machine changes no outcome."""
    memory_bytes: int = 512 * _MIB
    """Address space."""
    output_bytes: int = 1 * _MIB
    """What it prints, and again what it complains."""


@dataclass(frozen=True)
class Outcome:
    """How a program ended."""

    kind: Literal["ended", "timed out", "too much output", "refused"]
    """`refused`: it was not run, being no text or larger than 1 MiB."""
    code: int | None = None
    """Exit status, negative for a signal; None where it did not end by itself."""
    output: str = ""
    errors: str = ""


def require_sandbox() -> str:
    """Make sure that programs can be run without harm; return how far they are shut in, for a record.

    Raises:
        ConfigError: the system cannot refuse system calls; nothing may be run.
    """
    cure = "evaluate without tasks that run programs, or on Linux (x86_64, aarch64) with seccomp"
    where = "code execution: programs that a model wrote"
    if sys.platform != "linux":
        raise ConfigError(f"{where} cannot be shut in on {sys.platform}; they must be; {cure}")
    with tempfile.TemporaryDirectory() as folder:
        probe = subprocess.Popen(_command("", Limits()), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                 stderr=subprocess.DEVNULL, env={}, cwd=folder, start_new_session=True)
        try:
            answer = json.loads(probe.communicate(timeout=_PROBE_SECONDS)[0] or b"{}")
        except subprocess.TimeoutExpired:
            answer = {}
        finally:
            probe.kill()
            probe.wait()
    if not answer.get("calls"):
        raise ConfigError(f"{where} cannot be shut in: the kernel does not refuse system calls; it must; {cure}")
    return ("seccomp" + (", network namespace" if answer["network"] else ", no network namespace")
            + (", Landlock" if answer["files"] else ", no Landlock: files can be read"))


def run_programs(programs: Iterable[str], limits: Limits | None = None, workers: int | None = None,
                 progress: Callable[[float], None] | None = None) -> list[Outcome]:
    """Run programs, each by itself; whatever interrupts this ends them all.

    Args:
        programs: Python's source.
        limits: of each.
        workers: how many run at a time; None: one per core.
        progress: receives how many have ended.

    Returns:
        How each ended, in order.

    Raises:
        ConfigError: they cannot be shut in here.
        DiskError: a program could not be written for its Python to read.
    """
    require_sandbox()
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    assert workers > 0
    limits = limits or Limits()
    waiting: Iterator[tuple[int, str]] = iter(enumerate(programs))
    outcomes: dict[int, Outcome] = {}
    running: set[_Running] = set()
    with tempfile.TemporaryDirectory(prefix="sandbox-") as folder, selectors.DefaultSelector() as selector:
        try:
            more = True
            while more or running:
                while more and len(running) < workers:
                    number, program = next(waiting, (-1, ""))
                    more = number >= 0
                    if more and (source := _source(program)) is None:
                        outcomes[number] = Outcome("refused")
                    elif more:
                        running.add(_start(number, source, Path(folder), limits, selector))
                for ended in _advance(running, selector, limits):
                    outcomes[ended.number] = ended.outcome()
                    running.remove(ended)
                    if progress:
                        progress(len(outcomes))
        finally:
            for left in running:
                left.end()
    return [outcomes[number] for number in range(len(outcomes))]


@dataclass(eq=False)
class _Running:
    """A program at work."""

    number: int
    process: subprocess.Popen[bytes]
    folder: Path
    deadline: float
    text: dict[str, bytearray] = field(default_factory=lambda: {"output": bytearray(), "errors": bytearray()})
    open: int = 2
    """Of the two pipes, those that have not ended."""
    stopped: Literal["timed out", "too much output"] | None = None

    def end(self) -> None:
        """Kill it if it still runs, and forget its files."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)  # its own session; more than one process it cannot have
        self.process.wait()
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def outcome(self) -> Outcome:
        output, errors = (bytes(self.text[name]).decode("utf-8", "replace") for name in ("output", "errors"))
        code = self.process.returncode
        if self.stopped:
            return Outcome(self.stopped, None, output, errors)
        if code in (-signal.SIGXCPU, -signal.SIGKILL):  # the first is the limit of processor time, the second its hard end
            return Outcome("timed out", None, output, errors)
        return Outcome("ended", code, output, errors)


def _command(program: str, limits: Limits) -> list[str]:
    most = {resource.RLIMIT_CPU: limits.seconds, resource.RLIMIT_AS: limits.memory_bytes, resource.RLIMIT_FSIZE: 0,
            resource.RLIMIT_NOFILE: 64, resource.RLIMIT_CORE: 0}
    settings = json.dumps({"program": program, "limits": most, "parent": os.getpid()})
    return [os.path.realpath(sys.executable), "-I", "-S", "-B", jail.__file__, settings]


def _source(program: str) -> bytes | None:
    """Return what is written to the file; None for what is no text, or too much."""
    try:
        source = program.encode("utf-8")
    except UnicodeEncodeError:  # half a character
        return None
    return source if len(source) <= _LARGEST_PROGRAM else None


def _start(number: int, source: bytes, folder: Path, limits: Limits, selector: selectors.BaseSelector) -> _Running:
    own = folder / str(number)
    file = own / "program.py"
    with or_disk_error(file):
        own.mkdir()
        file.write_bytes(source)
    process = subprocess.Popen(_command(str(file), limits), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env={}, cwd=own, start_new_session=True, bufsize=0)
    running = _Running(number, process, own, time.monotonic() + limits.wall_seconds)
    for name, pipe in (("output", process.stdout), ("errors", process.stderr)):
        assert pipe is not None
        selector.register(pipe, selectors.EVENT_READ, (running, name))
    return running


def _advance(running: set[_Running], selector: selectors.BaseSelector, limits: Limits) -> list[_Running]:
    """Wait until something happens, read what was printed, and return the programs that are done, ended."""
    if not running:
        return []
    rest = min(program.deadline for program in running) - time.monotonic()
    for key, _ in selector.select(min(max(0.0, rest), _LONGEST_WAIT)):
        program, name = key.data
        block = os.read(key.fd, _BLOCK)
        if not block:
            selector.unregister(key.fileobj)
            program.open -= 1
        text = program.text[name]
        text += block[: limits.output_bytes - len(text)]
        if len(text) >= limits.output_bytes:
            program.stopped = "too much output"
    now, done = time.monotonic(), []
    for program in sorted(running, key=lambda one: one.number):
        if not program.open:  # who closes both pipes has nothing more to say: it may only end
            with suppress(subprocess.TimeoutExpired):
                program.process.wait(1.0)
            if program.process.returncode is None:
                program.stopped = "timed out"
        elif program.stopped is None and program.deadline <= now:
            program.stopped = "timed out"
        if not program.open or program.stopped:
            for pipe in (program.process.stdout, program.process.stderr):
                with suppress(KeyError):
                    selector.unregister(pipe)
            program.end()
            done.append(program)
    return done
