"""Cross-entropy as a sum: dividing by the number of tokens is the business of whoever knows the whole batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED_LABEL = -100


def cross_entropy_reference(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum logsumexp(logits) - logits[label] over the labels that count, in fp32, written out."""
    wide, labels = logits.float().flatten(0, -2), labels.flatten()
    counts = labels != IGNORED_LABEL
    picked = wide.gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    return torch.where(counts, wide.logsumexp(-1) - picked, 0.0).sum()


def cross_entropy(logits: Tensor, labels: Tensor, scale: float | Tensor = 1.0, path: str = "torch") -> Tensor:
    """Sum the losses of a micro batch.

    Args:
        logits: [b, s, v], fp32 or bf16; the softmax is computed in fp32.
        labels: [b, s] int64, already shifted; -100 is ignored.
        scale: a factor on the sum; a path may put it into the gradient that it leaves in the place of the logits.
        path: from `KernelPaths`.

    Returns:
        fp32 scalar, nats times the scale.
    """
    total = F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum")
    return total if isinstance(scale, float) and scale == 1.0 else total * scale
