"""Between the model's packed weights and Hugging Face's names: the only place that knows both.

A pure cut by rows, so nothing is lost, of weights or of what has their shape (gradients, Adam's moments).
No rows change places: our rotary embedding is Hugging Face's half-rotation.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_ttl.config.schema import ModelConfig
from megatron_ttl.parallel.plan import PIECES, piece_shape

_OUTER = {"embed_tokens.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight",
          "lm_head.weight": "lm_head.weight"}

# A block's weight -> Hugging Face's pieces of it, in the order of the rows, and of a model file.
_BLOCK = {
    "input_layernorm.weight": ("input_layernorm.weight",),
    "self_attn.qkv_proj.weight": tuple(f"self_attn.{piece}.weight" for piece in PIECES["qkv_proj"]),
    "self_attn.o_proj.weight": ("self_attn.o_proj.weight",),
    "post_attention_layernorm.weight": ("post_attention_layernorm.weight",),
    "mlp.gate_up_proj.weight": tuple(f"mlp.{piece}.weight" for piece in PIECES["gate_up_proj"]),
    "mlp.down_proj.weight": ("mlp.down_proj.weight",),
}


def packed_names(config: ModelConfig) -> list[str]:
    """Return the model's own parameter names, in the order of its layers."""
    last = config.num_hidden_layers + 1
    blocks = [f"{layer}.{name}" for layer in range(1, last) for name in _BLOCK]
    return ["0.embed_tokens.weight", *blocks, f"{last}.norm.weight", f"{last}.lm_head.weight"]


def hf_names(name: str, config: ModelConfig) -> list[str]:
    """Return Hugging Face's names of the pieces of one packed weight, in the order of its rows."""
    layer, _, local = name.partition(".")
    if layer in ("0", str(config.num_hidden_layers + 1)):
        return [_OUTER[local]]
    assert 0 < int(layer) <= config.num_hidden_layers, name
    return [f"model.layers.{int(layer) - 1}.{piece}" for piece in _BLOCK[local]]


def hf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight of a model file by Hugging Face's name, in file order."""
    return {piece: _shape(piece, config) for name in packed_names(config) for piece in hf_names(name, config)}


def _shape(hf_name: str, config: ModelConfig) -> tuple[int, ...]:
    return piece_shape(hf_name.split(".")[-2], config)


def split_to_hf(name: str, tensor: Tensor, config: ModelConfig) -> dict[str, Tensor]:
    """Cut one packed tensor into Hugging Face's pieces; they are views of it."""
    names = hf_names(name, config)
    pieces = tensor.split([_shape(piece, config)[0] for piece in names])
    return dict(zip(names, pieces, strict=True))


def join_from_hf(name: str, pieces: Mapping[str, Tensor], config: ModelConfig) -> Tensor:
    """Pack Hugging Face's pieces into the model's tensor; a single piece is returned as it is."""
    names = hf_names(name, config)
    assert set(pieces) == set(names), (name, sorted(pieces))
    return pieces[names[0]] if len(names) == 1 else torch.cat([pieces[piece] for piece in names])
