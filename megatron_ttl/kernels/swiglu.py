"""SwiGLU on a packed projection: silu(gate) * up."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """Compute silu(gate) * up in fp32 and round once. Source: Shazeer 2020, equation 6."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (gate * gate.sigmoid() * up).to(gate_up.dtype)


def swiglu(gate_up: Tensor, path: str = "torch") -> Tensor:
    """Gate the upper half of the last dimension by the lower half.

    Args:
        gate_up: [..., 2f], gate then up.
        path: from `KernelPaths`.

    Returns:
        [..., f].
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
