"""Between DeepSpeed's partitions and canonical tensors: fp32 weights and Adam moments under Hugging Face's names.

Written for deepspeed 0.19. `deepspeed.utils.safe_set_full_*` leaves five things undone, which this file does: it creates
the moments of a fresh engine, links those of every parameter group, writes the low-precision copy that the next forward
reads, sets Adam's step, and reaches stage 0, which has no wrapper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_ttl.checkpoint.names import hf_names, join_from_hf, split_to_hf
from megatron_ttl.config.schema import ModelConfig
from megatron_ttl.parallel.door import deepspeed

WEIGHTS = "weights"
MOMENTS = ("exp_avg", "exp_avg_sq")
RNG = "rng"


def capture(engine: Any, config: ModelConfig, keep: bool) -> dict[str, dict[str, Tensor]]:
    """Read the whole state into host memory: 12 bytes per parameter.

    Args:
        engine: a DeepSpeed engine between two steps. Every process must call, for partitions are gathered.
        config: the model's shape.
        keep: whether this process wants the result; the others return empty groups.
    """
    _create_moments(engine)
    groups: dict[str, dict[str, Tensor]] = {}
    for kind in (WEIGHTS, *MOMENTS):
        group: dict[str, Tensor] = {}
        for name, tensor in _read(engine, kind):
            if keep:
                group.update(split_to_hf(name, tensor.cpu(), config))
        groups[kind] = group
    groups[RNG] = {"torch": torch.get_rng_state()} if keep else {}
    return groups


def restore(engine: Any, config: ModelConfig, groups: Callable[[str], Mapping[str, Tensor]], step: int) -> None:
    """Write a captured state into an engine of any ZeRO stage.

    Args:
        engine: freshly initialised or used; everything in it is replaced.
        config: the model's shape.
        groups: returns the tensors of one group by its name, so that only one is in memory at a time.
        step: how many updates the moments have seen; Adam corrects its bias by it.
    """
    _create_moments(engine)
    for kind in (WEIGHTS, *MOMENTS):
        _write(engine, kind, _packed(groups(kind), config))
    _set_adam_step(engine, step)
    torch.set_rng_state(groups(RNG)["torch"])


def restore_weights(engine: Any, tensors: Mapping[str, Tensor]) -> None:
    """Write fp32 weights under the model's own names into an engine, masters and low-precision copies."""
    _write(engine, WEIGHTS, tensors.__getitem__)


def _packed(tensors: Mapping[str, Tensor], config: ModelConfig) -> Callable[[str], Tensor]:
    """Return a function from the model's name to its tensor, joined from Hugging Face's pieces."""
    return lambda name: join_from_hf(name, {hf: tensors[hf] for hf in hf_names(name, config)}, config)


def _read(engine: Any, kind: str) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter's full fp32 weight or moment, [shape of the parameter]."""
    key = None if kind == WEIGHTS else kind
    for name, parameter in engine.module.named_parameters():
        if _stage(engine) == 0:
            # Unlike the other stages', this is the live tensor itself: the next step must not change what was read.
            yield name, (parameter if key is None else engine.optimizer.state[parameter][key]).detach().clone()
        elif _stage(engine) == 3:
            yield name, engine.optimizer.get_full_hp_param(parameter, key)
        else:
            yield name, parameter.get_full_hp_param(key)


@torch.no_grad()
def _write(engine: Any, kind: str, tensor_of: Callable[[str], Tensor]) -> None:
    key = None if kind == WEIGHTS else kind
    for name, parameter in engine.module.named_parameters():
        value = tensor_of(name).float()
        if _stage(engine) == 0:
            (parameter if key is None else engine.optimizer.state[parameter][key]).copy_(value)
        elif _stage(engine) == 3:
            _write_partition(engine, parameter, value, key)
        else:
            parameter.set_full_hp_param(value.to(parameter.device), key)
            if key is None:
                parameter.copy_(value)


def _write_partition(engine: Any, parameter: Tensor, value: Tensor, key: str | None) -> None:
    """Write this process's part at stage 3; DeepSpeed's own setter fails where the last part is padded."""
    part = parameter.ds_tensor.numel()
    rank = torch.distributed.get_rank()
    piece = torch.zeros(part)
    mine = value.flatten()[part * rank : part * (rank + 1)]
    piece[: mine.numel()] = mine
    engine.optimizer.set_local_hp_param(piece, parameter, key)
    if key is None:
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if rank == 0:
                parameter.copy_(value)


def _stage(engine: Any) -> int:
    return engine.zero_optimization_stage()


def _adam(engine: Any) -> torch.optim.Optimizer:
    """Return torch's optimizer inside whatever DeepSpeed wrapped around it."""
    return engine.basic_optimizer


def _flat_parameters(engine: Any) -> list[Tensor]:
    """Return the fp32 tensors that torch's optimizer updates."""
    wrapper = engine.optimizer
    for attribute in ("fp32_groups_flat_partition", "single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
        if _stage(engine) > 0 and hasattr(wrapper, attribute):
            return list(getattr(wrapper, attribute))
    assert _stage(engine) == 0, type(wrapper)
    return list(engine.module.parameters())


def _create_moments(engine: Any) -> None:
    """Give a fresh optimizer the state that its first step would create."""
    state = _adam(engine).state
    fused = _adam(engine).defaults.get("fused")
    for flat in _flat_parameters(engine):
        if "exp_avg" not in state[flat]:
            where = flat.device if fused else torch.device("cpu")
            state[flat].update(step=torch.zeros((), dtype=torch.float32, device=where),
                               exp_avg=torch.zeros_like(flat), exp_avg_sq=torch.zeros_like(flat))
    if _stage(engine) in (1, 2):
        # deepspeed 0.19.8 steps one parameter group after the other and links all of them after the first, when the
        # others have no moments yet; so link again.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _set_adam_step(engine: Any, step: int) -> None:
    for flat in _flat_parameters(engine):
        _adam(engine).state[flat]["step"].fill_(step)
