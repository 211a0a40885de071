"""The door to the package flash-attn: attention on [b, s, n, d], with shared key/value heads read in place.

It is built against one version of PyTorch and CUDA, so it is never required: whoever installs it may choose it.
Source: Dao 2023 (FlashAttention-2); https://github.com/Dao-AILab/flash-attention.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from megatron_ttl.errors import ConfigError


def flash_attn_refusal(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> str | None:
    """Return why the package cannot compute for a device and dtype here; None where it can."""
    if importlib.util.find_spec("flash_attn") is None:
        return "the package flash-attn is not installed; install it for this PyTorch and CUDA, or take attention \"auto\""
    if device.type != "cuda":
        return f"the package flash-attn computes on a GPU and not on {device.type}; take attention \"auto\""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the package flash-attn computes in bf16 and fp16, not in {dtype}; take attention \"auto\", or bf16"
    return None


def causal_flash_attn(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend causally: [b, n, s, d], [b, k, s, d] twice -> [b, n, s, d], stored as [b, s, n, d].

    Raises:
        ConfigError: the package is not here, or not for these tensors.
    """
    if not torch.compiler.is_compiling():  # what a compiled region does was asked before, without it
        refusal = flash_attn_refusal(query.device, query.dtype)
        if refusal:
            raise ConfigError(f"attention: \"flash_attn\"; {refusal}")
    from flash_attn import flash_attn_func

    return flash_attn_func(*(x.transpose(1, 2) for x in (query, key, value)), causal=True).transpose(1, 2)
