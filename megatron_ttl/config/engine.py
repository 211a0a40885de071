"""Which engine steps under a machine profile, DeepSpeed's or the flat one, and what neither can do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from megatron_ttl.config.checks import Fault
from megatron_ttl.config.schema import RunFile

if TYPE_CHECKING:
    from megatron_ttl.config.deepspeed import DeepSpeedProfile

EngineKind = Literal["deepspeed", "flat"]

GRAPH_TOKENS = 16_384
"""Largest micro batch that is recorded unasked: above it the device works longer than the host takes to launch."""


def engine_kind(profile: DeepSpeedProfile, world_size: int, cuda: bool) -> EngineKind:
    """Return which engine runs on so many processes, with or without GPUs."""
    if profile.engine != "auto":
        return profile.engine
    return "flat" if cuda and world_size == 1 and not _only_deepspeed(profile) else "deepspeed"


def engine_words(profile: DeepSpeedProfile, world_size: int, cuda: bool | None) -> str:
    """Say which engine will run; `cuda` None is not known yet."""
    with_gpu, without = (engine_kind(profile, world_size, gpu) for gpu in (True, False))
    if cuda is None and with_gpu != without:
        return f"{with_gpu} on a GPU, {without} without one"
    return without if cuda is False else with_gpu


def records_graphs(profile: DeepSpeedProfile, run: RunFile, kind: EngineKind, cuda: bool) -> bool:
    """Tell whether the step is recorded as CUDA graphs."""
    if kind != "flat" or not cuda or run.data.document_mask or profile.cuda_graphs is False:
        return False
    tokens = profile.train_micro_batch_size_per_gpu * run.train.sequence_length
    return profile.cuda_graphs is True or tokens <= GRAPH_TOKENS


def engine_faults(run: RunFile, profile: DeepSpeedProfile, wrong: frozenset[str]) -> list[Fault]:
    """Return what the engine that is asked for cannot do; keys that are `wrong` by themselves are left out."""
    faults: list[Fault] = []
    if profile.engine == "flat" and "engine" not in wrong:
        faults += [("engine", f'is "flat", and {key} is given; must be "auto" or "deepspeed" there: {why}; set it to '
                    f'"auto", or remove {key}')
                   for key, why in _only_deepspeed(profile).items() if wrong.isdisjoint((key, key.partition(".")[0]))]
    if profile.compile and wrong.isdisjoint({"compile", "zero_optimization", "zero_optimization.stage", "parallel"}):
        cut = {f"parallel.{axis} {degree:,}": degree > 1 for axis, degree in (("tensor", profile.cut.tensor),
                                                                              ("pipeline", profile.cut.pipeline))}
        broken = [name for name, is_so in {"zero_optimization.stage 3": profile.zero_optimization.stage == 3, **cut}.items()
                  if is_so]
        if broken:
            faults.append(("compile", f"is true with {' and '.join(broken)}; must be false there: exchanges between "
                           "processes inside of a block are no part of what is compiled; remove it"))
    if profile.cuda_graphs is True and "cuda_graphs" not in wrong:
        if profile.engine == "deepspeed" and "engine" not in wrong:
            faults.append(("cuda_graphs", 'is true, and engine is "deepspeed"; must be "auto" or false there: only the flat '
                           "engine's step can be recorded; remove one of them"))
        if run.data.document_mask and wrong.isdisjoint({"data", "data.document_mask"}):
            faults.append(("cuda_graphs", "is true, and the run file's data.document_mask is true; must be \"auto\" or "
                           "false there: every micro batch has another mask; remove it"))
    return faults


def engine_world_faults(profile: DeepSpeedProfile, world_size: int, cuda: bool | None,
                        wrong: frozenset[str] = frozenset()) -> list[Fault]:
    """Return what the engine that is asked for cannot do on these processes; `cuda` None is not known yet."""
    faults: list[Fault] = []
    if "engine" in wrong:
        return faults
    if profile.engine == "flat" and world_size > 1:
        faults.append(("engine", f'is "flat", and there are {world_size:,} processes; must be "auto" or "deepspeed" there: '
                       "flat buffers belong to one process; set it to \"auto\", or start one process"))
    if profile.cuda_graphs is True and "cuda_graphs" not in wrong:
        if cuda is False:
            faults.append(("cuda_graphs", "is true, and there is no GPU; must be \"auto\" or false there; remove it"))
        elif profile.engine == "auto" and engine_kind(profile, world_size, True) == "deepspeed":
            faults.append(("cuda_graphs", "is true, and DeepSpeed's engine runs here; must be \"auto\" or false there: only "
                           "the flat engine's step can be recorded (one process, bf16 or fp32, no offloading); remove it"))
    return faults


def _only_deepspeed(profile: DeepSpeedProfile) -> dict[str, str]:
    """Return what of a profile only DeepSpeed's engine can do, by key, and why."""
    found = {}
    if profile.precision == "fp16":
        found["fp16.enabled"] = "it finds no loss scale"
    if profile.zero_optimization.offload_optimizer is not None:
        found["zero_optimization.offload_optimizer"] = "it keeps all state on the device"
    if profile.wall_clock_breakdown:
        found["wall_clock_breakdown"] = "DeepSpeed times the parts of its own step alone"
    return found
