"""The loss of a step: sum over the global batch divided by its valid tokens, whatever the cut.

Means of means would weight tokens by the micro batch they happen to lie in.
"""

from __future__ import annotations

from torch import Tensor

from megatron_ttl.kernels.cross_entropy import IGNORED_LABEL, cross_entropy


def valid_tokens(micro_batches: list[tuple[Tensor, Tensor]]) -> int:
    """Count this process's labels that count in a step."""
    return sum(int((labels != IGNORED_LABEL).sum()) for _, labels in micro_batches)


def loss_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum the nats of one micro batch: [b, s, v], [b, s] -> fp32 scalar."""
    return cross_entropy(logits, labels)


def backward_scale(global_valid_tokens: float, accumulation: int, data_parallel_size: int) -> float:
    """Return the factor on a micro batch's sum that makes the engine's gradient that of the global mean.

    The engine divides by the accumulation and averages over data parallel; both are undone here.
    """
    return accumulation * data_parallel_size / global_valid_tokens
