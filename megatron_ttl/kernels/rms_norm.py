"""RMSNorm, alone and after a residual addition: y = x / sqrt(mean(x^2) + eps) * weight.

Backward, with r = 1 / sqrt(mean(x^2) + eps) and g = dy * weight: dx = r (g - x r^2 mean(g x)), and dweight = sum over the
rows of dy x r, added up in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ttl.kernels import build
from megatron_ttl.kernels.apex import apex_rms_norm

_BLOCKS_PER_MULTIPROCESSOR = 2
"""Of the backward pass: so many fit, by their registers; each leaves one partial sum of the weight's gradient."""


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
        x: [..., h], fp32, bf16 or fp16; the cuda path copies what is not contiguous.
        weight: [h], same dtype.
        eps: added to the mean square.
        path: from `KernelPaths`.

    Returns:
        [..., h] in the dtype of `x`; statistics are fp32.
    """
    if path == "cuda":
        if torch.compiler.is_compiling():
            return _forward_op(x, None, weight, eps)[1]
        return _RMSNorm.apply(x, weight, eps)  # type: ignore[no-any-return,no-untyped-call]
    if path == "apex":
        return apex_rms_norm(x, weight, eps)
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
    if path == "cuda":
        if torch.compiler.is_compiling():
            total, y, _ = _forward_op(x, delta, weight, eps)
            return total, y
        return _AddRMSNorm.apply(x, delta, weight, eps)  # type: ignore[no-any-return,no-untyped-call]
    total = x + delta
    return total, rms_norm(total, weight, eps, path)


def _forward(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return (total, y, 1/rms); there is no total without a delta."""
    if x.dtype not in build.DTYPES or weight.dtype != x.dtype or weight.shape != x.shape[-1:] or (
            delta is not None and (delta.dtype != x.dtype or delta.shape != x.shape)):
        raise TypeError(f"rms_norm: x {x.dtype} {tuple(x.shape)}, weight {weight.dtype} {tuple(weight.shape)}"
                        + ("" if delta is None else f", delta {delta.dtype} {tuple(delta.shape)}")
                        + "; all must be fp32, bf16 or fp16, one of them, and the weight as wide as x")
    x, weight, delta = x.contiguous(), weight.contiguous(), None if delta is None else delta.contiguous()
    total = None if delta is None else torch.empty_like(x)
    y = torch.empty_like(x)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    build.require_kernels(x.device).call(
        "rms_norm_forward", x, delta, weight, total, y, rstd, rstd.numel(), x.shape[-1], float(eps),
        build.DTYPES[x.dtype], device=x.device)
    return total, y, rstd


def _backward(dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor,
              weight_too: bool) -> tuple[Tensor, Tensor | None]:
    """Return (dx, dweight); there is no dweight where it is not wanted. `x` is what was normed."""
    x, dy, weight = x.contiguous(), dy.contiguous(), weight.contiguous()  # a gradient may be an expanded number
    dx = torch.empty_like(x)
    blocks = _BLOCKS_PER_MULTIPROCESSOR * build.multiprocessors(x.device)
    partials = torch.empty(blocks, x.shape[-1], dtype=torch.float32, device=x.device) if weight_too else None
    dweight = torch.empty_like(weight) if weight_too else None
    build.require_kernels(x.device).call(
        "rms_norm_backward", dy, None if dtotal is None else dtotal.contiguous(), x, weight, rstd, dx, partials,
        dweight, rstd.numel(), x.shape[-1], blocks, build.DTYPES[x.dtype], device=x.device)
    return dx, dweight


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        _, y, rstd = _forward(x, None, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None]:
        dx, dweight = _backward(dy, None, *ctx.saved_tensors, weight_too=ctx.needs_input_grad[1])
        return dx, dweight, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total, y, rstd = _forward(x, delta, weight, eps)
        ctx.save_for_backward(total, weight, rstd)
        ctx.set_materialize_grads(False)  # an output that nobody used has no gradient, and no zeros are written for it
        return total, y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dtotal: Tensor | None,
                 dy: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        if dy is None:
            return dtotal, dtotal, None, None
        dx, dweight = _backward(dy, dtotal, *ctx.saved_tensors, weight_too=ctx.needs_input_grad[2])
        return dx, dx, dweight, None


# The same for torch.compile, which sees an operator with shapes and a backward pass, and does not look inside.
@torch.library.custom_op("megatron_ttl::rms_norm", mutates_args=(),
                         schema="(Tensor x, Tensor? delta, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)")
def _forward_op(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    total, y, rstd = _forward(x, delta, weight, eps)
    return x.new_empty(0) if total is None else total, y, rstd


@_forward_op.register_fake
def _(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = x.new_empty(0) if delta is None else torch.empty_like(y)
    return total, y, x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("megatron_ttl::rms_norm_backward", mutates_args=(), schema=(
    "(Tensor dy, Tensor? dtotal, Tensor x, Tensor weight, Tensor rstd, bool weight_too) -> (Tensor, Tensor)"))
def _backward_op(dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor,
                 weight_too: bool) -> tuple[Tensor, Tensor]:
    dx, dweight = _backward(dy, dtotal, x, weight, rstd, weight_too)
    return dx, weight.new_empty(0) if dweight is None else dweight


@_backward_op.register_fake
def _(dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor,
      weight_too: bool) -> tuple[Tensor, Tensor]:
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format) if weight_too else weight.new_empty(0)
    return torch.empty_like(x, memory_format=torch.contiguous_format), dweight


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor | None, Tensor, float], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, delta, weight, _ = inputs
    total, _, rstd = output
    ctx.save_for_backward(x if delta is None else total, weight, rstd)
    ctx.added = delta is not None


def _differentiate(ctx: Any, dtotal: Tensor, dy: Tensor,
                   _: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
    weight_too = ctx.needs_input_grad[2]
    dx, dweight = _backward_op(dy, dtotal if ctx.added else None, *ctx.saved_tensors, weight_too)
    return dx, dx if ctx.added else None, dweight if weight_too else None, None


_forward_op.register_autograd(_differentiate, setup_context=_keep)
