"""Rotary position embedding, half-rotation form: channel i turns together with channel i + d/2.

Backward is the turn by the negative angle; it needs neither queries nor keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from megatron_ttl.kernels import build


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
        packed: [b, s, n + 2k, d]: queries, keys, values. Not to be used again: the cuda path turns it in place, and whatever
            kept it for a backward pass fails there with autograd's error of a tensor that was modified. A leaf that
            requires a gradient is refused.
        cos, sin: as for `rotary`.
        kv_heads: k.
        path: from `KernelPaths`.

    Returns:
        Query [b, n, s, d], key and value [b, k, s, d]; on the paths "torch" (value) and "cuda" (all) they are views.
    """
    if path == "cuda":
        _check(packed, cos, sin, kv_heads)
        if torch.compiler.is_compiling():
            return _forward_op(packed, cos, sin, kv_heads)
        if packed.is_leaf and packed.requires_grad:
            raise ValueError("rotary_heads: packed is a leaf that requires a gradient, and would be overwritten; give what a "
                             "projection computed")
        return _RotaryInPlace.apply(packed, cos, sin, kv_heads)  # type: ignore[no-any-return,no-untyped-call]
    # Queries and keys turn together: they lie side by side in the packed projection.
    turned, value = packed.split((packed.shape[2] - kv_heads, kv_heads), dim=2)
    query, key = rotary(turned, cos, sin).split((turned.shape[2] - kv_heads, kv_heads), dim=2)
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def _check(packed: Tensor, cos: Tensor, sin: Tensor, kv_heads: int) -> None:
    """Refuse what the kernel would read or write beside."""
    batch, length, heads, channels = packed.shape
    tables = ((length, channels // 2), (batch, length, channels // 2))
    if (packed.dtype not in build.DTYPES or channels % 2 or not 0 < 2 * kv_heads < heads
            or any(table.dtype != torch.float32 or tuple(table.shape) not in tables or table.device != packed.device
                   for table in (cos, sin)) or cos.shape != sin.shape):
        raise TypeError(f"rotary_heads: packed {packed.dtype} {tuple(packed.shape)} with {kv_heads} key/value heads, cos "
                        f"{cos.dtype} {tuple(cos.shape)}, sin {sin.dtype} {tuple(sin.shape)}; the kernel takes "
                        f"{', '.join(map(str, build.DTYPES))} [b, s, n + 2k, d] with even d, and fp32 tables [s, d/2] or "
                        "[b, s, d/2] on the same device")


def _tables(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return both tables contiguous, and their elements from one sample to the next."""
    return cos.contiguous(), sin.contiguous(), cos.shape[-2:].numel() if cos.dim() == 3 else 0


def _split(packed: Tensor, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    query_heads = packed.shape[2] - 2 * kv_heads
    query, key, value = packed.transpose(1, 2).split((query_heads, kv_heads, kv_heads), dim=1)
    return query, key, value


def _apart(packed: Tensor, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return memory for query, key and value, each [b, heads, s, d] over [b, s, heads, d]."""
    batch, length, heads, channels = packed.shape
    query, key, value = (packed.new_empty(batch, length, count, channels).transpose(1, 2)
                         for count in (heads - 2 * kv_heads, kv_heads, kv_heads))
    return query, key, value


def _sizes(packed: Tensor, kv_heads: int) -> tuple[int, ...]:
    batch, length, heads, channels = packed.shape
    return batch, length, heads - 2 * kv_heads, kv_heads, channels, build.DTYPES[packed.dtype]


def _backward(dquery: Tensor, dkey: Tensor, dvalue: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return the gradient of the packed projection, contiguous, from gradients of any strides."""
    batch, query_heads, length, channels = dquery.shape
    kv_heads = dkey.shape[1]
    gradient = dquery.new_empty(batch, length, query_heads + 2 * kv_heads, channels)
    gradients = [t if t.stride(-1) == 1 else t.contiguous() for t in (dquery, dkey, dvalue)]
    by_strides = [argument for t in gradients for argument in (t, *t.stride()[:3])]
    build.require_kernels(gradient.device).call("rotary_backward", *by_strides, gradient, *_tables(cos, sin),
                                                *_sizes(gradient, kv_heads), device=gradient.device)
    return gradient


class _RotaryInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: Tensor, cos: Tensor, sin: Tensor, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
        turned = packed.detach().contiguous()
        build.require_kernels(packed.device).call("rotary_in_place", turned, *_tables(cos, sin),
                                                  *_sizes(turned, kv_heads), device=packed.device)
        increment_version(packed)
        ctx.save_for_backward(cos, sin)
        return _split(turned, kv_heads)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dquery: Tensor, dkey: Tensor, dvalue: Tensor) -> tuple[Tensor, None, None, None]:
        return _backward(dquery, dkey, dvalue, *ctx.saved_tensors), None, None, None


# For torch.compile, which sees an operator with shapes and a backward pass, and does not look inside; its outputs must be
# memory of their own.
@torch.library.custom_op("megatron_ttl::rotary_heads", mutates_args=(), schema=(
    "(Tensor packed, Tensor cos, Tensor sin, int kv_heads) -> (Tensor, Tensor, Tensor)"))
def _forward_op(packed: Tensor, cos: Tensor, sin: Tensor, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    packed = packed.contiguous()
    query, key, value = _apart(packed, kv_heads)
    build.require_kernels(packed.device).call("rotary_apart", packed, query, key, value, *_tables(cos, sin),
                                              *_sizes(packed, kv_heads), device=packed.device)
    return query, key, value


@_forward_op.register_fake
def _(packed: Tensor, cos: Tensor, sin: Tensor, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    return _apart(packed, kv_heads)


@torch.library.custom_op("megatron_ttl::rotary_backward", mutates_args=(), schema=(
    "(Tensor dquery, Tensor dkey, Tensor dvalue, Tensor cos, Tensor sin) -> Tensor"))
def _backward_op(dquery: Tensor, dkey: Tensor, dvalue: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _backward(dquery, dkey, dvalue, cos, sin)


@_backward_op.register_fake
def _(dquery: Tensor, dkey: Tensor, dvalue: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    batch, query_heads, length, channels = dquery.shape
    return dquery.new_empty(batch, length, query_heads + 2 * dkey.shape[1], channels)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[1:3])


def _differentiate(ctx: Any, dquery: Tensor, dkey: Tensor, dvalue: Tensor) -> tuple[Tensor, None, None, None]:
    return _backward_op(dquery, dkey, dvalue, *ctx.saved_tensors), None, None, None


_forward_op.register_autograd(_differentiate, setup_context=_keep)
