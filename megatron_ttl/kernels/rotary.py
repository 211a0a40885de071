"""Rotary position embedding, half-rotation form: channel i turns together with channel i + d/2."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_tables(length: int, head_dim: int, theta: float, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Return cos and sin of every angle, each [length, d/2] in fp32.

    Angles stay fp32 whatever the model's dtype: rounded to bf16 they would already be wrong at position 256.
    Source: Su et al. 2021, section 3.4.2; channel pairing as in Hugging Face's Llama.
    """
    # On the host in every case, so that a table does not depend on the device's pow().
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    angles = torch.outer(torch.arange(length).float(), inverse)  # [length, d/2]
    return angles.cos().to(device), angles.sin().to(device)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn queries or keys by their positions, computing in fp32.

    Args:
        x: [b, s, heads, d].
        cos, sin: [s, d/2] or [b, s, d/2] fp32, rows of `rotary_tables` for the positions of `x`.

    Returns:
        [b, s, heads, d] in the dtype of `x`.
    """
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]  # [s, 1, d/2] or [b, s, 1, d/2]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def rotary_heads(packed: Tensor, cos: Tensor, sin: Tensor, kv_heads: int,
                 path: str = "torch") -> tuple[Tensor, Tensor, Tensor]:
    """Split a packed projection into heads and turn queries and keys by their positions.

    Args:
        packed: [b, s, n + 2k, d]: queries, keys, values; not to be used again, for a path may turn it in place.
        cos, sin: as for `rotary`.
        kv_heads: k.
        path: from `KernelPaths`.

    Returns:
        Query [b, n, s, d], key and value [b, k, s, d]; they are views.
    """
    # Queries and keys turn together: they lie side by side in the packed projection.
    turned, value = packed.split((packed.shape[2] - kv_heads, kv_heads), dim=2)
    query, key = rotary(turned, cos, sin).split((turned.shape[2] - kv_heads, kv_heads), dim=2)
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
