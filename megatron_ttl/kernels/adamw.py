"""AdamW over flat buffers: gradients are added up in fp32, clipped, and applied without asking the device anything.

Learning rate, number of the update, norm and clip factor are scalars on the device; an update whose gradient is not
finite leaves weights and moments as they are, bit for bit.

Source: Loshchilov & Hutter 2019, decoupled weight decay.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TINY = 1e-6  # as torch.nn.utils.clip_grad_norm_ has it
_CHUNK = 1 << 24  # elements for which the PyTorch path keeps temporaries at a time: 64 MiB each


@torch.no_grad()
def accumulate_(flat: Tensor, gradients: list[Tensor], offsets: list[int], first: bool, path: str = "torch") -> None:
    """Write each gradient into its range of a flat buffer, or add it there.

    Args:
        flat: [N] fp32.
        gradients: each in its own dtype, widened before it is added.
        offsets: first element of each range.
        first: whether the ranges are written; otherwise they are added to.
        path: from `KernelPaths`.
    """
    for gradient, offset in zip(gradients, offsets, strict=True):
        part = flat[offset : offset + gradient.numel()].view(gradient.shape)
        part.copy_(gradient) if first else part.add_(gradient)


def accumulate_and_square_(flat: Tensor, gradients: list[Tensor], offsets: list[int], first: bool,
                           path: str = "torch") -> Tensor:
    """Accumulate as `accumulate_` does and return the buffer's squared norm; what lies in no range must be zero."""
    accumulate_(flat, gradients, offsets, first, path)
    return squared_norm(flat, path)


@torch.no_grad()
def squared_norm(flat: Tensor, path: str = "torch") -> Tensor:
    """Return the sum of all squares as an fp32 scalar on the buffer's device: [N] fp32 -> []."""
    return torch.linalg.vector_norm(flat).square()


@torch.no_grad()
def adamw_(master: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, weights: Tensor | None, *, lr: Tensor,
           step: Tensor, squared_norm: Tensor, clipping: float, betas: tuple[float, float], eps: float,
           weight_decay: float, path: str = "torch") -> None:
    """Do one update in place; nothing changes where the norm is not finite.

    Args:
        master, gradient, exp_avg, exp_avg_sq: [n] fp32.
        weights: [n], the low-precision copy that becomes the rounded masters; None where the masters are the weights.
        lr: fp32 scalar on the device.
        step: fp32 scalar on the device, the number of this update, from 1.
        squared_norm: fp32 scalar on the device, of the whole gradient, of which this may be a part.
        clipping: largest norm; a larger gradient is scaled down to it. 0 leaves it as it is.
        betas, eps, weight_decay: of AdamW.
        path: from `KernelPaths`.
    """
    finite = squared_norm.isfinite()
    factor = (clipping / (squared_norm.sqrt() + _TINY)).clamp(max=1.0) if clipping else torch.ones_like(squared_norm)
    exact = step.double()
    step_size = (lr.double() / (1 - betas[0] ** exact)).float()
    correction = (1 - betas[1] ** exact).sqrt().float()
    shrink = (1 - lr.double() * weight_decay).float()
    for start in range(0, master.numel(), _CHUNK):
        part = slice(start, start + _CHUNK)
        scaled = gradient[part] * factor
        average = exp_avg[part].lerp(scaled, 1 - betas[0])
        square = (exp_avg_sq[part] * betas[1]).addcmul_(scaled, scaled, value=1 - betas[1])
        update = average / (square.sqrt() / correction).add_(eps)
        moved = (master[part] * shrink).sub_(update.mul_(step_size))
        for kept, new in ((master, moved), (exp_avg, average), (exp_avg_sq, square)):
            kept[part] = torch.where(finite, new, kept[part])
        if weights is not None:
            weights[part] = master[part]
