"""Causal attention with grouped key/value heads."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


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


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attend causally; the last query sees every key, unless a mask says otherwise.

    Args:
        query: [b, n, s_q, d].
        key, value: [b, k, s_k, d] with n a multiple of k and s_k >= s_q (longer when a cache holds earlier tokens).
        mask: [b, 1, s_q, s_k], added to the scores; causal itself, and every query sees a key.

    Returns:
        [b, n, s_q, d].
    """
    grouped = query.shape[1] != key.shape[1]
    if mask is not None:
        assert mask.shape[-2:] == (query.shape[2], key.shape[2]), "a mask is for every query and every key"
        if grouped and query.is_cuda:  # the one backend there that masks and is no written-out formula takes no groups
            key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
        with sdpa_kernel(_masking_backends(query), set_priority=True):
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask,
                                                  enable_gqa=query.shape[1] != key.shape[1])
    if query.shape[2] == key.shape[2]:
        with sdpa_kernel(_backends(query), set_priority=True):
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
    if query.shape[2] == 1:
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=grouped)
    # Several queries on top of a cache: PyTorch's is_causal would align the triangle to the first key.
    seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
    mask = seen.tril(key.shape[2] - query.shape[2])
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=grouped)


def _backends(query: Tensor) -> list[SDPBackend]:
    """Order PyTorch's backends: cuDNN leads on Hopper only (1.6 times flash there, slower on Ampere)."""
    if not query.is_cuda or query.dtype == torch.float32:
        return [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    hopper = torch.cuda.get_device_capability(query.device)[0] == 9
    first = [SDPBackend.CUDNN_ATTENTION] if hopper else []
    return [*first, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def _masking_backends(query: Tensor) -> list[SDPBackend]:
    """Order the backends that add any mask: on a GPU flash takes none, and cuDNN is left out for its limits on shapes."""
    first = SDPBackend.EFFICIENT_ATTENTION if query.is_cuda else SDPBackend.FLASH_ATTENTION
    return [first, SDPBackend.MATH]
