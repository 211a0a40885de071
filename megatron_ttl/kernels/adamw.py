"""AdamW over flat buffers: gradients are added up in fp32, clipped, and applied without asking the device anything.

Learning rate, number of the update and norm are scalars on the device; an update whose gradient is not finite leaves
masters, moments and weights as they are, bit for bit.

Source: Loshchilov & Hutter 2019, decoupled weight decay; Kingma & Ba 2015, bias corrections.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_ttl.kernels import build
from megatron_ttl.kernels.apex import apex_adam

_TINY = 1e-6  # as torch.nn.utils.clip_grad_norm_ has it
_ROW = 1024  # elements whose squares the PyTorch path adds up in fp32; sums of rows are fp64
_CHUNK = {"cpu": 1 << 18, "cuda": 1 << 24}  # elements of the PyTorch path's temporaries: what caches hold; few launches
_APEX_ELEMENTS, _APEX_CHUNK = 1 << 30, 1 << 16  # it counts the elements of a tensor in 32 bits; those of one block
_STRETCH = 8192  # elements of one block, as csrc/adamw.cu has it


def accumulate_(flat: Tensor, gradients: Sequence[Tensor], offsets: Sequence[int], first: bool,
                path: str = "torch") -> None:
    """Write each gradient into its range of a flat buffer, or add it there.

    Args:
        flat: [N] fp32. Elements that are in no range stay as they are.
        gradients: fp32, bf16 or fp16, of any shape; widened before they are added.
        offsets: first element of each gradient's range; ranges do not overlap.
        first: whether ranges are written, whatever was there; otherwise they are added to.
        path: from `KernelPaths`.

    Raises:
        ValueError: a buffer or gradient is not as it must be.
    """
    _accumulate(flat, gradients, offsets, first, path, squares=False)


def accumulate_and_square_(flat: Tensor, gradients: Sequence[Tensor], offsets: Sequence[int], first: bool,
                           path: str = "torch") -> Tensor:
    """Accumulate as `accumulate_` does and return the buffer's squared norm, which needs no reading of its own then.

    What lies in no range must be zero.

    Returns:
        fp32 scalar on the buffer's device, as `squared_norm` gives it.
    """
    result = _accumulate(flat, gradients, offsets, first, path, squares=True)
    return squared_norm(flat, path) if result is None else result


@torch.no_grad()
def _accumulate(flat: Tensor, gradients: Sequence[Tensor], offsets: Sequence[int], first: bool, path: str,
                squares: bool) -> Tensor | None:
    """Accumulate; return the squared norm if it was asked for and came along."""
    sizes = [gradient.numel() for gradient in gradients]
    _check_ranges(flat, gradients, offsets, sizes)
    if path != "cuda":
        for gradient, offset, size in zip(gradients, offsets, sizes, strict=True):
            part = flat[offset : offset + size].view(gradient.shape)
            part.copy_(gradient) if first else part.add_(gradient)
        return None
    gradients = [gradient.contiguous() for gradient in gradients]
    rows = array("q")  # a list would take torch longer than all else here
    for gradient, offset, size in zip(gradients, offsets, sizes, strict=True):
        rows.extend((gradient.data_ptr(), offset, size, build.DTYPES[gradient.dtype]))
    table = torch.frombuffer(rows, dtype=torch.int64) if rows else None
    partial, result = _sums(flat, sizes) if squares else (None, None)
    build.require_kernels(flat.device).call(
        "accumulate", flat, table, len(gradients), int(not first), partial, 0 if partial is None else partial.numel(),
        result, device=flat.device)
    return result


@torch.no_grad()
def squared_norm(flat: Tensor, path: str = "torch") -> Tensor:
    """Return the sum of all squares of a flat fp32 buffer, [N], as an fp32 scalar on its device.

    The sum of parts is fp64, the same in every run; infinities and NaN go through.
    """
    _check_flat({"flat": flat}, flat)
    if path == "cuda":
        partial, result = _sums(flat, [flat.numel()])
        build.require_kernels(flat.device).call("squared_norm", flat, flat.numel(), partial, partial.numel(), result,
                                                device=flat.device)
        return result
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
        path: from `KernelPaths`; "apex" leaves the gradient scaled.

    Raises:
        ValueError: a buffer or scalar is not as it must be.
    """
    _check_flat({"master": master, "gradient": gradient, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}, master)
    _check_update(master, weights, {"lr": lr, "step": step, "squared_norm": squared_norm})
    if path == "cuda":
        numbers = torch.tensor((*betas, eps, weight_decay, clipping), dtype=torch.float64, device="cpu")
        dtype = build.DTYPES[torch.float32 if weights is None else weights.dtype]
        build.require_kernels(master.device).call(
            "adamw", master, gradient, exp_avg, exp_avg_sq, weights, dtype, master.numel(), int(zero), lr, step,
            squared_norm, numbers, device=master.device)
        return
    finite = squared_norm.isfinite()
    factor = (clipping / (squared_norm.sqrt() + _TINY)).clamp(max=1.0) if clipping else torch.ones_like(squared_norm)
    if path == "apex":
        _apex_update((gradient, master, exp_avg, exp_avg_sq), lr, step, finite, factor, betas, eps, weight_decay)
        if weights is not None:
            torch.where(finite, master.to(weights.dtype), weights, out=weights)
    else:
        _torch_update((master, gradient, exp_avg, exp_avg_sq, weights), lr, step, finite, factor, betas, eps, weight_decay)
    if zero:
        gradient.zero_()


