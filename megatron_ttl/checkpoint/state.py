"""Between DeepSpeed's partitions and canonical tensors: fp32 weights and Adam moments under Hugging Face's names.

Written for deepspeed 0.19. `deepspeed.utils.safe_set_full_*` leaves five things undone, which this file does: it creates
the moments of a fresh engine, links those of every parameter group, writes the low-precision copy that the next forward
reads, sets Adam's step, and reaches stage 0, which has no wrapper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_ttl.checkpoint.names import hf_names
from megatron_ttl.checkpoint.pieces import Piece, whole
from megatron_ttl.config.schema import ModelConfig
from megatron_ttl.parallel.door import deepspeed
from megatron_ttl.parallel.mesh import Mesh
from megatron_ttl.parallel.plan import parts_of
from megatron_ttl.parallel.shard import pack, unpack

WEIGHTS = "weights"
MOMENTS = ("exp_avg", "exp_avg_sq")
RNG = "rng"


class Source(Protocol):
    """Where a state is read from: a `Checkpoint`."""

    def read(self, group: str, name: str, offset: tuple[int, ...] | None = None,
             shape: tuple[int, ...] | None = None) -> Tensor:
        """Return a block of a tensor, or all of it."""


def capture(engine: Any, config: ModelConfig, mesh: Mesh) -> dict[str, dict[str, Piece]]:
    """Read this process's share of the state into host memory: 12 bytes per parameter, over all processes.

    What data-parallel ranks hold together, or all alike, is shared out among them, so that all write equally much.

    Args:
        engine: a DeepSpeed engine between two steps. Every process must call, for partitions are gathered.
        config: the whole model's shape.
        mesh: where this process stands.

    Returns:
        Group -> Hugging Face's name -> piece. All processes' pieces together are the whole state, once.
    """
    _create_moments(engine)
    keepers = _keepers(engine, mesh)
    groups: dict[str, dict[str, Piece]] = {}
    for kind in (WEIGHTS, *MOMENTS):
        groups[kind] = {}
        for name, tensor in _read(engine, kind):
            if keepers[name] == mesh.data_parallel_rank:
                groups[kind] |= _pieces(name, tensor.cpu(), config, mesh)
    groups[RNG] = {"torch": whole(torch.get_rng_state())} if mesh.is_first else {}
    return groups


def outline(engine: Any, config: ModelConfig, mesh: Mesh) -> dict[str, dict[str, Piece]]:
    """Return what `capture` would, of the same shapes and without memory for them; nothing is gathered."""
    keepers = _keepers(engine, mesh)
    pieces: dict[str, Piece] = {}
    for name, parameter in engine.module.named_parameters():
        if keepers[name] == mesh.data_parallel_rank:
            shape = getattr(parameter, "ds_shape", parameter.shape)
            pieces |= _pieces(name, torch.empty(shape, dtype=torch.float32, device="meta"), config, mesh)
    rng = {"torch": whole(torch.get_rng_state())} if mesh.is_first else {}
    return {kind: pieces for kind in (WEIGHTS, *MOMENTS)} | {RNG: rng}


def _keepers(engine: Any, mesh: Mesh) -> dict[str, int]:
    """Say which data-parallel rank keeps which weight: the largest first, each to whoever has least."""
    sizes = {name: getattr(p, "ds_numel", p.numel()) for name, p in engine.module.named_parameters()}
    load = [0] * mesh.data_parallel_size
    keepers = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        keepers[name] = min(range(len(load)), key=load.__getitem__)
        load[keepers[name]] += sizes[name]
    return keepers


def _pieces(name: str, own: Tensor, config: ModelConfig, mesh: Mesh) -> dict[str, Piece]:
    parts = parts_of(name, config, mesh.layout, mesh.place.tensor)
    found = {}
    for hf_name, part, tensor in zip(hf_names(name, config), parts, unpack(own, parts), strict=True):
        alike = part.extent == part.shape  # every tensor rank has all of it: the first one keeps it
        if tensor.numel() and not (alike and mesh.place.tensor):
            found[hf_name] = Piece(tensor, part.shape, part.offset)
    return found


def restore(engine: Any, config: ModelConfig, mesh: Mesh, source: Source, step: int) -> None:
    """Write a captured state, of whatever layout, into an engine of any layout and ZeRO stage.

    Each process reads the parts that it needs and nothing else.

    Args:
        engine: freshly initialised or used; everything in it is replaced.
        config: the whole model's shape.
        mesh: where this process stands.
        source: the checkpoint.
        step: how many updates the moments have seen; Adam corrects its bias by it.
    """
    _create_moments(engine)
    for kind in (WEIGHTS, *MOMENTS):
        def own(name: str, kind: str = kind) -> Tensor:
            parts = parts_of(name, config, mesh.layout, mesh.place.tensor)
            return pack([source.read(kind, hf_name, part.offset, part.extent)
                         for hf_name, part in zip(hf_names(name, config), parts, strict=True)], parts)

        _write(engine, mesh, kind, own)
    _set_adam_step(engine, step)
    torch.set_rng_state(source.read(RNG, "torch"))


def restore_weights(engine: Any, mesh: Mesh, tensors: Mapping[str, Tensor]) -> None:
    """Write this process's fp32 weights under the model's own names: masters and low-precision copies."""
    _write(engine, mesh, WEIGHTS, tensors.__getitem__)


def _read(engine: Any, kind: str) -> Iterator[tuple[str, Tensor]]:
    """Yield every full fp32 weight or moment of this process's part, [shape of the parameter]."""
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
def _write(engine: Any, mesh: Mesh, kind: str, tensor_of: Callable[[str], Tensor]) -> None:
    key = None if kind == WEIGHTS else kind
    for name, parameter in engine.module.named_parameters():
        value = tensor_of(name).float()
        if _stage(engine) == 0:
            (parameter if key is None else engine.optimizer.state[parameter][key]).copy_(value)
        elif _stage(engine) == 3:
            _write_partition(engine, mesh, parameter, value, key)
        else:
            parameter.set_full_hp_param(value.to(parameter.device), key)
            if key is None:
                parameter.copy_(value)


def _write_partition(engine: Any, mesh: Mesh, parameter: Tensor, value: Tensor, key: str | None) -> None:
    """Write this process's part at stage 3; DeepSpeed's own setter fails where the last part is padded."""
    part = parameter.ds_tensor.numel()
    rank = mesh.data_parallel_rank
    piece = torch.zeros(part)
    mine = value.flatten()[part * rank : part * (rank + 1)]
    piece[: mine.numel()] = mine
    engine.optimizer.set_local_hp_param(piece, parameter, key)
    if key is None:
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):  # 0 of the data-parallel ranks
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
