"""How exact an implementation is on a device: each operation once, forward and backward, against PyTorch's and fp64."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ttl.kernels.adamw import accumulate_and_square_, adamw_
from megatron_ttl.kernels.attention import attention
from megatron_ttl.kernels.cross_entropy import IGNORED_LABEL, cross_entropy
from megatron_ttl.kernels.rms_norm import add_rms_norm
from megatron_ttl.kernels.rotary import rotary_heads, rotary_tables
from megatron_ttl.kernels.swiglu import swiglu

Computation = Callable[..., Sequence[Tensor]]


def error_ratios(paths: Mapping[str, str], device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Run operations once, forward and backward, on inputs that are the same every time.

    Args:
        paths: implementation of each operation that is wanted.
        device, dtype: where and in what.

    Returns:
        For each operation the error of its path over the error of PyTorch's path, both against
        fp64 on the host: the largest over outputs and gradients. About 1 is right.
    """
    ratios = {}
    for operation, (compute, exact, inputs) in _cases(dtype).items():
        if operation not in paths:
            continue
        there = [tensor.to(device) for tensor in inputs]
        wide = _with_gradients(exact, [tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs])
        usual = "auto" if operation == "attention" else "torch"
        ours, torchs = (_with_gradients(lambda *x, path=path, compute=compute: compute(*x, path), there)
                        for path in (paths[operation], usual))
        ratios[operation] = max(_error(a, reference) / max(_error(b, reference), torch.finfo(b.dtype).eps / 8)
                                for a, b, reference in zip(ours, torchs, wide, strict=True))
    return ratios


def _with_gradients(compute: Computation, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the outputs and, of their weighted sum, the gradients of all inputs that are no labels."""
    inputs = [tensor.detach().clone().requires_grad_(tensor.is_floating_point()) for tensor in inputs]
    outputs = compute(*inputs)
    total = sum((out.double() * torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).view(out.shape))
                .sum() if out.dim() else out.double() for out in outputs)
    assert isinstance(total, Tensor)
    kept = [out.detach().clone() for out in outputs]
    if total.requires_grad:
        total.backward()
    return kept + [tensor.grad for tensor in inputs if tensor.grad is not None]


def _error(value: Tensor, exact: Tensor) -> float:
    """Return the relative error; a large number for infinities and NaN, which compare with nothing."""
    return ((value.cpu().double() - exact.double()).norm() / exact.double().norm()).nan_to_num(1e9, 1e9).item()


def _cases(dtype: torch.dtype) -> dict[str, tuple[Computation, Computation, list[Tensor]]]:
    """Return for each operation its function with a path, the same by PyTorch alone, and inputs on the host."""
    generator = torch.Generator().manual_seed(1)  # a run's own random numbers must not depend on who was checked

    def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    cos, sin = rotary_tables(64, 64, 10_000.0, "cpu")

    def rotary_on(packed: Tensor, path: str) -> Sequence[Tensor]:
        return rotary_heads(packed.clone(), cos.to(packed.device), sin.to(packed.device), 2, path=path)

    def rotary_exact(packed: Tensor) -> Sequence[Tensor]:
        first, second = packed[:, :, :6].chunk(2, dim=-1)
        turned = torch.cat((first * cos[:, None] - second * sin[:, None], second * cos[:, None] + first * sin[:, None]), -1)
        return [x.transpose(1, 2) for x in (turned[:, :, :4], turned[:, :, 4:], packed[:, :, 6:])]

    def swiglu_exact(packed: Tensor) -> Sequence[Tensor]:
        gate, up = packed.chunk(2, dim=-1)
        return [F.silu(gate) * up]

    def adamw_on(master: Tensor, gradient: Tensor, path: str) -> Sequence[Tensor]:
        kept = [x.detach().float().clone() for x in (master, gradient, gradient / 2, gradient.float().square())]
        pieces = [piece.detach().clone() for piece in gradient.split((3001, 1999))]  # the second one begins between vectors
        squares = accumulate_and_square_(kept[1], pieces, (0, 3001), True, path)
        weights = None if dtype == torch.float32 else torch.empty_like(kept[0], dtype=dtype)
        lr, step = (torch.tensor(number, device=master.device) for number in (1e-3, 3.0))
        adamw_(*kept, weights, lr=lr, step=step, squared_norm=squares, clipping=1.0, betas=(0.9, 0.95), eps=1e-8,
               weight_decay=0.1, path=path)
        return [kept[0], kept[2], kept[3], squares, kept[0] if weights is None else weights]

    def adamw_exact(master: Tensor, gradient: Tensor) -> Sequence[Tensor]:
        master, gradient = master.detach(), gradient.detach()
        squares = gradient.square().sum()
        clipped = gradient / (squares.sqrt() + 1e-6)
        first, second = 0.9 * gradient / 2 + 0.1 * clipped, 0.95 * gradient.square() + 0.05 * clipped.square()
        update = first / (1 - 0.9**3) / ((second / (1 - 0.95**3)).sqrt() + 1e-8)
        moved = master * (1 - 1e-3 * 0.1) - 1e-3 * update
        return [moved, first, second, squares, moved]

    labels = torch.randint(1000, (4, 64), generator=generator)
    labels[0, :5] = IGNORED_LABEL
    return {
        "rms_norm": (lambda x, delta, weight, path: add_rms_norm(x, delta, weight, 1e-5, path=path),
                     lambda x, delta, weight: (x + delta, F.rms_norm(x + delta, weight.shape, weight, 1e-5)),
                     [random(64, 1024), random(64, 1024), random(1024)]),
        "rotary": (rotary_on, rotary_exact, [random(2, 64, 8, 64)]),
        "swiglu": (lambda x, path: [swiglu(x, path=path)], swiglu_exact, [random(64, 2048)]),
        "cross_entropy": (lambda x, y, path: [cross_entropy(x.clone(), y, path=path)],
                          lambda x, y: [F.cross_entropy(x.flatten(0, 1), y.flatten(), ignore_index=IGNORED_LABEL,
                                                        reduction="sum")], [random(4, 64, 1000), labels]),
        "adamw": (adamw_on, adamw_exact, [random(5000, dtype=torch.float32), random(5000)]),
        "attention": (lambda q, k, v, path: [attention(q, k, v, path=path)],
                      lambda q, k, v: [F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)],
                      [random(2, 4, 64, 64), random(2, 2, 64, 64), random(2, 2, 64, 64)]),
    }
