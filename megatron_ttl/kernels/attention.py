"""Causal attention with grouped key/value heads.

PyTorch has several implementations, which it calls backends, and chooses among them by switches of the whole process.
Here every call names its own. How each goes about groups of query heads that share a key: flash, cuDNN, the package
flash-attn and the processor's backend read the shared head in place; `efficient` cannot, so its keys and values are repeated
in memory; `math` repeats them itself. Masks are for `efficient` on a GPU, whatever the path: flash and flash-attn take none,
and cuDNN is left out for its limits on shapes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_ttl.kernels.flash_attn import causal_flash_attn

_NAMED = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
          "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}


def attention_reference(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute softmax(q k^T / sqrt(d) + mask) v in fp32, written out; arguments as for `attention`."""
    queries, keys = query.shape[2], key.shape[2]
    group = query.shape[1] // key.shape[1]
    key, value = (x.float().repeat_interleave(group, dim=1) for x in (key, value))  # [b, n, s, d]
    scores = query.float() @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])  # [b, n, s_q, s_k]
    if mask is not None:
        scores = scores + mask.float()
    future = torch.ones(queries, keys, dtype=torch.bool, device=query.device).triu(keys - queries + 1)
    return (scores.masked_fill(future, -math.inf).softmax(-1) @ value).to(query.dtype)


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, path: str = "auto") -> Tensor:
    """Attend causally; the last query sees every key, unless a mask says otherwise.

    Args:
        query: [b, n, s_q, d].
        key, value: [b, k, s_k, d] with n a multiple of k and s_k >= s_q (longer when a cache holds earlier tokens).
        mask: [b, 1, s_q, s_k], added to the scores; causal itself, and every query sees a key.
        path: "auto", the fastest backend that takes these tensors; "cudnn", "flash", "efficient" or "math", that one and no
            other where queries and keys are equally many and no mask is given; "flash_attn", the package, likewise.

    Returns:
        [b, n, s_q, d], stored as [b, s_q, n, d] by all but `math`.
    """
    if mask is not None:
        assert mask.shape[-2:] == (query.shape[2], key.shape[2]), "a mask is for every query and every key"
        return _attend(query, key, value, _masking_backends(query), mask)
    if query.shape[2] == key.shape[2]:
        if path == "flash_attn":
            return causal_flash_attn(query, key, value)
        return _attend(query, key, value, _backends(query, path))
    grouped = query.shape[1] != key.shape[1]
    if query.shape[2] == 1:
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=grouped)
    # Several queries on top of a cache: PyTorch's is_causal would align the triangle to the first key.
    seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
    mask = seen.tril(key.shape[2] - query.shape[2])
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=grouped)


def _attend(query: Tensor, key: Tensor, value: Tensor, backends: list[SDPBackend], mask: Tensor | None = None) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    if grouped and query.is_cuda and backends[0] is SDPBackend.EFFICIENT_ATTENTION:
        # It takes no groups, and PyTorch would go on to the written-out formula without a word.
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
        grouped = False
    with sdpa_kernel(backends, set_priority=True):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)


def _backends(query: Tensor, path: str) -> list[SDPBackend]:
    """Order PyTorch's backends; one that is asked for by name stands alone, so that PyTorch says where it cannot."""
    if path in _NAMED:
        return [_NAMED[path]]
    if not query.is_cuda:
        return [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    if query.dtype == torch.float32:
        return [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    fused = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return [SDPBackend.CUDNN_ATTENTION, *fused] if _cudnn_leads(query.device) else fused


def _masking_backends(query: Tensor) -> list[SDPBackend]:
    """Order the backends that add any mask: on a GPU flash takes none, and cuDNN is left out for its limits on shapes."""
    first = SDPBackend.EFFICIENT_ATTENTION if query.is_cuda else SDPBackend.FLASH_ATTENTION
    return [first, SDPBackend.MATH]


def _cudnn_leads(device: torch.device) -> bool:
    """On Hopper alone: 1.6 times flash there, slower on Ampere."""
    return torch.cuda.get_device_capability(device)[0] == 9
