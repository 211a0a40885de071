"""The processes of a run and how they agree: today one axis, data parallel."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_ttl.parallel.door import deepspeed
from megatron_ttl.runtime import Ranks, announce_ranks


@dataclass(frozen=True)
class Mesh:
    """This process's place, and the few collectives that the training loop needs."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def data_parallel_rank(self) -> int:
        """Which slice of every step this process reads."""
        return self.rank

    @property
    def data_parallel_size(self) -> int:
        """Into how many slices every step is cut."""
        return self.world_size

    @property
    def is_first(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Add numbers over all processes, in fp64 on the host."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any process."""
        return self.sum(float(flag))[0] > 0

    def sum_tensor(self, value: torch.Tensor) -> torch.Tensor:
        """Add a tensor over all processes, in place and where it lies."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    def barrier(self) -> None:
        """Wait for every process."""
        if self.world_size > 1:
            dist.all_reduce(torch.zeros(1))


def join(ranks: Ranks, timeout_s: float = 1800.0, rendezvous: str | None = None) -> Mesh:
    """Meet the other processes and let DeepSpeed know.

    Args:
        ranks: from `discover_ranks`.
        timeout_s: how long a collective may wait for a peer.
        rendezvous: a `file://` address instead of the master's port.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", ranks.local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    announce_ranks(ranks)
    if not dist.is_initialized():
        where = {"init_method": rendezvous or "env://"} if ranks.world_size > 1 else {"store": dist.HashStore()}
        # gloo for numbers that live on the host, NCCL for tensors on the GPU: agreeing never waits for the GPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", rank=ranks.rank,
                                world_size=ranks.world_size, timeout=timedelta(seconds=timeout_s), **where)
    deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", verbose=False)
    return Mesh(ranks.rank, ranks.world_size, ranks.local_rank, device)


def leave() -> None:
    """Part from the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()
