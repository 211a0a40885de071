"""Mirror the rows of metrics to Weights & Biases: the only door to wandb.

A mirror may be missing, raise, or block; training takes no notice. All calls to wandb are made by one daemon
thread, which is fed through a bounded queue: a row that finds it full is dropped and counted. `metrics.jsonl`
has every row.
"""

from __future__ import annotations

import queue
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from megatron_ttl.config.schema import LogConfig
from megatron_ttl.console import print_warning

_QUEUE_ROWS = 1000
_INIT_WAIT_S = 15
_CLOSE_WAIT_S = 20.0


class Remote(Protocol):
    """What the mirror needs of a wandb run."""

    def log(self, row: dict[str, Any], step: int) -> None:
        """Take one row."""

    def finish(self) -> None:
        """Write what is left and end."""


class WandbMirror:
    """Send rows to wandb in the background; every failure is one warning, and silence after it.

    `run_id` names the run there. Give it again when the run goes on, and wandb continues the same curves.
    """

    def __init__(self, log: LogConfig, run_dir: Path, name: str, settings: dict[str, Any],
                 run_id: str | None = None, open_run: Callable[[], Remote] | None = None) -> None:
        self.run_id: str | None = None
        self._handed_over = self._arrived = 0
        self._fault: str | None = None
        self._rows: queue.Queue[tuple[dict[str, Any], int] | None] = queue.Queue(_QUEUE_ROWS)
        self._thread: threading.Thread | None = None
        if log.wandb == "disabled":
            return
        self.run_id = run_id or secrets.token_hex(4)
        opener = open_run or (lambda: open_wandb(log, Path(run_dir), name, settings, self.run_id))
        self._thread = threading.Thread(target=self._work, args=(opener,), name="wandb", daemon=True)
        self._thread.start()

    def log(self, row: dict[str, Any], step: int) -> None:
        """Hand over a row without waiting."""
        if self._thread is None:
            return
        self._handed_over += 1
        if self._fault is None:
            with suppress(queue.Full):
                self._rows.put_nowait((row, step))

    @property
    def missing_rows(self) -> int:
        """Rows handed over that wandb has not taken: on their way, or lost."""
        return self._handed_over - self._arrived

    def close(self) -> None:
        """Wait until the last row has arrived, but no longer than twenty seconds; say how many did not."""
        if self._thread is None:
            return
        end = time.monotonic() + _CLOSE_WAIT_S
        if self._thread.is_alive():
            with suppress(queue.Full):
                self._rows.put(None, timeout=_CLOSE_WAIT_S)
            self._thread.join(max(0.0, end - time.monotonic()))
        if self._thread.is_alive() and self._fault is None:
            self._fail("it does not answer")
        if self.missing_rows:
            print_warning(f"wandb: {self.missing_rows} rows did not get through; metrics.jsonl has them all")
        self._thread = None

    def _work(self, open_run: Callable[[], Remote]) -> None:
        try:
            remote = open_run()
            while (item := self._rows.get()) is not None:
                remote.log(item[0], step=item[1])
                self._arrived += 1
            remote.finish()
        except BaseException as error:  # not even a SystemExit of wandb's may end the run
            self._fail(" ".join(f"{type(error).__name__}: {error}".split())[:200])

    def _fail(self, fault: str) -> None:
        self._fault = fault
        print_warning(f"wandb: {fault}; the run goes on without it, metrics.jsonl has every row")


def open_wandb(log: LogConfig, run_dir: Path, name: str, settings: dict[str, Any],
               run_id: str | None) -> Remote:
    """Open a run; with `offline`, files under `<run_dir>/wandb` that `wandb sync` uploads later."""
    import wandb

    run_dir.mkdir(parents=True, exist_ok=True)
    # console="off": what the run prints stays where the user sees it. No git, no code: the run folder has it.
    quiet = wandb.Settings(init_timeout=_INIT_WAIT_S, finish_timeout=_INIT_WAIT_S, console="off", silent=True,
                           disable_git=True, save_code=False)
    return wandb.init(mode=log.wandb, project=log.wandb_project, name=name, id=run_id, resume="allow",
                      config=settings, dir=str(run_dir), settings=quiet)