def _torch_update(buffers: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None], lr: Tensor, step: Tensor,
                  finite: Tensor, factor: Tensor, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """Update by the operations of `torch.optim.AdamW` in its order, a piece at a time."""
    master, gradient, exp_avg, exp_avg_sq, weights = buffers
    exact, rate = step.double(), lr.double()
    step_size = (rate / (1 - betas[0] ** exact)).float()
    correction = (1 - betas[1] ** exact).sqrt().float()
    shrink = (1 - rate * weight_decay).float()
    chunk = _CHUNK.get(master.device.type, _CHUNK["cuda"])
    for start in range(0, master.numel(), chunk):
        part = slice(start, start + chunk)
        scaled = gradient[part] * factor
        average = exp_avg[part].lerp(scaled, 1 - betas[0])
        square = (exp_avg_sq[part] * betas[1]).addcmul_(scaled, scaled, value=1 - betas[1])
        divisor = square.sqrt().div_(correction).add_(eps)
        moved = (master[part] * shrink).sub_((average * step_size).div_(divisor))
        for new, kept in ((moved, master[part]), (average, exp_avg[part]), (square, exp_avg_sq[part])):
            torch.where(finite, new, kept, out=kept)
        if weights is not None:
            torch.where(finite, moved.to(weights.dtype), weights[part], out=weights[part])


def _apex_update(buffers: tuple[Tensor, ...], lr: Tensor, step: Tensor, finite: Tensor, factor: Tensor,
                 betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """Update by NVIDIA Apex's kernel for captured graphs, which takes these scalars from the device as well.

    Args:
        buffers: gradient, masters, moments.
        lr, step, finite, factor, betas, eps, weight_decay: of the update.

    Source: https://github.com/NVIDIA/apex, csrc/multi_tensor_adam.cu.
    """
    lists = [list(buffer.split(_APEX_ELEMENTS)) for buffer in buffers]
    adamw_mode, correct_bias = 1, 1
    apex_adam()(_APEX_CHUNK, (~finite).int(), lists, lr, *betas, eps, step.int(), adamw_mode,
                correct_bias, weight_decay, factor)


def _sums(flat: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return room for the sums of all blocks over ranges of these sizes, and for the sum of these."""
    return flat.new_empty(sum(-(-size // _STRETCH) for size in sizes), dtype=torch.float64), flat.new_empty(())


def _check_flat(buffers: dict[str, Tensor], like: Tensor) -> None:
    for name, buffer in buffers.items():
        if buffer.dtype != torch.float32 or buffer.dim() != 1 or not buffer.is_contiguous():
            raise ValueError(f"{name} must be a contiguous fp32 vector, not {tuple(buffer.shape)} {buffer.dtype}")
        if buffer.numel() != like.numel() or buffer.device != like.device:
            raise ValueError(f"{name} has {buffer.numel()} elements on {buffer.device}; "
                             f"the masters have {like.numel()} on {like.device}")


def _check_update(master: Tensor, weights: Tensor | None, scalars: dict[str, Tensor]) -> None:
    for name, scalar in scalars.items():
        if scalar.dtype != torch.float32 or scalar.numel() != 1 or scalar.device != master.device:
            raise ValueError(f"{name} must be an fp32 scalar on {master.device}, not {tuple(scalar.shape)} {scalar.dtype} "
                             f"on {scalar.device}")
    if weights is not None and (weights.dtype not in (torch.bfloat16, torch.float16) or weights.shape != master.shape
                                or not weights.is_contiguous() or weights.device != master.device):
        raise ValueError(f"weights must be {master.numel()} contiguous bf16 or fp16 elements on {master.device}, "
                         f"not {tuple(weights.shape)} {weights.dtype} on {weights.device}")


def _check_ranges(flat: Tensor, gradients: Sequence[Tensor], offsets: Sequence[int], sizes: Sequence[int]) -> None:
    _check_flat({"flat": flat}, flat)
    kinds = {(gradient.dtype, gradient.device) for gradient in gradients}
    if not kinds <= {(dtype, flat.device) for dtype in build.DTYPES}:
        raise ValueError(f"gradients must be fp32, bf16 or fp16 on {flat.device}, not all of {sorted(map(str, kinds))}")
    for offset, size in zip(offsets, sizes, strict=True):
        if offset < 0 or offset + size > flat.numel():
            raise ValueError(f"a gradient of {size} elements at {offset} does not fit into {flat.numel()}")
