"""The processes of a run, the axes on which they stand, and how they agree."""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_ttl.parallel.door import PipelineParallelGrid, PipeModelDataParallelTopology, deepspeed
from megatron_ttl.parallel.plan import Layout, Place
from megatron_ttl.runtime import Ranks, announce_ranks

_LOST_PEER = re.compile(r"connection (was )?(closed|reset|likely closed)|broken pipe|remote process", re.IGNORECASE)


@dataclass(frozen=True)
class Mesh:
    """This process's place, its groups, and the few collectives that the training loop needs."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    layout: Layout = Layout()
    grid: Any = field(default=None, repr=False)
    """DeepSpeed's grid of process groups, its `mpu`."""

    @property
    def place(self) -> Place:
        """Coordinates of this process."""
        return self.layout.place(self.rank)

    @property
    def data_parallel_rank(self) -> int:
        """Which slice of every step this process reads."""
        return self.place.data

    @property
    def data_parallel_size(self) -> int:
        """Into how many slices every step is cut."""
        return self.layout.data

    @property
    def data_parallel_group(self) -> Any:
        """Processes that hold the same weights and read other samples."""
        return self.grid.get_data_parallel_group()

    @property
    def tensor_parallel_group(self) -> Any:
        """Processes that share every weight of a layer; None where there is one."""
        return self.grid.get_slice_parallel_group() if self.layout.tensor > 1 else None

    @property
    def is_first(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Add numbers over all processes, in fp64 on the host."""
        return self._sum(values, None) if self.world_size > 1 else list(values)

    def sum_data_parallel(self, *values: float) -> list[float]:
        """Add numbers over the data-parallel processes, in fp64 on the host."""
        return self._sum(values, self.data_parallel_group) if self.layout.data > 1 else list(values)

    def from_last_stage(self, rows: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor:
        """Bring numbers of the last stage, which the others have None for, to all stages: fp64, on the host."""
        found = torch.zeros(shape, dtype=torch.float64) if rows is None else rows.to("cpu", torch.float64)
        if self.layout.pipeline > 1:
            dist.all_reduce(found, group=self.grid.get_pipe_parallel_group())
        return found

    @staticmethod
    def _sum(values: tuple[float, ...], group: Any) -> list[float]:
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=group)
        return total.tolist()

    def largest(self, value: float) -> float:
        """Return the largest of all processes' numbers."""
        found = torch.tensor([value], dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return float(found)

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any process."""
        return self.sum(float(flag))[0] > 0

    def sum_tensor_data_parallel(self, value: torch.Tensor) -> torch.Tensor:
        """Add a tensor over the data-parallel processes, in place and where it lies."""
        if self.layout.data > 1:
            dist.all_reduce(value, group=self.data_parallel_group)
        return value

    def gather_text(self, text: str) -> list[str]:
        """Return every process's text, by rank, on every process."""
        return _gather_text(text, self.rank, self.world_size, None)

    def background(self) -> BackgroundPeers:
        """Return the same processes with connections of their own, for one thread beside the training.

        Every process must call, for a process group is made.
        """
        group = dist.new_group(backend="gloo") if self.world_size > 1 else None
        return BackgroundPeers(self.rank, self.world_size, group)

    def first_to_fail(self) -> bool | None:
        """Tell the others that this process fails; return whether none did before, None where the count is lost."""
        try:
            store = dist.distributed_c10d._get_default_store()
            store.set_timeout(timedelta(seconds=5))
            return store.add("megatron_ttl/failures", 1) == 1
        except (RuntimeError, ValueError):  # whoever keeps the count is gone: it failed first
            return True if self.world_size == 1 else None

    def cut(self, tensor: int = 1, pipeline: int = 1, sequence: bool = False) -> Mesh:
        """Return the same processes on three axes; what the first two degrees leave is data parallel.

        Every process must call, for process groups are made.
        """
        assert self.world_size % (tensor * pipeline) == 0
        layout = Layout(tensor, pipeline, self.world_size // (tensor * pipeline), sequence and tensor > 1)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its topology
            grid = PipelineParallelGrid(PipeModelDataParallelTopology(pipeline, tensor, layout.data))
        return replace(self, layout=layout, grid=grid)


@dataclass(frozen=True)
class BackgroundPeers:
    """What a background thread needs to agree with those of the other processes, whatever the training does meanwhile."""

    rank: int
    world_size: int
    group: Any = field(repr=False)

    def gather_text(self, text: str) -> list[str]:
        """Return every process's text, by rank, on every process."""
        return _gather_text(text, self.rank, self.world_size, self.group)


def _gather_text(text: str, rank: int, world_size: int, group: Any) -> list[str]:
    if world_size == 1:
        return [text]
    mine = torch.frombuffer(bytearray(text.encode() or b"\0"), dtype=torch.uint8)
    sizes = torch.zeros(world_size, dtype=torch.int64)
    sizes[rank] = len(text.encode())
    dist.all_reduce(sizes, group=group)
    padded = torch.zeros(max(1, int(sizes.max())), dtype=torch.uint8)
    padded[: len(mine)] = mine
    found = [torch.empty_like(padded) for _ in range(world_size)]
    dist.all_gather(found, padded, group=group)
    return [bytes(part[:size].tolist()).decode() for part, size in zip(found, sizes.tolist(), strict=True)]


def join(ranks: Ranks, timeout_s: float = 1800.0, rendezvous: str | None = None) -> Mesh:
    """Meet the other processes and let DeepSpeed know; all of them are data parallel until `cut`.

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
    return Mesh(ranks.rank, ranks.world_size, ranks.local_rank, device).cut()


def is_lost_peer(error: BaseException) -> bool:
    """Return whether an error says no more than that another process is gone, or the way to it."""
    return isinstance(error, RuntimeError) and _LOST_PEER.search(str(error)) is not None


def leave() -> None:
    """Part from the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()
