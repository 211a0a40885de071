"""Measure the way of the ids from the disk to the training step: opening, first batch, speed, and how long a step waits."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_ttl.data.causal_lm_dataset import CausalLMDataset
from megatron_ttl.data.sampler import StepBatches
from megatron_ttl.errors import ConfigError, raise_faults


def measure_loader(prefixes: Sequence[str], sequence_length: int = 2048, samples_per_step: int = 4,
                   tokens_per_s: float = 1e6, steps: int = 500, preload: bool = False) -> dict[str, Any]:
    """Return figures of the data loader on these datasets; seconds of processor time but for waits and the first batch.

    Args:
        prefixes: tokenised datasets, mixed evenly.
        sequence_length: s.
        samples_per_step: samples of an optimizer step.
        tokens_per_s: what the simulated training takes.
        steps: how many it takes.
        preload: whether the ids are read into memory first.

    Returns:
        `open_s`, `first_batch_s` (elapsed), `tokens_per_s` of one core that does nothing else, and of a training that takes
        `tokens_per_s`: median, 99th percentile and largest wait of a step in milliseconds (elapsed).

    Raises:
        ConfigError: a number is not above 0.
        DataError: a dataset cannot be used.
    """
    numbers = {"sequence-length": sequence_length, "samples-per-step": samples_per_step, "tokens-per-s": tokens_per_s,
               "steps": steps}
    raise_faults(ConfigError, [f"--{name}: is {value}; it must be above 0; leave it out" for name, value in numbers.items()
                               if not value > 0])
    begun = time.process_time()
    dataset = CausalLMDataset([(prefix, 1.0) for prefix in prefixes], sequence_length, seed=0)
    result: dict[str, Any] = {"tokens": sum(source.token_count for source in dataset.datasets),
                              "open_s": time.process_time() - begun}
    if preload:
        for source in dataset.datasets:
            source.preload()
    begun = time.perf_counter()
    with StepBatches(dataset, samples_per_step, samples_per_step, 0, 1, 0) as batches:
        next(batches)
        result["first_batch_s"] = time.perf_counter() - begun
        waits = _waits(batches, steps, samples_per_step * sequence_length / tokens_per_s)
    result["tokens_per_s"] = _speed(dataset, samples_per_step, steps)
    for name, share in (("median", 50), ("p99", 99), ("largest", 100)):
        result[f"wait_ms_{name}"] = 1e3 * float(np.percentile(waits, share))
    return result


def _waits(batches: StepBatches, steps: int, step_s: float) -> list[float]:
    """Take a step of data every `step_s` seconds, as a training does whose device computes meanwhile."""
    waits, due = [], time.perf_counter()
    for _ in range(steps):
        due += step_s
        time.sleep(max(0.0, due - time.perf_counter()))
        next(batches)
        waits.append(batches.wait_s)
    return waits


def _speed(dataset: CausalLMDataset, samples_per_step: int, steps: int) -> float:
    begun = time.process_time()
    for step in range(steps):
        dataset.samples(np.arange(step * samples_per_step, (step + 1) * samples_per_step))
    return steps * samples_per_step * dataset.sequence_length / (time.process_time() - begun)
