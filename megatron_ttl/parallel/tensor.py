"""Tensor parallelism: layers that own a part of a weight, and the four exchanges between them.

A block has two regions. Between them (norms, residual stream) every rank computes the same, or, with sequence
parallelism, a part of the tokens; inside (attention heads, the wide half of the MLP) every rank computes a part of the
channels for all tokens. Entering and leaving exchange activations; backward each does the other's exchange.

Source: Shoeybi et al. 2019, section 3 (f and g); Korthikanti et al. 2022, section 4.2 (with sequence parallelism).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ttl.model.llama import RMSNorm


@dataclass(frozen=True)
class TensorParallel:
    """The ranks that share every layer."""

    group: Any
    size: int
    rank: int
    sequence: bool = False
    """Whether the tokens of norms and residual stream are shared out too."""

    def enter(self, x: Tensor) -> Tensor:
        """Bring every token to every rank: [b, s or s/t, h] -> [b, s, h]; backward adds up the gradients."""
        return _GatherSequence.apply(x, self) if self.sequence else _Copy.apply(x, self)

    def leave(self, x: Tensor) -> Tensor:
        """Add the ranks' partial sums: [b, s, h] -> [b, s or s/t, h]. `x` must not be needed afterwards."""
        return _ScatterSequence.apply(x, self) if self.sequence else _Sum.apply(x, self)

    def share(self, weight: Tensor) -> Tensor:
        """Return a weight that all ranks hold; backward adds up what each learnt from its part of the tokens."""
        return _Copy.apply(weight, self)

    def sum(self, x: Tensor) -> Tensor:
        """Add in place over the ranks."""
        dist.all_reduce(x, group=self.group)
        return x

    def largest(self, x: Tensor) -> Tensor:
        """Take the maximum in place over the ranks."""
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self.group)
        return x

    def gather_sequence(self, x: Tensor) -> Tensor:
        """[b, s/t, h] -> [b, s, h], in the order of the ranks."""
        gathered = x.new_empty(self.size, *x.shape)
        dist.all_gather_into_tensor(gathered.view(-1, *x.shape[1:]), x.contiguous(), group=self.group)
        return gathered.transpose(0, 1).reshape(x.shape[0], -1, *x.shape[2:])

    def scatter_sequence(self, x: Tensor) -> Tensor:
        """Add over the ranks and keep this rank's tokens: [b, s, h] -> [b, s/t, h]."""
        parts = x.view(x.shape[0], self.size, -1, *x.shape[2:]).transpose(0, 1).contiguous()  # [t, b, s/t, h]
        mine = torch.empty_like(parts[0])
        dist.reduce_scatter_tensor(mine, parts.view(-1, *parts.shape[2:]), group=self.group)
        return mine


class _Copy(torch.autograd.Function):
    """Forward nothing; backward add the gradients. They are fresh (one consumer), so in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parallel: TensorParallel) -> Tensor:
        ctx.parallel = parallel
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.parallel.sum(gradient.contiguous()), None


class _Sum(torch.autograd.Function):
    """Forward add; backward nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parallel: TensorParallel) -> Tensor:
        ctx.mark_dirty(x)
        return parallel.sum(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _GatherSequence(torch.autograd.Function):
    """Forward gather the tokens; backward add the gradients and keep one's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parallel: TensorParallel) -> Tensor:
        ctx.parallel = parallel
        return parallel.gather_sequence(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.parallel.scatter_sequence(gradient), None


class _ScatterSequence(torch.autograd.Function):
    """Forward add and keep one's own tokens; backward gather the gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parallel: TensorParallel) -> Tensor:
        ctx.parallel = parallel
        return parallel.scatter_sequence(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.parallel.gather_sequence(gradient), None


class _OwnPart(nn.Module):
    """A module whose weight is this rank's part."""

    def __init__(self, weight: Tensor, parallel: TensorParallel) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.parallel = parallel


class ColumnParallelLinear(_OwnPart):
    """A linear map of which this rank computes some outputs."""

    def forward(self, x: Tensor) -> Tensor:
        """[b, s or s/t, h] -> [b, s, own outputs]"""
        return F.linear(self.parallel.enter(x), self.weight)


class RowParallelLinear(_OwnPart):
    """A linear map of which this rank has some inputs; the ranks' products are added."""

    def forward(self, x: Tensor) -> Tensor:
        """[b, s, own inputs] -> [b, s or s/t, h]"""
        return self.parallel.leave(F.linear(x, self.weight))


class VocabularyParallelEmbedding(_OwnPart):
    """An embedding of which this rank has the rows from `first` on."""

    def __init__(self, weight: Tensor, parallel: TensorParallel, first: int) -> None:
        super().__init__(weight, parallel)
        self.first = first

    def forward(self, input_ids: Tensor) -> Tensor:
        """[b, s] -> [b, s or s/t, h]"""
        own = input_ids - self.first
        elsewhere = (own < 0) | (own >= self.weight.shape[0])
        rows = F.embedding(own.masked_fill(elsewhere, 0), self.weight)
        return self.parallel.leave(rows.masked_fill(elsewhere[..., None], 0.0))


class SequenceParallelNorm(RMSNorm):
    """RMSNorm of this rank's tokens, [b, s/t, h]; its weight is the same everywhere and learns from all."""

    def __init__(self, weight: Tensor, eps: float, parallel: TensorParallel) -> None:
        super().__init__(len(weight), eps)
        self.weight = nn.Parameter(weight)
        self.parallel = parallel

    def scale(self) -> Tensor:
        """Return the weight, which learns from every rank's tokens."""
        return self.parallel.share(self.weight)
