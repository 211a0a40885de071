"""Being asked to stop: Ctrl-C, SIGTERM and SIGUSR1 set a flag that the loop reads between two steps."""

from __future__ import annotations

import signal
import sys
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """A flag that signals raise; while it is installed no signal of the three ends the process by itself."""

    def __init__(self, speaks: bool = True) -> None:
        """Prepare a flag.

        Args:
            speaks: whether this process says that it was asked; of several, one is enough.
        """
        self._speaks = speaks
        self.signal_name: str | None = None
        self._previous: dict[int, object] = {}

    @property
    def is_set(self) -> bool:
        """Whether somebody asked this process to stop."""
        return self.signal_name is not None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name is None:
            self.signal_name = signal.Signals(number).name
            if not self._speaks:
                return
            print(f"{self.signal_name}: stopping after this step; a checkpoint will be written", file=sys.stderr,
                  flush=True)

    def __enter__(self) -> StopRequest:
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
