"""Between an engine's own way of keeping its state and canonical tensors: fp32 weights and Adam moments under Hugging
Face's names. What one engine wrote another one of any layout, stage or kind goes on with, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from megatron_ttl.checkpoint.names import hf_names
from megatron_ttl.checkpoint.pieces import Piece, whole
from megatron_ttl.config.schema import ModelConfig
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


class TrainedState(Protocol):
    """Weights and moments of this process's part of the model, however an engine keeps them."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of every weight by the model's own name."""

    def read(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """Yield name and fp32 copy of every weight (`WEIGHTS`) or moment; every process must call."""

    def write(self, kind: str, tensor_of: Callable[[str], Tensor]) -> None:
        """Set every fp32 weight, with the low-precision copy of it, or moment; every process must call."""

    def set_step(self, step: int) -> None:
        """Say how many updates the moments have seen; Adam corrects its bias by it."""


def capture(state: TrainedState, config: ModelConfig, mesh: Mesh) -> dict[str, dict[str, Piece]]:
    """Read this process's share of the state into host memory: 12 bytes per parameter, over all processes.

    What data-parallel ranks hold together, or all alike, is shared out among them, so that all write equally much.

    Args:
        state: of an engine between two steps. Every process must call, for partitions are gathered.
        config: the whole model's shape.
        mesh: where this process stands.

    Returns:
        Group -> Hugging Face's name -> piece. All processes' pieces together are the whole state, once.
    """
    keepers = _keepers(state, mesh)
    groups: dict[str, dict[str, Piece]] = {}
    for kind in (WEIGHTS, *MOMENTS):
        groups[kind] = {}
        for name, tensor in state.read(kind):
            if keepers[name] == mesh.data_parallel_rank:
                groups[kind] |= _pieces(name, tensor.cpu(), config, mesh)
    groups[RNG] = {"torch": whole(torch.get_rng_state())} if mesh.is_first else {}
    return groups


def outline(state: TrainedState, config: ModelConfig, mesh: Mesh) -> dict[str, dict[str, Piece]]:
    """Return what `capture` would, of the same shapes and without memory for them; nothing is gathered."""
    keepers = _keepers(state, mesh)
    pieces: dict[str, Piece] = {}
    for name, shape in state.shapes().items():
        if keepers[name] == mesh.data_parallel_rank:
            pieces |= _pieces(name, torch.empty(shape, dtype=torch.float32, device="meta"), config, mesh)
    rng = {"torch": whole(torch.get_rng_state())} if mesh.is_first else {}
    return {kind: pieces for kind in (WEIGHTS, *MOMENTS)} | {RNG: rng}


def _keepers(state: TrainedState, mesh: Mesh) -> dict[str, int]:
    """Say which data-parallel rank keeps which weight: the largest first, each to whoever has least."""
    sizes = {name: torch.Size(shape).numel() for name, shape in state.shapes().items()}
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


def restore(state: TrainedState, config: ModelConfig, mesh: Mesh, source: Source, step: int) -> None:
    """Write a captured state, of whatever layout, into an engine of any kind, layout and ZeRO stage.

    Each process reads the parts that it needs and nothing else.

    Args:
        state: of an engine freshly initialised or used; everything in it is replaced.
        config: the whole model's shape.
        mesh: where this process stands.
        source: the checkpoint.
        step: how many updates the moments have seen; Adam corrects its bias by it.
    """
    for kind in (WEIGHTS, *MOMENTS):
        def own(name: str, kind: str = kind) -> Tensor:
            parts = parts_of(name, config, mesh.layout, mesh.place.tensor)
            return pack([source.read(kind, hf_name, part.offset, part.extent)
                         for hf_name, part in zip(hf_names(name, config), parts, strict=True)], parts)

        state.write(kind, own)
    state.set_step(step)
    torch.set_rng_state(source.read(RNG, "torch"))
