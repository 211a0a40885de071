"""AdamW and which weights it decays."""

from __future__ import annotations

import torch
from torch import nn

from megatron_ttl.config.schema import OptimizerConfig
from megatron_ttl.model.llama import TokenEmbedding


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict]:
    """Split the parameters into decayed and not decayed, by what they are and never by their names.

    TTL asked for norms without decay by a name that no parameter had, and decayed them all.

    Returns:
        One or two groups of `{"params", "names", "weight_decay"}` that together hold every parameter once.
    """
    embeddings = {id(p) for module in model.modules() if isinstance(module, TokenEmbedding)
                  for p in module.parameters()}
    groups = [{"params": [], "names": [], "weight_decay": decay} for decay in (config.weight_decay, 0.0)]
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            decays = config.decay_norms
        else:
            decays = config.decay_embeddings or id(parameter) not in embeddings
        group = groups[0 if decays else 1]
        group["params"].append(parameter)
        group["names"].append(name)
    return [group for group in groups if group["params"]]


def build_optimizer(groups: list[dict], config: OptimizerConfig, device: torch.device) -> torch.optim.AdamW:
    """Build torch's AdamW; the engine replaces its parameters by fp32 partitions and keeps the rest.

    Source: Loshchilov & Hutter 2019, decoupled weight decay.
    """
    bare = [{key: group[key] for key in ("params", "weight_decay")} for group in groups]
    return torch.optim.AdamW(bare, lr=config.lr, betas=config.betas, eps=config.eps, fused=device.type == "cuda")
