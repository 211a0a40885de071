"""Whether the degrees of a machine profile fit the model, the sequence and the number of processes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from megatron_ttl.config.checks import Fault, divisors
from megatron_ttl.config.schema import RunFile

if TYPE_CHECKING:
    from megatron_ttl.config.deepspeed import DeepSpeedProfile
    from megatron_ttl.config.load import Settings


MAX_WORLD_SIZE = 2**18
"""Processes that a dry run plans for: more than any machine has, few enough to list."""


def degree_faults(run: RunFile, profile: DeepSpeedProfile, wrong: frozenset[str]) -> list[Fault]:
    """Return the faults between the degrees and the model; keys that are `wrong` by themselves are left out."""
    faults: list[Fault] = []
    if "parallel" in wrong or "model" in wrong:
        return faults
    cut, model = profile.cut, run.model
    heads = {"model.num_attention_heads", "model.num_key_value_heads", "model.intermediate_size"}
    sizes = {} if wrong & heads else {"query heads": model.num_attention_heads,
                                      "key/value heads": model.num_key_value_heads,
                                      "channels of the SwiGLU": model.intermediate_size}
    if wrong.isdisjoint({"parallel.tensor", *heads}):
        faults += _tensor(cut.tensor, sizes)
    if wrong.isdisjoint({"parallel.pipeline", "model.num_hidden_layers"}):
        most = model.num_hidden_layers + 1
        if cut.pipeline > most:
            faults.append(("parallel.pipeline", f"is {cut.pipeline:,}, and the model has {model.num_hidden_layers:,} "
                           "blocks; every stage needs one, the last one may have the head alone; set it to at most "
                           f"{most:,}"))
    if wrong.isdisjoint({"parallel.pipeline", "data", "data.document_mask"}) and cut.pipeline > 1 and run.data.document_mask:
        faults.append(("parallel.pipeline", f"is {cut.pipeline:,}, and the run file's data.document_mask is true; must be "
                       "1 there: stages behind the first receive no token ids, and cannot know where documents begin; "
                       "set it to 1, or data.document_mask to false"))
    sequence = {"parallel.sequence", "parallel.tensor", "train", "train.sequence_length"}
    if wrong.isdisjoint(sequence) and cut.sequence:
        length = run.train.sequence_length
        if cut.tensor == 1:
            faults.append(("parallel.sequence", "is true with tensor 1; must be false there: it shares out the tokens "
                           "of the norms among tensor-parallel ranks; remove it or raise parallel.tensor"))
        elif length % cut.tensor:
            faults.append(("parallel.sequence", f"is true, and train.sequence_length {length:,} over {cut.tensor:,} "
                           f"ranks leaves {length % cut.tensor:,} tokens; must divide; set parallel.tensor to "
                           f"{_nearest(cut.tensor, [length, *sizes.values()])}, or sequence to false"))
    return faults


def _tensor(degree: int, sizes: dict[str, int]) -> list[Fault]:
    uneven = [f"{size:,} {name}" for name, size in sizes.items() if size % degree]
    if not uneven:
        return []
    return [("parallel.tensor", f"is {degree:,}, and the model has {' and '.join(uneven)}; must divide them, for every "
             f"rank owns whole heads and equal parts; set it to {_nearest(degree, list(sizes.values()))}")]


def _nearest(degree: int, sizes: list[int]) -> str:
    """Return the one or two degrees nearest to one that does not divide all sizes."""
    fitting = divisors(math.gcd(*sizes))
    below = [d for d in fitting if d < degree]
    above = [d for d in fitting if d > degree]
    return " or ".join(f"{d:,}" for d in (*below[-1:], *above[:1]))


def world_fault(profile: DeepSpeedProfile, world_size: int) -> str:
    """Return the fault of a number of processes that the degrees do not divide, with what is near, or nothing."""
    cut = profile.cut
    together = cut.tensor * cut.pipeline
    if world_size % together == 0:
        return ""
    below = world_size // together * together
    near = f"{below:,} or {below + together:,}" if below else f"{together:,}"
    degrees = [(tensor, pipeline) for tensor in divisors(world_size) if tensor <= cut.tensor
               for pipeline in divisors(world_size // tensor) if pipeline <= cut.pipeline]
    tensor, pipeline = max(degrees, key=lambda pair: (pair[0] * pair[1], pair[0]))
    return (f"tensor {cut.tensor:,} x pipeline {cut.pipeline:,} = {together:,} processes hold the model once, and "
            f"there are {world_size:,}; the product must divide their number; start {near} processes, or set tensor to "
            f"{tensor:,} and pipeline to {pipeline:,}")


def data_parallel_size_of(settings: Settings, world_size: int) -> int:
    """Return how many copies of the model so many processes hold.

    Raises:
        ConfigError: the degrees do not divide the number of processes.
    """
    from megatron_ttl.errors import ConfigError

    if fault := world_fault(settings.profile, world_size):
        raise ConfigError(f"{settings.deepspeed_path}: parallel: {fault}")
    return world_size // (settings.profile.cut.tensor * settings.profile.cut.pipeline)


def device_faults(settings: Settings, cuda: bool) -> list[str]:
    """Return what the profile asks for and the machine cannot do."""
    if settings.profile.precision == "fp16" and not cuda:
        return [f"{settings.deepspeed_path}: fp16.enabled: is true, and there is no GPU; must be false on a CPU: "
                "PyTorch and DeepSpeed compute fp16 on GPUs alone; use {\"bf16\": {\"enabled\": true}} or fp32"]
    return []
