"""The learning rate as a pure function of the optimizer step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megatron_ttl.config.schema import RunFile


@dataclass(frozen=True)
class Schedule:
    """Warm-up, then cosine, warm-up-stable-decay, or constant.

    All lengths are optimizer steps. Step numbers start at 1, so the first update has lr = peak / warm-up and the last
    one has `min_lr`; `at(0)` is the value before any update.
    """

    kind: Literal["cosine", "wsd", "constant"]
    peak_lr: float
    min_lr: float
    warmup_steps: int
    decay_steps: int
    total_steps: int
    decay_shape: Literal["linear", "sqrt"] = "sqrt"

    @classmethod
    def of(cls, run: RunFile) -> Schedule:
        """Read the schedule out of a checked run file."""
        return cls(run.schedule.kind, run.optimizer.lr, run.schedule.min_lr, run.warmup_steps, run.decay_steps,
                   run.total_steps, run.schedule.decay_shape)

    def at(self, step: int) -> float:
        """Return the learning rate of optimizer step `step`, 0 <= step <= total.

        Source: cosine, Loshchilov & Hutter 2017; warm-up-stable-decay, Hu et al. 2024 (MiniCPM); 1 - sqrt, Hägele et
        al. 2024.
        """
        assert 0 <= step <= self.total_steps, (step, self.total_steps)
        if step < self.warmup_steps:
            return self.peak_lr * step / self.warmup_steps
        if self.kind == "cosine":
            progress = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
            return self.min_lr + (self.peak_lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
        if self.kind == "wsd":
            progress = max(0.0, (step - self.total_steps + self.decay_steps) / self.decay_steps)
            remaining = 1 - (math.sqrt(progress) if self.decay_shape == "sqrt" else progress)
            return self.min_lr + (self.peak_lr - self.min_lr) * remaining
        return self.peak_lr
