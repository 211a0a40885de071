"""The operations of the model as they are measured: fresh inputs, and every implementation there is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_ttl.bench import peer_liger
from megatron_ttl.bench.kernel_bytes import Widths
from megatron_ttl.bench.own_engine import require_path
from megatron_ttl.kernels.cross_entropy import cross_entropy
from megatron_ttl.kernels.rms_norm import add_rms_norm, rms_norm
from megatron_ttl.kernels.rotary import rotary_heads, rotary_tables
from megatron_ttl.kernels.swiglu import swiglu

EPS = 1e-6
_LONGEST = 2048  # tokens of a sample
Operation = Callable[..., Any]


@dataclass(frozen=True)
class Inputs:
    """One set of inputs."""

    leaves: tuple[Tensor, ...]
    """What a gradient is asked for."""
    rest: tuple[Any, ...] = ()

    def __iter__(self) -> Any:
        """Yield all arguments of the operation."""
        return iter((*(_NotLeaf.apply(leaf) for leaf in self.leaves), *self.rest))

    def wide(self) -> Inputs:
        """Return the same numbers in fp32, for the reference."""
        return Inputs(tuple(leaf.detach().float().requires_grad_() for leaf in self.leaves), self.rest)


class _NotLeaf(torch.autograd.Function):
    """The same memory under a name that an operation may write into."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


@dataclass(frozen=True)
class Case:
    """An operation: how its inputs are made and who computes it."""

    key: str
    """What the machine profile calls it."""
    make: Callable[[Widths, int, torch.device, torch.dtype, int], Inputs]
    """(widths, tokens, device, dtype, seed) -> inputs."""
    ours: Callable[..., Any]
    """With `path=...`."""
    others: dict[str, Operation]
    own_paths: tuple[str, ...] = ("cuda", "torch")
    apart: Callable[[Tensor, Inputs], tuple[Tensor, ...]] | None = None
    """How others take what is packed with us, e.g. gate and up as two tensors: copied before anything is timed."""

    def arranged(self, path: str, inputs: Inputs) -> Inputs:
        """Return the inputs as an implementation takes them."""
        if self.apart is None or path not in self.others:
            return inputs
        pieces = self.apart(inputs.leaves[0].detach(), inputs)
        return Inputs(tuple(piece.clone(memory_format=torch.contiguous_format).requires_grad_() for piece in pieces),
                      inputs.rest)

    def implementations(self) -> dict[str, Operation]:
        """Return every implementation by the name of its row."""
        own = {path: partial(self._own, path) for path in self.own_paths}
        compiled = {"compiled": torch.compile(partial(self.ours, path="torch"), dynamic=False)}
        return own | compiled | self.others

    def _own(self, path: str, first: Tensor, *rest: Any) -> Any:
        """Compute on a path that is there; a path that is not would quietly be another."""
        return self.ours(first, *rest, path=require_path(self.key, path, first.device))


def _shape(tokens: int) -> tuple[int, int]:
    length = min(_LONGEST, tokens)
    return tokens // length, length


def _drawn(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, device=device, dtype=dtype, generator=generator).requires_grad_()


def _norm_inputs(additions: int, widths: Widths, tokens: int, device: torch.device, dtype: torch.dtype,
                 seed: int) -> Inputs:
    drawn = [_drawn((*_shape(tokens), widths.hidden), device, dtype, seed + 7 * number) for number in range(additions + 1)]
    return Inputs((*drawn, _drawn((widths.hidden,), device, dtype, seed + 3)), (EPS,))


def _rotary_inputs(widths: Widths, tokens: int, device: torch.device, dtype: torch.dtype, seed: int) -> Inputs:
    batch, length = _shape(tokens)
    packed = _drawn((batch, length, widths.heads + 2 * widths.kv_heads, widths.head_dim), device, dtype, seed)
    return Inputs((packed,), (*rotary_tables(length, widths.head_dim, 10_000.0, device), widths.kv_heads))


def _swiglu_inputs(widths: Widths, tokens: int, device: torch.device, dtype: torch.dtype, seed: int) -> Inputs:
    return Inputs((_drawn((*_shape(tokens), 2 * widths.intermediate), device, dtype, seed),))


def _loss_inputs(widths: Widths, tokens: int, device: torch.device, dtype: torch.dtype, seed: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed + 1)
    labels = torch.randint(widths.vocab, _shape(tokens), device=device, generator=generator)
    return Inputs((_drawn((*_shape(tokens), widths.vocab), device, dtype, seed),), (labels,))


def _liger_rotary(query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, _: int) -> tuple[Tensor, ...]:
    cos, sin = (torch.cat((table, table), -1)[None] for table in (cos, sin))
    return *peer_liger.liger_rotary(query.transpose(1, 2), key.transpose(1, 2), cos, sin), value.transpose(1, 2)


def _heads_apart(packed: Tensor, inputs: Inputs) -> tuple[Tensor, ...]:
    kv_heads = inputs.rest[-1]
    return packed.split((packed.shape[2] - 2 * kv_heads, kv_heads, kv_heads), dim=2)


def _halves_apart(gate_up: Tensor, _: Inputs) -> tuple[Tensor, ...]:
    return gate_up.chunk(2, dim=-1)


CASES = {
    "rms_norm": Case("rms_norm", partial(_norm_inputs, 0), rms_norm, {"liger": peer_liger.liger_rms_norm},
                     ("cuda", "torch", "apex")),
    "add_rms_norm": Case("rms_norm", partial(_norm_inputs, 1), add_rms_norm, {"liger": peer_liger.liger_add_rms_norm},
                         ("cuda", "torch", "apex")),
    "rotary_heads": Case("rotary", _rotary_inputs, rotary_heads, {"liger": _liger_rotary}, apart=_heads_apart),
    "swiglu": Case("swiglu", _swiglu_inputs, swiglu, {"liger": peer_liger.liger_swiglu}, apart=_halves_apart),
    "cross_entropy": Case("cross_entropy", _loss_inputs, cross_entropy, {"liger": peer_liger.liger_cross_entropy}),
}
