"""Compare the copies of weights that several processes hold: they must be equal bit for bit.

A flipped bit, a skipped clip or a lost reduction makes one copy drift away from the others, and every loss after it is
that of a model that does not exist. The copies are compared by checksum; what differs is named with its rank.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ttl.parallel.mesh import Mesh
from megatron_ttl.parallel.plan import Layout, Place

_CHUNK = 1 << 22  # elements widened to 64 bits at a time: 32 MiB
_BITS = {2: torch.int16, 4: torch.int32}


def replica_faults(module: nn.Module, mesh: Mesh) -> list[str]:
    """Return what differs between copies, the same on every process; every process must call.

    Args:
        module: this process's part of the model, between two steps; at ZeRO's stage 3 its weights are partitioned.
        mesh: where this process stands.

    Returns:
        One line per rank and weight; empty while all is well.
    """
    if mesh.world_size == 1:
        return []
    partitioned = any(hasattr(parameter, "ds_tensor") for parameter in module.parameters())
    own = {}
    for name, parameter in module.named_parameters():
        cut = getattr(parameter, "tensor_model_parallel", False)
        if partitioned and cut:
            continue  # every process holds another part
        own[name] = {"cut": cut, "sum": checksum(parameter.ds_tensor if partitioned else parameter)}
    tables = [json.loads(text) for text in mesh.gather_text(json.dumps(own))]
    return list(_differences(tables, mesh.layout, partitioned))


def checksum(tensor: Tensor) -> str:
    """Sum every element's bits times an odd number of its place, modulo 2^64: no single change can cancel out."""
    bits = tensor.detach().contiguous().flatten().view(_BITS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, bits.numel(), _CHUNK):
        part = bits[start : start + _CHUNK].to(torch.int64)
        odd = torch.arange(2 * start + 1, 2 * (start + part.numel()), 2, device=bits.device)
        total += (part * odd).sum()
    return f"{int(total) & (1 << 64) - 1:016x}"


def _differences(tables: list[dict[str, Mapping[str, Any]]], layout: Layout, partitioned: bool) -> Iterator[str]:
    """Compare the tables of all ranks: everything over data parallel, uncut weights over tensor parallel too."""
    copies: dict[tuple[Any, ...], list[int]] = {}
    for rank, table in enumerate(tables):
        place = layout.place(rank)
        for name, entry in table.items():
            tensor = place.tensor if entry["cut"] else None
            data = place.data if partitioned else None
            copies.setdefault((name, tensor, data), []).append(rank)
    for (name, _, _), ranks in sorted(copies.items(), key=str):
        sums = [tables[rank][name]["sum"] for rank in ranks]
        usual, count = Counter(sums).most_common(1)[0]
        odd_ones = [rank for rank, found in zip(ranks, sums, strict=True) if found != usual]
        if odd_ones and 2 * count <= len(ranks):  # no majority: nobody knows who is right
            odd_ones = ranks
        for rank in odd_ones:
            others = [other for other in ranks if other != rank]
            yield (f"rank {rank} ({_where(layout.place(rank))}): {name} differs from its copies on ranks "
                   f"{', '.join(map(str, others))}")


def _where(place: Place) -> str:
    return f"tensor {place.tensor}, pipeline {place.pipeline}, data {place.data}"
