"""Trade operations for memory: forget activations in the forward pass and compute them again in the backward pass.

- `selective`: the outputs of norms and SwiGLU, 6 h of the 20 h numbers that a TTL block keeps per token (h hidden,
  f = 4 h), for less than one per cent of its operations. Each is forgotten together with the matrix product that reads
  it; recomputing stops as soon as that product's input is there again, so no product is computed twice.
- `full`: everything inside a block but its input, for a third more operations.

Source: Chen et al. 2016; Korthikanti et al. 2022, section 5 (which recomputes the attention instead: PyTorch's fused
attention keeps nothing that would be worth it).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_ttl.kernels.documents import Documents
from megatron_ttl.kernels.swiglu import swiglu
from megatron_ttl.model.llama import TransformerBlock

Recompute = Literal["none", "selective", "full"]


def recompute_in(layer: nn.Module, kind: Recompute) -> nn.Module:
    """Make a block forget activations while it trains; other layers stay as they are."""
    if isinstance(layer, TransformerBlock) and kind != "none":
        forward = {"selective": _selective, "full": _full}[kind]
        layer.forward = partial(forward, layer, type(layer).forward)  # type: ignore[method-assign]
    return layer


def _forgetting(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    # Nothing random happens inside, so the generators' states need not be kept.
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def _full(block: TransformerBlock, forward: Callable[..., Tensor], x: Tensor, cache: Any = None,
          documents: Documents | None = None) -> Tensor:
    if not block.training or cache is not None:
        return forward(block, x, cache, documents)
    return _forgetting(lambda t: forward(block, t, None, documents), x)


def _selective(block: TransformerBlock, forward: Callable[..., Tensor], x: Tensor, cache: Any = None,
               documents: Documents | None = None) -> Tensor:
    """The block's own formula, with its four parts grouped by what is forgotten."""
    if not block.training or cache is not None:
        return forward(block, x, cache, documents)
    attention, mlp = block.self_attn, block.mlp
    x = x + attention.mix(_forgetting(lambda t: attention.qkv_proj(block.input_layernorm(t)), x), None, documents)
    wide = _forgetting(lambda t: mlp.gate_up_proj(block.post_attention_layernorm(t)), x)
    return x + _forgetting(lambda t: mlp.down_proj(swiglu(t)), wide)
