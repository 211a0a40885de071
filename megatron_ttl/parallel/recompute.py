"""Trade operations for memory: forget activations in the forward pass and compute them again in the backward pass.

- `selective`: the outputs of norms and SwiGLU, 6 h of the 20 h numbers that a TTL block keeps per token (h hidden,
  f = 4 h), for less than one per cent of its operations. Each is forgotten together with the matrix product that reads
  it; recomputing stops as soon as that product's input is there again, so no product is computed twice.
  With kernels for both, which keep their inputs alone, a step needs no more than that: the kernel that adds and norms gives
  the sum, which is kept, and the norm, which is not. SwiGLU's backward kernel reads its input anyway and writes the output
  again. That moves 8 h + 2 f bytes per token and block in 16 bits.
- `full`: everything inside a block but its input, for a third more operations.

Source: Chen et al. 2016; Korthikanti et al. 2022, section 5 (which recomputes the attention instead: PyTorch's fused
attention keeps nothing that would be worth it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from megatron_ttl.kernels.documents import Documents
from megatron_ttl.kernels.swiglu import swiglu_linear
from megatron_ttl.model.llama import MLP, RMSNorm, TransformerBlock, add_and_norm

Recompute = Literal["none", "selective", "full"]


def recompute_in(layer: nn.Module, kind: Recompute) -> nn.Module:
    """Make a block forget activations while it trains; other layers stay as they are."""
    if isinstance(layer, TransformerBlock) and kind != "none":
        layer.add_forward = MethodType({"selective": _selective, "full": _full}[kind], layer)  # type: ignore[method-assign]
    return layer


def _forgetting(function: Callable[..., Any], *inputs: Tensor) -> Any:
    # Nothing random happens inside, so the generators' states need not be kept.
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def _sum(residual: Tensor, delta: Tensor | None) -> Tensor:
    """Add what is still to be added: what is kept is then one tensor and not two."""
    return residual if delta is None else residual + delta


def _full(block: TransformerBlock, residual: Tensor, delta: Tensor | None, documents: Documents | None = None,
          cache: Any = None) -> tuple[Tensor, Tensor]:
    if not block.training or cache is not None:
        return TransformerBlock.add_forward(block, residual, delta, documents, cache)
    return _forgetting(lambda x: TransformerBlock.add_forward(block, x, None, documents), _sum(residual, delta))


def _selective(block: TransformerBlock, residual: Tensor, delta: Tensor | None, documents: Documents | None = None,
               cache: Any = None) -> tuple[Tensor, Tensor]:
    """The block's own formula, with its parts grouped by what is forgotten."""
    if not block.training or cache is not None:
        return TransformerBlock.add_forward(block, residual, delta, documents, cache)
    if _has_kernels(block):
        return _selective_with_kernels(block, residual, delta, documents)
    attention, mlp = block.self_attn, block.mlp
    residual = _sum(residual, delta)
    packed = _forgetting(lambda x: attention.qkv_proj(block.input_layernorm(x)), residual)
    residual = residual + attention.mix(packed, None, documents)
    wide = _forgetting(lambda x: mlp.gate_up_proj(block.post_attention_layernorm(x)), residual)
    return residual, _forgetting(mlp.narrow, wide)


def _has_kernels(block: TransformerBlock) -> bool:
    """Whether there are kernels for both; tokens that are gathered after the norm, or a compiler, need the other way."""
    norm, mlp = block.input_layernorm, block.mlp
    return ("torch" not in (norm.paths.rms_norm, mlp.paths.swiglu) and type(norm) is RMSNorm
            and not torch.compiler.is_compiling())


def _selective_with_kernels(block: TransformerBlock, residual: Tensor, delta: Tensor | None,
                            documents: Documents | None) -> tuple[Tensor, Tensor]:
    """Forget single tensors: a quarter of the work for the host that running parts of a block again is."""
    attention, mlp = block.self_attn, block.mlp
    first, normed = add_and_norm(block.input_layernorm, residual, delta)
    with _forgotten(normed, lambda: block.input_layernorm(first)):
        packed = attention.qkv_proj(normed)
    second, normed = add_and_norm(block.post_attention_layernorm, first, attention.mix(packed, None, documents))
    with _forgotten(normed, lambda: block.post_attention_layernorm(second)):
        wide = mlp.gate_up_proj(normed)
    if _may_be_fused(mlp):
        return second, swiglu_linear(wide, mlp.down_proj.weight, mlp.paths.swiglu)
    gated = mlp.gate(wide)
    with _forgotten(gated, lambda: mlp.gate(wide)):
        return second, mlp.down_proj(gated)


def _may_be_fused(mlp: MLP) -> bool:
    """Whether the last product is no more than that: no exchange follows, no hook has to fetch its weight (ZeRO 3)."""
    return mlp.paths.swiglu == "cuda" and type(mlp.down_proj) is nn.Linear and not hasattr(mlp.down_proj.weight, "ds_id")


@contextmanager
def _forgotten(value: Tensor, again: Callable[[], Tensor]) -> Iterator[None]:
    """Let the operations inside keep nothing of a contiguous tensor that they read; the backward pass computes it again."""
    place = value.untyped_storage().data_ptr()

    def pack(tensor: Tensor) -> Tensor | torch.Size:
        return tensor.shape if tensor.untyped_storage().data_ptr() == place else tensor

    def unpack(kept: Tensor | torch.Size) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():
            return again().view(kept)

    with saved_tensors_hooks(pack, unpack):
        yield
