"""The loss of a step: sum over the global batch divided by its valid tokens, whatever the cut.

Means of means would weight tokens by the micro batch they happen to lie in. Where the vocabulary is cut, no rank ever
sees all logits of a token: three numbers per token are exchanged instead.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from megatron_ttl.kernels.cross_entropy import (
    IGNORED_LABEL,
    cross_entropy,
    finish_cross_entropy_,
    partial_cross_entropy,
    with_gradient_in_place,
)
from megatron_ttl.parallel.tensor import TensorParallel

_ROWS = 64  # tokens whose exact losses are computed at once: 8 MiB of 32k logits; four times faster than 1024


def valid_tokens(micro_batches: list[tuple[Tensor, Tensor]]) -> int:
    """Count this process's labels that count in a step."""
    return sum(int((labels != IGNORED_LABEL).sum()) for _, labels in micro_batches)


def backward_scale(global_valid_tokens: float, accumulation: int, data_parallel_size: int) -> float:
    """Return the factor on a micro batch's sum that makes the engine's gradient that of the global mean.

    The engine divides by the accumulation and averages over data parallel; both are undone here.
    """
    return accumulation * data_parallel_size / global_valid_tokens


def loss_sum(logits: Tensor, labels: Tensor, vocab_size: int, parallel: TensorParallel | None = None,
             scale: float | Tensor = 1.0, path: str = "torch") -> Tensor:
    """Sum the nats of one micro batch: [b, s, v or v/t], [b, s] -> fp32 scalar, the same on every rank.

    Args:
        logits: all, or this rank's part in the order of the ranks, padding at the end.
        labels: already shifted; -100 is ignored.
        vocab_size: without padding.
        parallel: the ranks that share the vocabulary.
        scale: a factor on the sum; a tensor is one fp32 element on the device.
        path: of the cross-entropy, from `KernelPaths`; "cuda" leaves the gradient in the place of the logits.
    """
    if parallel is None:
        return cross_entropy(logits, labels, scale, path)
    if path == "cuda":
        return _fused_vocabulary_parallel(logits, labels.flatten(), vocab_size, parallel, scale)
    total = _VocabularyParallelCrossEntropy.apply(logits, labels, vocab_size, parallel)
    return total if isinstance(scale, float) and scale == 1.0 else total * scale


def _fused_vocabulary_parallel(logits: Tensor, labels: Tensor, vocab_size: int, parallel: TensorParallel,
                               scale: float | Tensor) -> Tensor:
    """One read of the logits, one exchange of maxima and one of sums, one pass that writes the gradient over the logits."""
    first = parallel.rank * logits.shape[-1]
    columns = min(logits.shape[-1], max(0, vocab_size - first))
    own_largest, own_total, own_picked = partial_cross_entropy(logits, labels, first, columns)
    largest = parallel.largest(own_largest.clone())
    total, picked = parallel.sum(torch.stack((own_total * (own_largest - largest).exp(), own_picked)))
    counts = labels != IGNORED_LABEL
    total = torch.where(counts & ((labels < 0) | (labels >= vocab_size)), math.nan, total)  # no rank picked a logit
    nats = torch.where(counts, total.log() - (picked - largest), 0.0)
    loss = (nats.sum(dtype=torch.float64) * scale).float()
    if not (torch.is_grad_enabled() and logits.requires_grad):
        return loss
    finish_cross_entropy_(logits, labels, first, columns, largest, total, scale)
    return with_gradient_in_place(logits, loss, scale)


