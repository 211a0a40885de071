"""The processes that write and read one checkpoint together, as the store sees them."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from typing import Any, Protocol

from megatron_ttl.errors import CheckpointError, DiskError, raise_faults


class Peers(Protocol):
    """Who takes part, and how they tell each other something: a `Mesh`."""

    @property
    def rank(self) -> int:
        """This process's number."""

    @property
    def world_size(self) -> int:
        """How many there are."""

    def gather_text(self, text: str) -> list[str]:
        """Return every process's text, by rank; every process must call."""


class _Alone:
    rank = 0
    world_size = 1

    def gather_text(self, text: str) -> list[str]:
        return [text]


ALONE: Peers = _Alone()
_KINDS = {kind.__name__: kind for kind in (CheckpointError, DiskError)}


class PeerFailedError(RuntimeError):
    """Another process met an error of ours, and will say so."""


def together(peers: Peers, action: Callable[[], Any]) -> list[Any]:
    """Do something on every process, and go on only if it went well on all: none is left waiting for another.

    Args:
        peers: every one of them must call.
        action: returns something that JSON can say.

    Returns:
        What each process's action returned, by rank.

    Raises:
        CheckpointError, DiskError: what the first faulty process raised, on all of them.
        Exception: an error of ours; as it is where it happened, on the others a PeerFailedError that quotes it.
    """
    fault: Exception | None = None
    result = None
    try:
        result = action()
    except Exception as error:  # also what nobody thought of: the others must hear of it, not wait
        fault = error
    if peers.world_size == 1:
        if fault is not None:
            raise fault
        return [result]
    known = type(fault) in _KINDS.values()
    answer = {"result": result,
              "kind": type(fault).__name__ if known else None, "faults": fault.faults if known else [],
              "traceback": "".join(traceback.format_exception(fault)) if fault and not known else ""}
    answers = [json.loads(text) for text in peers.gather_text(json.dumps(answer))]
    for rank, answer in enumerate(answers):  # before the disk's faults: a run survives those
        if answer["traceback"]:
            raise fault if fault and not known else PeerFailedError(f"rank {rank} failed:\n{answer['traceback']}")
    for rank, answer in enumerate(answers):
        if answer["kind"]:
            raise_faults(_KINDS[answer["kind"]], [f"rank {rank}: {text}" for text in answer["faults"]])
    return [answer["result"] for answer in answers]
