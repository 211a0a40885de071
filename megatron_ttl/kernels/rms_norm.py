"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute RMSNorm over the last dimension in fp32 and round once at the end.

    Source: Zhang & Sennrich 2019, equation 4. Hugging Face's Llama rounds once more before the weight; in fp32 both
    agree.
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * weight.float()).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float, path: str = "torch") -> Tensor:
    """Apply RMSNorm over the last dimension.

    Args:
        x: [..., h], fp32 or bf16.
        weight: [h], same dtype.
        eps: added to the mean square.
        path: from `KernelPaths`.

    Returns:
        [..., h] in the dtype of `x`; statistics are fp32.
    """
    if x.is_cuda:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    return rms_norm_reference(x, weight, eps)


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float, path: str = "torch") -> tuple[Tensor, Tensor]:
    """Add and apply RMSNorm to the sum, as it is rounded to the dtype of `x`.

    Args:
        x, delta: [..., h].
        weight, eps, path: as for `rms_norm`.

    Returns:
        The sum and its norm, [..., h] both.
    """
    total = x + delta
    return total, rms_norm(total, weight, eps, path)
