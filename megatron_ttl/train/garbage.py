"""Python's garbage collector, at times of our choosing: a pass over a million objects takes as long as several steps."""

from __future__ import annotations

import gc
from types import TracebackType


class QuietCollector:
    """Use it as a context manager around the steps; what it found is put back in the end."""

    def __init__(self) -> None:
        self._was_enabled = gc.isenabled()
        self._frozen = False

    def settle(self) -> None:
        """After the first step: forget what is garbage, take the rest for permanent, and look no more by itself."""
        if not self._frozen:
            gc.collect()
            gc.freeze()
            gc.disable()
            self._frozen = True

    def collect(self) -> None:
        """Look now, between two steps, at what came since the first one."""
        if self._frozen:
            gc.collect()

    def __enter__(self) -> QuietCollector:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._frozen:
            gc.unfreeze()
            if self._was_enabled:
                gc.enable()
