"""Causal attention with grouped key/value heads.

PyTorch has several implementations, which it calls backends, and chooses among them by switches of the whole process.
Here every call names its own. How each goes about groups of query heads that share a key: flash, cuDNN, the package
flash-attn and the processor's backend read the shared head in place; `efficient` cannot, so its keys and values are repeated
in memory; `math` repeats them itself. Masks are for `efficient` on a GPU, whatever the path: flash and flash-attn take none,
and cuDNN is left out for its limits on shapes.
"""

from __future__ import annotations

import contextlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_ttl.kernels.flash_attn import causal_flash_attn

BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
          "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}
"""PyTorch's backends by the names of `KernelPaths`."""


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
        # A compiled region cannot ask for the architecture: `prefer_attention_backend` has, and "auto" is its choice.
        switched = path == "auto" and torch.compiler.is_compiling()
        return _attend(query, key, value, [] if switched else backends_of(query.device, query.dtype, path))
    # On top of a cache the order is PyTorch's own. Several queries take a mask: is_causal would begin at the first key.
    if query.shape[2] > 1:
        seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        mask = seen.tril(key.shape[2] - query.shape[2])
    everything_on = torch.backends.cuda.math_sdp_enabled()  # unless `prefer_attention_backend` left one alone
    with contextlib.nullcontext() if everything_on else sdpa_kernel(list(BACKENDS.values())):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask,
                                              enable_gqa=query.shape[1] != key.shape[1])


def _attend(query: Tensor, key: Tensor, value: Tensor, backends: list[SDPBackend], mask: Tensor | None = None) -> Tensor:
    """Call PyTorch with its switches set to these backends, in this order; with none, as they stand."""
    grouped = query.shape[1] != key.shape[1]
    first = backends[0] if backends else None
    if grouped and query.is_cuda and (first is SDPBackend.EFFICIENT_ATTENTION or query.dtype == torch.float32):
        # The one fused backend that is left takes no groups, and PyTorch would go on to the formula without a word.
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
        grouped = False
    as_they_stand = first is None or (mask is None and not torch.compiler.is_compiling() and torch.is_grad_enabled()
                                      and _switched_to(first))
    with contextlib.nullcontext() if as_they_stand else sdpa_kernel(backends, set_priority=True):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)


def _switched_to(backend: SDPBackend) -> bool:
    """Whether this backend alone is left on, so that a training step need not change PyTorch's switches and back."""
    switches = torch.backends.cuda
    on = (switches.cudnn_sdp_enabled(), switches.flash_sdp_enabled(), switches.mem_efficient_sdp_enabled(),
          switches.math_sdp_enabled())
    return on == tuple(backend is known for known in BACKENDS.values())


def backends_of(device: torch.device, dtype: torch.dtype, path: str) -> list[SDPBackend]:
    """Order PyTorch's backends; one that is asked for by name stands alone, so that PyTorch says where it cannot."""
    if path in BACKENDS:
        return [BACKENDS[path]]
    if device.type != "cuda":
        return [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    if dtype == torch.float32:
        return [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    fused = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    # On Hopper alone cuDNN leads: 1.6 times flash there, slower on Ampere.
    return [SDPBackend.CUDNN_ATTENTION, *fused] if torch.cuda.get_device_capability(device)[0] == 9 else fused


def _masking_backends(query: Tensor) -> list[SDPBackend]:
    """Order the backends that add any mask: on a GPU flash takes none, and cuDNN is left out for its limits on shapes."""
    first = SDPBackend.EFFICIENT_ATTENTION if query.is_cuda else SDPBackend.FLASH_ATTENTION
    return [first, SDPBackend.MATH]
