"""Limits of time that mean the same on another machine: what a test bounds is our work, not the machine's speed."""

from __future__ import annotations

import os
import time

_YARDSTICK_STEPS = 500_000
_YARDSTICK_S = 0.026
"""Processor time of the yardstick on the machine on which the limits were chosen, idle."""


def processor(seconds: float) -> float:
    """Return a limit of processor time, longer where this machine is slower at this moment.

    A busy neighbour on the same core, a lower clock and older silicon all lengthen processor time too.
    """
    began, total = time.process_time(), 0
    for number in range(_YARDSTICK_STEPS):
        total += number % 7
    return seconds * max(1.0, (time.process_time() - began) / _YARDSTICK_S)


def patient(seconds: float) -> float:
    """Return a limit by the clock: that of `processor`, and wider where processes queue for a core."""
    return processor(seconds) * (1 if os.getloadavg()[0] < (os.cpu_count() or 1) else 8)
