"""The processes of a job that a test started, and what is left of them when it has ended."""

from __future__ import annotations

import contextlib
import os
import signal
import time

from patience import patient


class JobProcesses:
    """A job says who its processes are; this waits for them and ends them."""

    def members(self) -> list[int]:
        """Living processes of the job."""
        raise AssertionError("every kind of job says it")

    def wait_for_orphans(self, timeout_s: float) -> list[int]:
        """Give what is left some time to end; return whoever did not, and end it."""
        deadline = time.monotonic() + patient(timeout_s)
        while (left := self.members()) and time.monotonic() < deadline:
            time.sleep(0.02)
        self.end()
        return left

    def end(self) -> None:
        """Kill what is left of it."""
        for pid in self.members():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
