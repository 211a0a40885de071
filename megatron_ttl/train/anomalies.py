"""Numbers that go wrong: steps without a finite gradient, and losses that jump."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_ttl.errors import ExitCode, UserError

WINDOW_STEPS = 128
_ENOUGH_STEPS = 32
"""Fewer losses than these say nothing about how far they scatter."""
_SMALL_RISE = 0.02
"""Of the loss: where it hardly scatters any more, six standard deviations are nothing either."""
_NEW_LEVEL = 16
"""So many jumps in a row are the new level."""


class DivergedError(UserError):
    """The loss is no longer a number, or copies of a weight are no longer equal."""

    exit_code = ExitCode.FAILED


@dataclass(frozen=True)
class Spike:
    """A step whose loss is far above those before it."""

    step: int
    loss: float
    grad_norm: float
    expected: float
    """Where the line through the losses before it goes."""
    sigmas: float
    """How far above it, in standard deviations of those losses around the line."""


class SpikeDetector:
    """Compare each loss with the line through those of the 128 steps before it; jumps are not counted among them.

    A line, for in the first thousands of steps the fall within a window is larger than the noise. Losses stay on their
    device until `examine` looks at all of them at once, so that no step waits for it.

    Source of the rule: OLMo's step skipping (6 standard deviations over 128 steps), which we report and never act on.
    """

    def __init__(self, sigmas: float | None) -> None:
        """Prepare; `sigmas` None looks at nothing."""
        self._sigmas = sigmas
        self._waiting: list[tuple[int, Tensor, Tensor | float]] = []
        self._losses: deque[float] = deque(maxlen=WINDOW_STEPS)
        self._jumps: list[float] = []

    def observe(self, step: int, loss: Tensor, grad_norm: Tensor | float) -> None:
        """Take a step's loss, without waiting for it."""
        if self._sigmas is not None:
            self._waiting.append((step, loss, grad_norm))

    def examine(self) -> list[Spike]:
        """Look at the losses that were taken since the last time."""
        if not self._waiting:
            return []
        losses = torch.stack([loss.detach().reshape(()) for _, loss, _ in self._waiting]).tolist()
        found = []
        for (step, _, grad_norm), loss in zip(self._waiting, losses, strict=True):
            spike = self._judge(step, loss, grad_norm)
            if spike is not None:
                found.append(spike)
        self._waiting.clear()
        return found

    def _judge(self, step: int, loss: float, grad_norm: Tensor | float) -> Spike | None:
        if not math.isfinite(loss):
            return None
        if len(self._losses) >= _ENOUGH_STEPS and self._sigmas is not None:
            expected, deviation = _extrapolate(self._losses)
            if loss - expected > max(self._sigmas * deviation, _SMALL_RISE * abs(expected)):
                self._jumps.append(loss)
                if len(self._jumps) == _NEW_LEVEL:
                    self._losses = deque(self._jumps, WINDOW_STEPS)
                    self._jumps = []
                return Spike(step, loss, float(grad_norm), expected, (loss - expected) / max(deviation, 1e-12))
        self._jumps = []
        self._losses.append(loss)
        return None

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs to judge as this one; everything must be examined."""
        assert not self._waiting
        return {"losses": list(self._losses), "jumps": list(self._jumps)}

    def load(self, state: dict[str, Any] | None) -> None:
        """Go on from a state."""
        self._losses = deque((state or {}).get("losses", ()), WINDOW_STEPS)
        self._jumps = list((state or {}).get("jumps", ()))


def _extrapolate(losses: Sequence[float]) -> tuple[float, float]:
    """Fit a line by least squares; return its next value, and the standard deviation around it."""
    count = len(losses)
    middle, mean = (count - 1) / 2, math.fsum(losses) / count
    slope = math.fsum((x - middle) * y for x, y in enumerate(losses)) / (count * (count * count - 1) / 12)
    residuals = math.fsum((y - mean - slope * (x - middle)) ** 2 for x, y in enumerate(losses))
    return mean + slope * (count - middle), math.sqrt(residuals / count)


class NonFiniteSteps:
    """Count steps in a row that moved no weight because their gradient was not finite."""

    def __init__(self, allowed: int) -> None:
        """Prepare; with the `allowed`-th in a row the run ends."""
        self._allowed = allowed
        self.in_a_row = 0

    def count(self, step: int, skipped: bool, kept: list[int]) -> str | None:
        """Count a step, alike on every process.

        Args:
            step: its number.
            skipped: whether it moved no weight.
            kept: steps of the checkpoints.

        Returns:
            What is to be said of it, if anything.

        Raises:
            DivergedError: it was one too many.
        """
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        if not skipped:
            return None
        if self.in_a_row >= self._allowed:
            first = step - self.in_a_row + 1
            good = max((number for number in kept if number < first), default=0)
            raise DivergedError(f"step {step}: the gradient is not finite, {self.in_a_row} times in a row; it must be "
                                f"(train.max_nonfinite_steps); go on from step {good} with a lower optimizer.lr or "
                                f"train.gradient_clipping, or leave these steps' samples out: --skip-steps {first}-{step}")
        return (f"warning: step {step}: the gradient is not finite; no weight was moved ({self.in_a_row} in a row, "
                f"with {self._allowed} the run ends)")
