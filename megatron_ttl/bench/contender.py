"""One way to take an optimizer step, and how several of them are timed turn about."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_ttl.bench.workload import Workload
from megatron_ttl.console import progress
from megatron_ttl.errors import UserError
from megatron_ttl.parallel.pipeline import MicroBatches


class NotInstalled(UserError):
    """A peer's library is not here; its row says so."""


def not_installed(library: str, error: ImportError) -> NotInstalled:
    """Return what to raise where a peer's library cannot be imported."""
    return NotInstalled(f"{library}: cannot be imported ({error}); it is compared with only where it is installed; "
                        f"pip install {library}")


class Contender(Protocol):
    """A model with its optimizer, ready to train."""

    note: str
    """What it is made of, for the row."""

    def step(self, micro_batches: MicroBatches) -> Tensor:
        """Take one optimizer step and return its mean loss, still on the device."""

    def close(self) -> None:
        """Give the memory back."""


Builder = Callable[[Workload], Contender]


@dataclass
class Trial:
    """What the steps of one contender took, over all its turns."""

    seconds: list[float] = field(default_factory=list)
    loss: float | None = None
    peak_memory_bytes: int | None = None
    note: str = ""
    fault: str = ""

    def tokens_per_s(self, tokens: int, best: bool = False) -> float | None:
        """Return the speed of the median step, or of the best one."""
        if not self.seconds or self.fault:
            return None
        return tokens / (min(self.seconds) if best else statistics.median(self.seconds))


def run_trials(builders: Mapping[str, Builder], workload: Workload, steps: int, rounds: int,
               warm_up: int) -> dict[str, Trial]:
    """Let each contender take its turn in every round, forward and backward through the list, and time its steps.

    A turn builds the contender anew and gives its memory back, for together they would not fit on a device. What goes
    wrong with one of them is its row.

    Args:
        builders: by name, in the order of the first round.
        workload: what is trained.
        steps: timed steps of a turn.
        rounds: turns of each.
        warm_up: steps before those.
    """
    trials = {name: Trial() for name in builders}
    with progress("measuring", rounds * len(builders), " turns") as report:
        for turn in range(rounds):
            for number, name in enumerate(reversed(builders) if turn % 2 else builders):
                if not trials[name].fault:
                    _take_turn(trials[name], builders[name], workload, steps, warm_up)
                report(turn * len(builders) + number + 1)
    return trials


def _take_turn(trial: Trial, build: Builder, workload: Workload, steps: int, warm_up: int) -> None:
    device = workload.device
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    try:
        with switches_restored(), closing(build(workload)) as contender, workload.batches() as batches:
            trial.note = contender.note
            for _ in range(warm_up):
                contender.step(next(batches))
            seconds, losses = time_steps(lambda: contender.step(next(batches)), steps, device)
            trial.seconds += seconds
            trial.loss = float(losses[-1])
    except torch.OutOfMemoryError:
        trial.fault = "out of memory"
    except UserError as error:
        trial.fault = "not installed" if isinstance(error, NotInstalled) else f"not available: {error.faults[0]}"
    except Exception as error:  # noqa: BLE001 -- a peer may fail in any way
        trial.fault = f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    finally:
        if cuda:
            trial.peak_memory_bytes = max(trial.peak_memory_bytes or 0, torch.cuda.max_memory_allocated(device))
        free_memory(device)


@contextmanager
def switches_restored() -> Iterator[None]:
    """Put PyTorch's switches of the whole process back: attention backends, and tf32."""
    backends = torch.backends.cuda
    pairs = ((backends.flash_sdp_enabled, backends.enable_flash_sdp),
             (backends.mem_efficient_sdp_enabled, backends.enable_mem_efficient_sdp),
             (backends.math_sdp_enabled, backends.enable_math_sdp), (backends.cudnn_sdp_enabled, backends.enable_cudnn_sdp))
    before, tf32 = [read() for read, _ in pairs], backends.matmul.allow_tf32
    try:
        yield
    finally:
        for (_, switch), value in zip(pairs, before, strict=True):
            switch(value)
        backends.matmul.allow_tf32 = tf32


def time_steps(step: Callable[[], Tensor], steps: int, device: torch.device) -> tuple[list[float], list[Tensor]]:
    """Return the seconds of each step and what it returned.

    On a GPU by events between the steps, so that nothing waits for the device before the last one.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        marks[0].record()
        losses = []
        for mark in marks[1:]:
            losses.append(step())
            mark.record()
        torch.cuda.synchronize(device)
        return [before.elapsed_time(after) / 1e3 for before, after in itertools.pairwise(marks)], losses
    seconds, losses = [], []
    for _ in range(steps):
        began = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - began)
    return seconds, losses


def free_memory(device: torch.device) -> None:
    """Drop what nobody holds, and give the device's memory back."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def trial_rows(trials: Mapping[str, Trial], workload: Workload, reference: str) -> list[dict[str, Any]]:
    """Return a row per contender; ratios say how many times as fast the reference is."""
    tokens = workload.run.train.tokens_per_step
    rows = []
    for name, trial in trials.items():
        speed = trial.tokens_per_s(tokens)
        row: dict[str, Any] = {"name": name, "tokens_per_s": speed}
        for key, best in (("ratio", False), ("ratio_of_minima", True)):
            own, ours = trial.tokens_per_s(tokens, best), trials[reference].tokens_per_s(tokens, best)
            row[key] = ours / own if own and ours else None
        row |= {"mfu": workload.utilisation(speed) if speed else None, "peak_memory_bytes": trial.peak_memory_bytes,
                "median_ms": 1e3 * tokens / speed if speed else None,
                "minimum_ms": 1e3 * min(trial.seconds) if speed else None, "loss": trial.loss,
                "note": trial.fault or trial.note}
        rows.append(row)
    return rows


def settings_faults(numbers: Mapping[str, float], least: float = 1) -> list[str]:
    """Return the faults of options that must not be below a number."""
    return [f"--{name}: is {value}; it must be at least {least}; leave it out" for name, value in numbers.items()
            if value < least]


def unknown_names(option: str, asked: Sequence[str], known: Sequence[str]) -> list[str]:
    """Return the faults of names that are none of those that are known."""
    return [f"--{option}: {name!r}; it must be one of {', '.join(known)}; correct it" for name in asked if name not in known]
