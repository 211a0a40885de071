"""A small model whose weights are far from their start, samples of several documents, and its logits and gradients."""

from __future__ import annotations

import torch

from megatron_ttl.kernels.cross_entropy import cross_entropy

EOS = 2


def spread(model):
    """Return a model with norms that differ from one and attention far from uniform."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.dim() > 1 else parameter.uniform_(0.5, 1.5, generator=generator)
    return model


def token_ids():
    """Two samples of three and two documents."""
    ids = torch.randint(3, 96, (2, 33), generator=torch.Generator().manual_seed(0))
    ids[0, 7] = ids[0, 19] = ids[1, 20] = EOS
    return ids


def logits_and_gradients(logits, ids, model):
    return [logits, *torch.autograd.grad(cross_entropy(logits, ids[:, 1:]), list(model.parameters()))]
