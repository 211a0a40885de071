"""SwiGLU on a packed projection: silu(gate) * up, with silu(x) = x s and s = 1 / (1 + exp(-x)).

Backward: dgate = dy up s (1 + x (1 - s)) and dup = dy x s at x = gate; s is computed again, nothing but the projection is
kept. The product that follows keeps the activation y for the gradient of its weight, dout^T y. `swiglu_linear` is both, and
forgets y: it takes dy = dout W first, and then one pass over the projection gives its gradient and y again, 12 f bytes per
token in 16 bits, of which y is 2 f.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ttl.kernels import build


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """Compute silu(gate) * up in fp32 and round once. Source: Shazeer 2020, equation 6."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (gate * gate.sigmoid() * up).to(gate_up.dtype)


def swiglu(gate_up: Tensor, path: str = "torch") -> Tensor:
    """Gate the upper half of the last dimension by the lower half.

    Args:
        gate_up: [..., 2f], gate then up; the cuda path takes fp32, bf16 and fp16, and copies what is not contiguous.
        path: from `KernelPaths`; "cuda" computes in fp32 and rounds once, "torch" rounds silu(gate) as well.

    Returns:
        [..., f].
    """
    if path == "cuda":
        if torch.compiler.is_compiling():
            return _forward_op(gate_up)
        return _SwiGLU.apply(gate_up)  # type: ignore[no-any-return,no-untyped-call]
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def swiglu_linear(gate_up: Tensor, weight: Tensor, path: str = "torch") -> Tensor:
    """Gate, and multiply by a weight; the numbers are those of `F.linear(swiglu(gate_up, path), weight)`, bit for bit.

    Args:
        gate_up: [..., 2f], as for `swiglu`.
        weight: [h, f].
        path: from `KernelPaths`; "cuda" keeps the two arguments alone, and its backward kernel writes the activation again,
            a fifth more bytes than it moves anyway. "torch", and torch.compile, keep what both operations keep.

    Returns:
        [..., h].
    """
    if path == "cuda" and not torch.compiler.is_compiling():
        return _SwiGLULinear.apply(gate_up, weight)  # type: ignore[no-any-return,no-untyped-call]
    return F.linear(swiglu(gate_up, path), weight)


def _forward(gate_up: Tensor) -> Tensor:
    if gate_up.dtype not in build.DTYPES or gate_up.shape[-1] % 2:
        raise TypeError(f"swiglu: {gate_up.dtype} {tuple(gate_up.shape)}; the kernel takes {', '.join(map(str, build.DTYPES))}"
                        " and an even last dimension")
    gate_up = gate_up.contiguous()
    y = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    build.require_kernels(y.device).call("swiglu_forward", gate_up, y, y.shape[:-1].numel(), y.shape[-1],
                                         build.DTYPES[y.dtype], device=y.device)
    return y


def _backward(dy: Tensor, gate_up: Tensor, again: Tensor | None = None) -> Tensor:
    """Return the gradient of the projection; write the activation into `again`, which may be dy's own memory."""
    gate_up, dy = gate_up.contiguous(), dy.contiguous()  # a gradient may be an expanded number
    gradient = torch.empty_like(gate_up)
    build.require_kernels(dy.device).call("swiglu_backward", dy, gate_up, gradient, again, dy.shape[:-1].numel(),
                                          dy.shape[-1], build.DTYPES[dy.dtype], device=dy.device)
    return gradient


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return _forward(gate_up)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return _backward(dy, *ctx.saved_tensors)


class _SwiGLULinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up, weight)
        return F.linear(_forward(gate_up), weight)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:
        gate_up, weight = ctx.saved_tensors
        rows = dout.reshape(-1, len(weight))
        dy = y = rows.mm(weight)  # the kernel reads the one and leaves the other
        gradient = _backward(dy.view(*gate_up.shape[:-1], weight.shape[1]), gate_up, y)
        return gradient, rows.t().mm(y)


# The same for torch.compile, which sees an operator with shapes and a backward pass, and does not look inside.
@torch.library.custom_op("megatron_ttl::swiglu", mutates_args=(), schema="(Tensor gate_up) -> Tensor")
def _forward_op(gate_up: Tensor) -> Tensor:
    return _forward(gate_up)


@_forward_op.register_fake
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@torch.library.custom_op("megatron_ttl::swiglu_backward", mutates_args=(), schema="(Tensor dy, Tensor gate_up) -> Tensor")
def _backward_op(dy: Tensor, gate_up: Tensor) -> Tensor:
    return _backward(dy, gate_up)


@_backward_op.register_fake
def _(dy: Tensor, gate_up: Tensor) -> Tensor:
    return torch.empty_like(gate_up, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dy: Tensor) -> Tensor:
    return _backward_op(dy, *ctx.saved_tensors)


_forward_op.register_autograd(_differentiate, setup_context=_keep)
