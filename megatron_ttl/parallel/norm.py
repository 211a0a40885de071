"""The global norm of a gradient that lies in parts on several processes, each part counted once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ttl.parallel.mesh import Mesh

_TINY = 1e-6  # as torch.nn.utils.clip_grad_norm_ and DeepSpeed have it


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], clipping: float, mesh: Mesh) -> Tensor:
    """Scale gradients down to a global norm of `clipping`, in place, and return the norm before.

    Args:
        parameters: this process's, with gradients that are the same on all data-parallel ranks.
        clipping: 0 leaves them as they are.
        mesh: where this process stands.

    Returns:
        fp32 scalar, the same on every process.
    """
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    # What every tensor rank holds counts on the first one.
    counted = [p.grad for p in parameters if mesh.place.tensor == 0 or getattr(p, "tensor_model_parallel", False)]
    norm = torch.nn.utils.get_total_norm(counted)
    if mesh.layout.tensor * mesh.layout.pipeline > 1:
        squares = norm.square()
        dist.all_reduce(squares, group=mesh.grid.get_model_parallel_group())
        norm = squares.sqrt()
    if clipping:
        factor = (clipping / (norm + _TINY)).clamp(max=1.0)
        for parameter in parameters:
            parameter.grad.mul_(factor)
    return norm
