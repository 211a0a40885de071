"""End a run that no longer moves: sections with a time limit, and a process beside each that sees to it."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_ttl.config.deepspeed import WatchdogConfig
from megatron_ttl.console import print_warning
from megatron_ttl.errors import ExitCode
from megatron_ttl.runtime import describe_process, leave_word
from megatron_ttl.train import guardian

_LIMITS = {"set-up": "set_up_s", "step": "step_s", "save": "save_s", "evaluate": "evaluate_s"}
_CLOSE_WAIT_S = 5.0
_LOOK_US, _LOOKS = 3_000, 200
_NOT_FOR_IT = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


class Watchdog:
    """Tell the guardian in which section this process is and that it moves; a context manager.

    A section that does not move for longer than its limit ends the process with status 70, or by SIGKILL where not
    even that is possible, and leaves the stacks of its threads in the run folder.
    """

    def __init__(self, limits: WatchdogConfig | None = None, run_dir: Path = Path(), rank: int = 0,
                 world_size: int = 1) -> None:
        """Prepare.

        Args:
            limits: seconds of each section; None watches nothing.
            run_dir: stacks go to `stacks/` there.
            rank: of this process.
            world_size: of the run.
        """
        self._limits = limits
        self._who = f"rank {rank} of {world_size} ({describe_process()})"
        self.stacks_path = run_dir.absolute() / "stacks" / f"rank-{rank:05d}.txt"
        self._section, self._step = "set-up", 0
        self._beats: int | None = None
        self._guardian: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Watchdog:
        if self._limits is not None:
            try:
                self._start()
            except OSError as error:
                print_warning(f"watchdog: could not be started ({error.strerror}); a run that hangs will not be ended")
        return self

    def _start(self) -> None:
        # Not in the run folder: a run that never hangs leaves nothing there.
        self._stacks = tempfile.TemporaryFile()
        faulthandler.register(signal.SIGUSR2, file=self._stacks, all_threads=True)
        received, self._beats = os.pipe()
        requests, asked = os.pipe()
        os.set_blocking(self._beats, False)
        inherited = (received, asked, self._stacks.fileno())
        command = [sys.executable, "-I", guardian.__file__, str(os.getpid()), *map(str, inherited),
                   str(self.stacks_path), self._who]
        # What asks the training to stop is sent to all of its family; from its first moment it must not hear it.
        former = signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_FOR_IT)
        try:
            self._guardian = subprocess.Popen(command, pass_fds=inherited, stdin=subprocess.DEVNULL)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, former)
            os.close(received)
            os.close(asked)
        word = f"watchdog: {self._who} hung; its stacks are in {self.stacks_path}"
        threading.Thread(target=_obey, args=(requests, self._stacks.fileno(), word), name="watchdog", daemon=True).start()
        self.beat()

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Count what is inside as a section of its own: `step`, `save` or `evaluate`."""
        former, self._section = self._section, name
        self.beat()
        try:
            yield
        finally:
            self._section = former
            self.beat()

    def beat(self, step: int | None = None) -> None:
        """Say that the section moves; its time begins anew."""
        self._step = self._step if step is None else step
        if self._beats is None or self._limits is None:
            return
        limit = getattr(self._limits, _LIMITS[self._section]) or 0
        doing = f" after step {self._step:,}"
        with contextlib.suppress(BlockingIOError, BrokenPipeError):  # one that reads no more is no reason to stop
            os.write(self._beats, f"{self._section} {limit} {doing}\n".encode())

    def keep_stacks(self) -> None:
        """Write what every thread of this process is doing now to where the guardian would."""
        with contextlib.suppress(OSError):
            self.stacks_path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.stacks_path, "w", encoding="utf-8") as handle:
                faulthandler.dump_traceback(handle, all_threads=True)

    def __exit__(self, *_: object) -> None:
        if self._guardian is None or self._beats is None:
            return
        os.close(self._beats)  # which is how it learns that nothing is left to do
        self._beats = None
        try:
            self._guardian.wait(_CLOSE_WAIT_S)
        except subprocess.TimeoutExpired:
            self._guardian.kill()
            self._guardian.wait()
        faulthandler.unregister(signal.SIGUSR2)
        self._stacks.close()


def _obey(requests: int, stacks: int, word: str) -> None:
    """Wait for the guardian's request, and leave when the stacks are written; the pipe's end says that none will come.

    In a process that was stopped the main thread writes them at this moment, from a signal handler that does not need the
    interpreter's lock. The lock is kept meanwhile, or what was stopped would go on.
    """
    library = ctypes.PyDLL(None)  # whose calls keep the lock, other than those of `os` and `time`
    if os.read(requests, 1):
        leave_word(word, word)
        sys.setswitchinterval(1.0)  # seconds until Python itself would give it to another thread
        before, looks = 0, 0
        while looks < _LOOKS and (not (size := library.lseek(stacks, 0, os.SEEK_END)) or size != before):
            before, looks = size, looks + 1
            library.usleep(_LOOK_US)
        os._exit(int(ExitCode.HANG))
    os.close(requests)
