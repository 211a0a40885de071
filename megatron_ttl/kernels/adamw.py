"""AdamW over flat buffers: gradients are added up in fp32, clipped, and applied without asking the device anything.

Learning rate, number of the update and norm are scalars on the device; an update whose gradient is not finite leaves
masters, moments and weights as they are, bit for bit.

Source: Loshchilov & Hutter 2019, decoupled weight decay; Kingma & Ba 2015, bias corrections.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_TINY = 1e-6  # as torch.nn.utils.clip_grad_norm_ has it
_ROW = 4096  # elements whose squares the PyTorch path adds up in fp32; sums of rows are fp64
_CHUNK = {"cpu": 1 << 18, "cuda": 1 << 24}  # elements of the PyTorch path's temporaries: what caches hold; few launches


@torch.no_grad()
def accumulate_(flat: Tensor, gradients: Sequence[Tensor], offsets: Sequence[int], first: bool,
                path: str = "torch") -> None:
    """Write each gradient into its range of a flat buffer, or add it there.

    Args:
        flat: [N] fp32. Elements that are in no range stay as they are.
        gradients: fp32, bf16 or fp16, of any shape; widened before they are added.
        offsets: first element of each gradient's range; ranges do not overlap.
        first: whether ranges are written, whatever was there; otherwise they are added to.
        path: from `KernelPaths`.
    """
    for gradient, offset in zip(gradients, offsets, strict=True):
        part = flat[offset : offset + gradient.numel()].view(gradient.shape)
        part.copy_(gradient) if first else part.add_(gradient)


@torch.no_grad()
def squared_norm(flat: Tensor, path: str = "torch") -> Tensor:
    """Return the sum of all squares of a flat fp32 buffer, [N], as an fp32 scalar on its device.

    The sum of rows is fp64, the same in every run; infinities and NaN go through.
    """
    rows = flat.numel() // _ROW
    body = torch.linalg.vector_norm(flat[: rows * _ROW].view(rows, _ROW), dim=1)
    rest = torch.linalg.vector_norm(flat[rows * _ROW :])
    return (body.double().square().sum() + rest.double().square()).float()


@torch.no_grad()
def adamw_(master: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, weights: Tensor | None, *, lr: Tensor,
           step: Tensor, squared_norm: Tensor, clipping: float, betas: tuple[float, float], eps: float,
           weight_decay: float, zero: bool = False, path: str = "torch") -> None:
    """Do one update in place; masters, moments and weights stay as they are where the norm is not finite.

    Args:
        master, gradient, exp_avg, exp_avg_sq: [n] fp32, any ranges of flat buffers.
        weights: [n] bf16 or fp16, which become the rounded masters; None where the masters are the weights.
        lr: fp32 scalar on the device.
        step: fp32 scalar on the device, the number of this update, from 1.
        squared_norm: fp32 scalar on the device, of the whole gradient, of which this may be a range.
        clipping: largest norm; a larger gradient is scaled down to it. 0 takes it as it is.
        betas, eps, weight_decay: of AdamW.
        zero: whether the gradient is zeroed afterwards, also where nothing else changes.
        path: from `KernelPaths`.
    """
    finite = squared_norm.isfinite()
    factor = (clipping / (squared_norm.sqrt() + _TINY)).clamp(max=1.0)
    exact, rate = step.double(), lr.double()
    step_size = (rate / (1 - betas[0] ** exact)).float()
    correction = (1 - betas[1] ** exact).sqrt().float()
    shrink = (1 - rate * weight_decay).float()
    chunk = _CHUNK.get(master.device.type, _CHUNK["cuda"])
    for start in range(0, master.numel(), chunk):
        part = slice(start, start + chunk)
        scaled = gradient[part] * factor if clipping else gradient[part]
        average = exp_avg[part].lerp(scaled, 1 - betas[0])
        square = (exp_avg_sq[part] * betas[1]).addcmul_(scaled, scaled, value=1 - betas[1])
        divisor = square.sqrt().div_(correction).add_(eps)
        moved = (master[part] * shrink).sub_((average * step_size).div_(divisor))
        for new, kept in ((moved, master[part]), (average, exp_avg[part]), (square, exp_avg_sq[part])):
            torch.where(finite, new, kept, out=kept)
        if weights is not None:
            torch.where(finite, moved.to(weights.dtype), weights[part], out=weights[part])
    if zero:
        gradient.zero_()
