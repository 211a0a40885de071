"""DeepSpeed's partitions, read and written as whole fp32 weights and Adam moments.

Written for deepspeed 0.19. `deepspeed.utils.safe_set_full_*` leaves five things undone, which this file does: it creates
the moments of a fresh engine, links those of every parameter group, writes the low-precision copy that the next forward
reads, sets Adam's step, and reaches stage 0, which has no wrapper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_ttl.checkpoint.state import WEIGHTS
from megatron_ttl.parallel.door import deepspeed
from megatron_ttl.parallel.mesh import Mesh


class DeepSpeedState:
    """What a DeepSpeed engine keeps of this process's part of the model; a `TrainedState`."""

    def __init__(self, engine: Any, mesh: Mesh) -> None:
        """Look into an initialised engine."""
        self._engine, self._mesh = engine, mesh
        self._stage = engine.zero_optimization_stage()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every weight by the model's own name; nothing is gathered."""
        return {name: getattr(p, "ds_shape", p.shape) for name, p in self._engine.module.named_parameters()}

    def read(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """Yield every full fp32 weight or moment; every process must call, for partitions are gathered."""
        self._create_moments()
        key = None if kind == WEIGHTS else kind
        for name, parameter in self._engine.module.named_parameters():
            if self._stage == 0:
                # Unlike the other stages', this is the live tensor itself: the next step must not change what was read.
                yield name, (parameter if key is None else self._adam.state[parameter][key]).detach().clone()
            elif self._stage == 3:
                yield name, self._engine.optimizer.get_full_hp_param(parameter, key)
            else:
                yield name, parameter.get_full_hp_param(key)

    @torch.no_grad()
    def write(self, kind: str, tensor_of: Callable[[str], Tensor]) -> None:
        """Set every weight or moment; every process must call."""
        key = None if kind == WEIGHTS else kind
        if key is not None:
            self._create_moments()
        for name, parameter in self._engine.module.named_parameters():
            value = tensor_of(name).float()
            if self._stage == 0:
                (parameter if key is None else self._adam.state[parameter][key]).copy_(value)
            elif self._stage == 3:
                self._write_partition(parameter, value, key)
            else:
                parameter.set_full_hp_param(value.to(parameter.device), key)
                if key is None:
                    parameter.copy_(value)

    def set_step(self, step: int) -> None:
        """Say how many updates the moments have seen."""
        for flat in self._flat_parameters():
            self._adam.state[flat]["step"].fill_(step)

    def _write_partition(self, parameter: Tensor, value: Tensor, key: str | None) -> None:
        """Write this process's part at stage 3; DeepSpeed's own setter fails where the last part is padded."""
        part = parameter.ds_tensor.numel()
        rank = self._mesh.data_parallel_rank
        piece = torch.zeros(part)
        mine = value.flatten()[part * rank : part * (rank + 1)]
        piece[: mine.numel()] = mine
        self._engine.optimizer.set_local_hp_param(piece, parameter, key)
        if key is None:
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):  # 0 of the data-parallel ranks
                if rank == 0:
                    parameter.copy_(value)

    @property
    def _adam(self) -> torch.optim.Optimizer:
        """Torch's optimizer inside whatever DeepSpeed wrapped around it."""
        return self._engine.basic_optimizer

    def _flat_parameters(self) -> list[Tensor]:
        """Return the fp32 tensors that torch's optimizer updates."""
        wrapper = self._engine.optimizer
        for attribute in ("fp32_groups_flat_partition", "single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
            if self._stage > 0 and hasattr(wrapper, attribute):
                return list(getattr(wrapper, attribute))
        assert self._stage == 0, type(wrapper)
        return list(self._engine.module.parameters())

    def _create_moments(self) -> None:
        """Give a fresh optimizer the state that its first step would create."""
        state = self._adam.state
        fused = self._adam.defaults.get("fused")
        for flat in self._flat_parameters():
            if "exp_avg" not in state[flat]:
                where = flat.device if fused else torch.device("cpu")
                state[flat].update(step=torch.zeros((), dtype=torch.float32, device=where),
                                   exp_avg=torch.zeros_like(flat), exp_avg_sq=torch.zeros_like(flat))
        if self._stage in (1, 2):
            # deepspeed 0.19.8 steps one parameter group after the other and links all of them after the first, when the
            # others have no moments yet; so link again.
            self._engine.optimizer._hp_optimizer_states_linked = False
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()
