"""What an optimizer step did, told without waiting for the device; and who waits for it, one step later."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor


class Answer(Protocol):
    """Yes or no: a plain bool, or one that the device still has to give."""

    def __bool__(self) -> bool:
        """Return it, after waiting where that is needed."""


class DelayedFlag:
    """A yes or no on its way from the device to the host; asking for it waits until it is there."""

    def __init__(self, flag: Tensor) -> None:
        """Send it: [] bool, as it is now; what is written to it later does not count."""
        self._arrived: torch.cuda.Event | None = None
        if flag.is_cuda:
            self._host = torch.empty((), dtype=torch.bool, pin_memory=True)
            self._host.copy_(flag, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._host = flag.clone()

    def __bool__(self) -> bool:
        """Wait for the step that it belongs to, and for nothing that was begun after it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._host)


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did; the tensors stay where they were computed until somebody reads them."""

    loss: Tensor
    """Mean nats per valid token of the global batch, before the update."""
    grad_norm: Tensor | float
    """Global norm of the gradient, before clipping."""
    skipped: Answer = False
    """The gradient was not finite on some process, so no weight moved on any; in fp16 the scale was lowered as well."""


_Step = TypeVar("_Step")


class RunAhead(Generic[_Step]):
    """Steps whose outcome may still be on the device, and what is to be done with it: in order, one step late.

    While the device computes a step, the host launches the next one, and only then asks how the former went. An outcome
    that is a plain bool is known, and is dealt with at once.
    """

    def __init__(self, deal_with: Callable[[_Step, bool], None]) -> None:
        """Prepare; `deal_with` is called once for every step, with what was launched and whether it was skipped."""
        self._deal_with = deal_with
        self._waiting: list[tuple[_Step, Answer]] = []

    def launched(self, step: _Step, skipped: Answer) -> None:
        """Take a step that was launched, and deal with those before it."""
        self.drain()
        self._waiting.append((step, skipped))
        if isinstance(skipped, bool):
            self.drain()

    def drain(self) -> None:
        """Wait for every step that was launched, and deal with it; before a state is logged, measured or kept."""
        while self._waiting:
            step, skipped = self._waiting.pop(0)
            self._deal_with(step, bool(skipped))
