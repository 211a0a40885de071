"""Being asked to stop: Ctrl-C, SIGTERM and SIGUSR1 set a flag that the loop reads between two steps.

Before several processes have met there is nothing to keep, and one that waited for a vote would wait in vain: they leave
at once. A second Ctrl-C is answered, a third one ends the process without a checkpoint; SIGTERM and SIGUSR1, which
launchers and schedulers like to repeat, may come as often as they please.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType

from megatron_ttl.errors import ExitCode

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# A launcher passes on to its processes the Ctrl-C that the terminal has given to all of them: that is one, not two.
_SAME_CTRL_C_S = 1.0


class StopRequest:
    """A flag that signals raise; while it is installed none of the three ends a process that has something to keep.

    Python calls its handlers between two instructions, not while torch waits in C++. So the handler sets the flag and no
    more, and what must happen meanwhile a thread does, which the interpreter's C handler wakes through a pipe.
    """

    def __init__(self, speaks: bool = True, waits_for_peers: bool = False, to_the_end: bool = False) -> None:
        """Prepare a flag.

        Args:
            speaks: whether this process says that it was asked; of several, one is enough.
            waits_for_peers: whether a signal ends the process at once, until `met` is called.
            to_the_end: whether the process has nothing left to do afterwards but to end; a signal is ignored then, or it
                would be the exit code of a run that is done.
        """
        self._speaks = speaks
        self._waits_for_peers = waits_for_peers
        self._to_the_end = to_the_end
        self.signal_name: str | None = None
        self._interrupts: list[float] = []
        self._previous: dict[int, object] = {}

    @property
    def is_set(self) -> bool:
        """Whether somebody asked this process to stop."""
        return self.signal_name is not None

    def met(self) -> None:
        """From now on a signal asks for a vote and a checkpoint."""
        self._waits_for_peers = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = self.signal_name or signal.Signals(number).name

    def _listen(self, pipe: int) -> None:
        answered = False
        while numbers := os.read(pipe, 64):
            for number in filter(_SIGNALS.__contains__, numbers):
                self._receive(number, None)
                if self._waits_for_peers:
                    self._say(f"{self.signal_name}: stopped before the processes met; there is nothing to keep")
                    os._exit(ExitCode.PREEMPTED)
                self._answer(number, first=not answered)
                answered = True

    def _answer(self, number: int, first: bool) -> None:
        now = time.monotonic()
        counts = number == signal.SIGINT and not (self._interrupts and now - self._interrupts[-1] < _SAME_CTRL_C_S)
        if counts:
            self._interrupts.append(now)
        if first:
            self._say(f"{self.signal_name}: stopping after this step; a checkpoint will be written")
        elif counts and len(self._interrupts) < 3:
            self._say("Ctrl-C: already stopping; a third one ends the run at once, without a checkpoint")
        elif counts:
            self._say("Ctrl-C for the third time: ended without a checkpoint")
            os._exit(ExitCode.INTERRUPTED)

    def _say(self, line: str) -> None:
        if self._speaks:
            print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> StopRequest:
        pipe, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        self._thread = threading.Thread(target=self._listen, args=(pipe,), name="signals", daemon=True)
        self._thread.start()
        self._pipe, self._previous_wake = pipe, signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if self._to_the_end else handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._previous_wake)
        os.close(self._wake)
        self._thread.join()  # what it had to say is said
        os.close(self._pipe)