class _VocabularyParallelCrossEntropy(torch.autograd.Function):
    """logsumexp(logits) - logits[label], with the maximum, the sum and the picked logit reduced over the ranks.

    Source: Shoeybi et al. 2019, section 3 (the fused cross-entropy).
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, vocab_size: int, parallel: TensorParallel) -> Tensor:
        first = parallel.rank * logits.shape[-1]
        own = logits.flatten(0, -2)[:, : max(0, vocab_size - first)]  # without padding  [b s, own]
        flat = labels.flatten()
        largest = parallel.largest(_largest(own))
        exponentials = (own.float() - largest[:, None]).exp_()
        total = parallel.sum(exponentials.sum(-1))
        del exponentials
        inside, place = _place(flat, first, own.shape[1])
        picked = parallel.sum(_pick(own, place, inside).float() - torch.where(inside, largest, 0.0))
        ctx.save_for_backward(logits, flat, largest, total)
        ctx.first, ctx.own = first, own.shape[1]
        return torch.where(flat != IGNORED_LABEL, total.log() - picked, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        logits, flat, largest, total = ctx.saved_tensors
        own = logits.flatten(0, -2)[:, : ctx.own]
        probabilities = (own.float() - largest[:, None]).exp_().div_(total[:, None])
        inside, place = _place(flat, ctx.first, ctx.own)
        if ctx.own:
            probabilities.scatter_add_(1, place[:, None], -inside.float()[:, None])
        probabilities *= torch.where(flat != IGNORED_LABEL, gradient, 0.0)[:, None]
        result = torch.zeros_like(logits)
        result.flatten(0, -2)[:, : ctx.own] = probabilities
        return result, None, None, None


def exact_loss_sum(logits: Tensor, labels: Tensor, vocab_size: int, parallel: TensorParallel | None = None) -> Tensor:
    """Sum the nats of held-out text, as `loss_sum`, but see `exact_nats` -> fp64 scalar."""
    return exact_nats(logits, labels, vocab_size, parallel).sum()


def exact_nats(logits: Tensor, labels: Tensor, vocab_size: int, parallel: TensorParallel | None = None) -> Tensor:
    """Return the nats of every label, 0 where it is ignored: [b, s, v or v/t], [b, s] -> fp64 [b, s].

    Exponentials are taken in fp32, sums and logarithms in fp64: a sum in fp32 would err in the seventh digit, and the
    exponential of the mean would magnify that.
    """
    first = parallel.rank * logits.shape[-1] if parallel else 0
    own = logits.flatten(0, -2)[:, : max(0, vocab_size - first)]
    flat = labels.flatten()
    largest = _largest(own)
    if parallel:
        parallel.largest(largest)
    inside, place = _place(flat, first, own.shape[1])
    totals, picked = [], []
    for rows, most, where, within in zip(own.split(_ROWS), largest.split(_ROWS), place.split(_ROWS),
                                         inside.split(_ROWS), strict=True):
        shifted = rows.float() - most[:, None]
        picked.append(_pick(shifted, where, within).double())
        totals.append(shifted.exp_().sum(-1, dtype=torch.float64))
    both = torch.stack((torch.cat(totals), torch.cat(picked)))
    if parallel:
        parallel.sum(both)
    return torch.where(flat != IGNORED_LABEL, both[0].log() - both[1], 0.0).view(labels.shape)


def most_probable(logits: Tensor, vocab_size: int, parallel: TensorParallel | None = None) -> Tensor:
    """Return the id with the largest logit at every place, the lowest among equals: [b, s, v or v/t] -> int64 [b, s].

    Args:
        logits, vocab_size, parallel: as for `loss_sum`.
    """
    first = parallel.rank * logits.shape[-1] if parallel else 0
    own = logits.flatten(0, -2)[:, : max(0, vocab_size - first)]
    if parallel is None:
        return own.argmax(-1).view(logits.shape[:-1])
    largest = _largest(own)
    everywhere = parallel.largest(largest.clone())
    places = own.argmax(-1) + first if own.shape[1] else torch.zeros_like(everywhere, dtype=torch.int64)
    best = torch.where(largest == everywhere, places, vocab_size)
    return -parallel.largest(-best).view(logits.shape[:-1])


def whole_vocabulary(logits: Tensor, vocab_size: int, parallel: TensorParallel | None = None) -> Tensor:
    """Return all logits, without padding, on every rank that shares the vocabulary: [b, v or v/t] -> [b, v]."""
    if parallel is None:
        return logits[:, :vocab_size]
    first = parallel.rank * logits.shape[-1]
    own = logits[:, : max(0, vocab_size - first)]
    whole = logits.new_zeros(len(logits), vocab_size)
    whole[:, first : first + own.shape[1]] = own
    return parallel.sum(whole)


def _largest(own: Tensor) -> Tensor:
    """Maximum of each token's own logits, fp32; minus infinity where this rank has none."""
    if own.shape[1] == 0:
        return torch.full((own.shape[0],), -math.inf, device=own.device)
    return own.amax(-1).float()


def _place(labels: Tensor, first: int, own: int) -> tuple[Tensor, Tensor]:
    """Return whether each label is this rank's, and its column here (0 where it is not)."""
    inside = (labels >= first) & (labels < first + own)
    return inside, torch.where(inside, labels - first, 0)


def _pick(values: Tensor, place: Tensor, inside: Tensor) -> Tensor:
    if values.shape[1] == 0:
        return torch.zeros(len(place), device=values.device)
    return torch.where(inside, values.gather(1, place[:, None])[:, 0], 0.0)
