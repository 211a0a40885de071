"""Mirror the rows of metrics to Weights & Biases and to TensorBoard: the only door to both.

A mirror may be missing, raise, or block; training takes no notice. All calls to it are made by a daemon thread of its
own, which is fed through a bounded queue: a row that finds it full is dropped and counted. Each mirror says at most one
thing that is wrong. `metrics.jsonl` has every row.
"""

from __future__ import annotations

import math
import os
import queue
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from megatron_ttl.config.schema import LogConfig
from megatron_ttl.console import print_warning
from megatron_ttl.runtime import set_default_variable

_QUEUE_ROWS = 1000
_INIT_WAIT_S = 15
_CLOSE_WAIT_S = 20.0
_LET_GO_WAIT_S = 1.0


class Remote(Protocol):
    """What a mirror needs of whatever draws the curves."""

    def log(self, row: dict[str, Any], step: int) -> None:
        """Take one row."""

    def finish(self) -> None:
        """Write what is left and end."""


class Mirror:
    """Send rows to one remote in the background; every failure is one warning, and silence after it.

    `abandon` is called after a failure, and at the end when there is no answer: whatever the library would still wait
    for when the process ends, it lets go of.
    """

    def __init__(self, name: str, open_remote: Callable[[], Remote],
                 abandon: Callable[[], object] | None = None) -> None:
        self._name, self._abandon = name, abandon
        self._handed_over = self._arrived = 0
        self._failed = self._warned = self._ended = False
        self._rows: queue.Queue[tuple[dict[str, Any], int] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, args=(open_remote,), name=name, daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # no more threads
            self._fail(error)

    def log(self, row: dict[str, Any], step: int) -> None:
        """Hand over a row without waiting."""
        self._handed_over += 1
        if not self._failed and self._rows.qsize() < _QUEUE_ROWS:
            self._rows.put((row, step))

    @property
    def missing_rows(self) -> int:
        """Rows handed over that the remote has not taken: on their way, or lost."""
        return self._handed_over - self._arrived

    def end(self) -> None:
        """Say that there are no more rows, without waiting."""
        if not self._ended:
            self._ended = True
            self._rows.put(None)

    def wait(self, seconds: float) -> None:
        """Wait until the last row has arrived, but no longer than this; say how many did not."""
        self.end()
        if self._thread.ident is not None:
            self._thread.join(max(0.0, seconds))
        if self._thread.is_alive():
            self._warn(f"it does not answer; it took {self._arrived} of {self._handed_over} rows")
            leaving = threading.Thread(target=self._let_go, name=f"{self._name} let go", daemon=True)
            leaving.start()
            leaving.join(_LET_GO_WAIT_S)
        elif self.missing_rows:
            self._warn(f"it was too slow; it took {self._arrived} of {self._handed_over} rows")

    def _work(self, open_remote: Callable[[], Remote]) -> None:
        try:
            remote = open_remote()
            while (item := self._rows.get()) is not None:
                remote.log(item[0], step=item[1])
                self._arrived += 1
            remote.finish()
        except BaseException as error:  # not even a SystemExit of a library's may end the run
            self._fail(error)
            self._let_go()

    def _let_go(self) -> None:
        with suppress(BaseException):
            if self._abandon is not None:
                self._abandon()

    def _fail(self, error: BaseException) -> None:
        self._failed = True
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        self._warn(f"{reason}; it took {self._arrived} rows, and the run goes on without it")

    def _warn(self, fault: str) -> None:
        if not self._warned:
            self._warned = True
            print_warning(f"{self._name}: {fault}; metrics.jsonl has every row")


class Mirrors:
    """The mirrors that the run file asks for.

    `wandb_run_id` names the run at wandb, None without it. Give it again when the run goes on, and wandb continues the
    same curves.
    """

    def __init__(self, log: LogConfig, run_dir: Path, settings: dict[str, Any],
                 wandb_run_id: str | None = None) -> None:
        self.wandb_run_id: str | None = None
        self._mirrors: list[Mirror] = []
        if log.wandb != "disabled":
            run_id = self.wandb_run_id = wandb_run_id or secrets.token_hex(4)
            self._mirrors.append(Mirror("wandb", lambda: WandbRun(log, run_dir, settings, run_id), tear_down_wandb))
        if log.tensorboard:
            self._mirrors.append(Mirror("tensorboard", lambda: TensorBoardFile(run_dir / "tensorboard")))

    def log(self, row: dict[str, Any], step: int) -> None:
        """Hand over a row to each without waiting."""
        for mirror in self._mirrors:
            mirror.log(row, step)

    def close(self) -> None:
        """Wait until the last row has arrived everywhere, but no longer than twenty seconds in all."""
        until = time.monotonic() + _CLOSE_WAIT_S
        for mirror in self._mirrors:
            mirror.end()
        for mirror in self._mirrors:
            mirror.wait(until - time.monotonic())
        self._mirrors = []


class WandbRun:
    """A run at wandb; with `offline`, files under `<run_dir>/wandb` that `wandb sync` uploads later."""

    def __init__(self, log: LogConfig, run_dir: Path, settings: dict[str, Any], run_id: str) -> None:
        # wandb would report its own faults to its maker, and wait ten seconds for that at the end where nobody answers.
        set_default_variable("WANDB_ERROR_REPORTING", "false")
        import wandb

        require_writable(run_dir / "wandb")  # where it cannot write, wandb quietly takes a temporary folder
        # console="off": what the run prints stays where the user sees it. No git, no code: the run folder has it.
        quiet = wandb.Settings(init_timeout=_INIT_WAIT_S, finish_timeout=_INIT_WAIT_S, finish_timeout_raises=True,
                               console="off", silent=True, disable_git=True, save_code=False)
        wandb.setup(quiet)
        self._run = wandb.init(mode=log.wandb, project=log.wandb_project, name=run_dir.name, id=run_id, resume="allow",
                               config=settings, dir=str(run_dir), settings=quiet)

    def log(self, row: dict[str, Any], step: int) -> None:
        """Hand over a row to wandb's own process."""
        self._run.log(row, step=step)

    def finish(self) -> None:
        """Wait until wandb's own process has sent all and has ended."""
        self._run.finish()
        tear_down_wandb()


def tear_down_wandb() -> None:
    """Let wandb's own process end, and take back the promise to wait for it, however long, when Python exits."""
    import wandb

    wandb.teardown()


class TensorBoardFile:
    """An event file in a folder that `tensorboard --logdir` shows.

    Written with tensorboard's record writer. Its `EventFileWriter`, which torch's `SummaryWriter` uses too, has a
    thread of its own that prints a traceback when the disk is full, and loads TensorFlow where that is installed.
    """

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        require_writable(folder)
        self._event, self._session, self._summary = Event, SessionLog, Summary
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._writer = RecordWriter(open(folder / name, "ab"))
        self._write(file_version="brain.Event:2")
        self._begun = False

    def log(self, row: dict[str, Any], step: int) -> None:
        """Write the figures of a row; the first one takes back what a killed run wrote of its steps."""
        if not self._begun:
            self._begun = True
            first = step + 1 if row.get("event") == "resume" else step
            self._write(step=first, session_log=self._session(status=self._session.START))
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in figures(row)]
        if values:
            self._write(step=step, summary=self._summary(value=values))

    def finish(self) -> None:
        """Close the file."""
        self._writer.close()

    def _write(self, **fields: Any) -> None:
        self._writer.write(self._event(wall_time=time.time(), **fields).SerializeToString())
        self._writer.flush()  # so that a killed run has its last row, and a full disk speaks at once


def figures(row: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the curves of a row: `loss`, `epochs/data/pt`. An event that only happened has none."""
    if row.get("event") in ("resume", "checkpoint"):
        return
    for key, value in row.items():
        if isinstance(value, dict):
            yield from ((f"{key}/{name}", number) for name, number in figures(value))
        elif key != "step" and isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            yield key, float(value)


def require_writable(folder: Path) -> None:
    """Make a folder, and see that it takes a file.

    Raises:
        OSError: why not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as probe:
        probe.write(b"\0" * 4096)
