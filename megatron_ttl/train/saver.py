"""Write checkpoints behind the training: a step waits for the copy into host memory, not for the disk."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from megatron_ttl.checkpoint.peers import Peers, together
from megatron_ttl.checkpoint.pieces import Piece
from megatron_ttl.checkpoint.store import CheckpointStore, Saved
from megatron_ttl.console import print_warning
from megatron_ttl.errors import UserError
from megatron_ttl.parallel.mesh import is_lost_peer
from megatron_ttl.train.anomalies import DivergedError


@dataclass(frozen=True)
class Outcome:
    """How a save ended: alike on every process."""

    step: int
    tokens: int
    saved: Saved | None
    error: Exception | None
    warnings: list[str]
    stall_s: float
    """How long the training waited for it."""
    write_s: float
    """How long it took to write, and to delete old ones."""


class Saver:
    """One save at a time, on a thread of its own; a second one cannot overtake the first.

    All processes call `begin` at the same step and `settle` at the same step, so all of them learn of a failure
    together. The thread talks to those of the other processes through `peers`, which nobody else may use.
    """

    def __init__(self, store: CheckpointStore, peers: Peers, lost: Callable[[Exception], None] = lambda _: None) -> None:
        """Prepare.

        Args:
            store: where checkpoints go.
            peers: from `Mesh.background`.
            lost: called on the thread with what is no failing disk, such as the loss of another process; it may end
                this one. The training may be waiting for the same process, and have no connection that would tell.
        """
        self._store, self._peers, self._lost = store, peers, lost
        self._thread: threading.Thread | None = None
        self._outcome: Outcome | None = None
        self.stall_s = 0.0  # of the pending save: set by whoever begins it, for the copy is made there

    @property
    def pending(self) -> bool:
        """Whether a save was begun and not yet settled; alike on every process."""
        return self._thread is not None

    @property
    def written(self) -> bool:
        """Whether this process's part of the pending save has come to its end."""
        return self._thread is not None and not self._thread.is_alive()

    def begin(self, step: int, pieces: Mapping[str, Mapping[str, Tensor | Piece]], record: Mapping[str, Any]) -> None:
        """Begin to write; what is given must not change any more, and belongs to the saver.

        Args:
            step: optimizer steps taken.
            pieces: from `capture`, which copies.
            record: the small part of a checkpoint.
        """
        assert not self.pending, "the former save is not settled"
        # No daemon: Python waits for it at the end, however the end comes.
        self._thread = threading.Thread(target=self._write, args=(step, pieces, record), name="checkpoint")
        self._thread.start()

    def settle(self) -> Outcome:
        """Wait until the pending save has come to its end, and say how."""
        assert self._thread is not None, "no save was begun"
        began = time.perf_counter()
        self._thread.join()
        self._thread, outcome = None, self._outcome
        assert outcome is not None
        return replace(outcome, stall_s=self.stall_s + time.perf_counter() - began)

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """Wait for what is being written: a run that fails now still keeps what it had, unless a process is lost."""
        if self.pending and not (error is not None and is_lost_peer(error)):
            fault = self.settle().error
            if fault is not None:
                print_warning(f"the last checkpoint was not kept: {fault}")

    def _write(self, step: int, pieces: Mapping[str, Mapping[str, Tensor | Piece]], record: Mapping[str, Any]) -> None:
        began = time.perf_counter()
        saved, fault = None, None
        try:
            require_finite(pieces["weights"], self._peers, step)
            saved = self._store.save(step, pieces, record, self._peers)
        except Exception as error:  # raised where the training looks
            fault = error
            if not isinstance(error, UserError):
                self._lost(error)
        self._outcome = Outcome(step, record["consumed_tokens"], saved, fault, list(self._store.warnings),
                                stall_s=0.0, write_s=time.perf_counter() - began)


def require_finite(weights: Mapping[str, Tensor | Piece], peers: Peers, step: int) -> None:
    """Look at every weight before a checkpoint of it may push out a better one; every process must call.

    Raises:
        DivergedError: on every process, if any holds a weight that is no number.
    """
    def look() -> list[str]:
        tensors = {name: getattr(piece, "tensor", piece) for name, piece in weights.items()}
        return [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]

    broken = sorted({name for found in together(peers, look) for name in found})
    if broken:
        raise DivergedError(f"step {step}: {len(broken)} tensors hold what is no number ({', '.join(broken[:3])}); weights "
                            "must be finite; this state is not kept: go on from the checkpoint before with a lower "
                            "optimizer.lr or train.gradient_clipping")
