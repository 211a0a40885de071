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
        Two groups of `{"params", "names", "weight_decay"}` that together hold every parameter once; also where all
        have the same decay, for DeepSpeed adds up norms group by group over pipeline stages, which must have equally
        many.
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
    if not all(group["params"] for group in groups):
        full = groups[0] if groups[0]["params"] else groups[1]
        groups = [{"params": full["params"][part], "names": full["names"][part], "weight_decay": full["weight_decay"]}
                  for part in (slice(None, -1), slice(-1, None))]
    return groups


def build_optimizer(groups: list[dict], config: OptimizerConfig, device: torch.device,
                    offload: bool = False) -> torch.optim.AdamW:
    """Build torch's AdamW; the engine replaces its parameters by fp32 partitions and keeps the rest.

    Fused where that pays: on GPUs, and on the host for state that was put there (DeepSpeed's own CPU optimizer would
    have to be compiled first).


    Source: Loshchilov & Hutter 2019, decoupled weight decay.
    """
    bare = [{key: group[key] for key in ("params", "weight_decay")} for group in groups]
    fused = device.type == "cuda" or offload
    return torch.optim.AdamW(bare, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)
