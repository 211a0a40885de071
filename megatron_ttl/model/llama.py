"""Llama-2 as a list of layers, each Tensor -> Tensor.

A layer also takes the residual stream in two parts, `add_forward(residual, delta)`: what a block adds at its end is added
by the next layer's norm, which reads the sum anyway. `Llama` runs its layers that way; the numbers are the same.

Shapes: b micro batch, s sequence, h hidden, n query heads, k key/value heads, d head size, f intermediate,
v vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor, nn

from megatron_ttl.config.schema import ModelConfig
from megatron_ttl.kernels.attention import attention
from megatron_ttl.kernels.documents import Documents, documents_of
from megatron_ttl.kernels.paths import KernelPaths
from megatron_ttl.kernels.rms_norm import add_rms_norm, rms_norm
from megatron_ttl.kernels.rotary import rotary_heads, rotary_tables
from megatron_ttl.kernels.swiglu import swiglu


class KeyValueCache(Protocol):
    """What a block needs of a cache: how many tokens it holds, and a way to add more."""

    length: int

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add [b, k, s_new, d] keys and values; return all so far, [b, k, s_total, d]."""


def use_paths(module: nn.Module, paths: KernelPaths) -> None:
    """Choose the implementations of all operations inside a module."""
    for part in module.modules():
        if hasattr(type(part), "paths"):
            part.paths = paths


class RMSNorm(nn.Module):
    """RMSNorm with a learnt scale."""

    paths = KernelPaths()

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def scale(self) -> Tensor:
        """Return what multiplies each channel, [h]."""
        return self.weight

    def forward(self, x: Tensor, delta: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """[..., h] -> [..., h]; with something to add, [..., h] twice -> the sum and its norm."""
        if delta is None:
            return rms_norm(x, self.scale(), self.eps, self.paths.rms_norm)
        return add_rms_norm(x, delta, self.scale(), self.eps, self.paths.rms_norm)


def add_and_norm(norm: nn.Module, residual: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the residual stream with what was still to be added, and its norm."""
    return (residual, norm(residual)) if delta is None else norm(residual, delta)


class SelfAttention(nn.Module):
    """Causal self-attention with rotary positions; query, key and value come from one packed projection."""

    paths = KernelPaths()

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.theta = config.rope_theta
        width = (config.num_attention_heads + 2 * config.num_key_value_heads) * self.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, width, bias=False)  # rows: q, then k, then v
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=False)
        self.groups = config.num_attention_heads // config.num_key_value_heads
        self._rotary: tuple[Tensor, Tensor] | None = None

    def angles(self, start: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return cos and sin for positions start .. start + count, growing the cached tables when needed.

        They are no buffers: `module.to(bfloat16)` and the engine's casts must not reach them.
        """
        if self._rotary is None or len(self._rotary[0]) < start + count or self._rotary[0].device != device:
            self._rotary = rotary_tables(max(start + count, 2 * start), self.head_dim, self.theta, device)
        cos, sin = self._rotary
        return cos[start : start + count], sin[start : start + count]

    def forward(self, x: Tensor, cache: KeyValueCache | None = None, documents: Documents | None = None) -> Tensor:
        """[b, s, h] -> [b, s, h]"""
        return self.mix(self.qkv_proj(x), cache, documents)

    def mix(self, packed: Tensor, cache: KeyValueCache | None = None, documents: Documents | None = None) -> Tensor:
        """Attend and project back: [b, s, (n + 2k) d] -> [b, s, h]. The numbers of heads follow from the width.

        On top of a cache, the positions of `documents` count from its end and its mask is for all keys, [b, 1, s, s_total].
        """
        batch, length, _ = packed.shape
        heads = packed.view(batch, length, -1, self.head_dim)  # [b, s, n + 2k, d]
        cos, sin = self.angles(cache.length if cache else 0, length, packed.device)
        positions, mask = documents or (None, None)
        if positions is not None:
            cos, sin = cos[positions], sin[positions]  # [b, s, d/2]
        query, key, value = rotary_heads(heads, cos, sin, heads.shape[2] // (self.groups + 2), self.paths.rotary)
        if cache is not None:
            key, value = cache.append(key, value)
        mixed = attention(query, key, value, mask, self.paths.attention)  # [b, n, s, d]
        # Every fused backend stores [b, s, n, d], so that this copies nothing, forward and backward.
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    """SwiGLU feed-forward; gate and up come from one packed projection."""

    paths = KernelPaths()

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[b, s, h] -> [b, s, h]"""
        return self.narrow(self.gate_up_proj(x))

    def narrow(self, packed: Tensor) -> Tensor:
        """Gate and project back: [b, s, 2f] -> [b, s, h]."""
        return self.down_proj(self.gate(packed))

    def gate(self, packed: Tensor) -> Tensor:
        """[b, s, 2f] -> [b, s, f]"""
        return swiglu(packed, self.paths.swiglu)


class TokenEmbedding(nn.Module):
    """Token ids to vectors."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        # Weights given, so that nn.Embedding draws none: on `meta` that would import torch._dynamo, a second's work.
        weight = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _weight=weight)

    def forward(self, input_ids: Tensor) -> Tensor:
        """[b, s] -> [b, s, h]"""
        return self.embed_tokens(input_ids)


class TransformerBlock(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None, documents: Documents | None = None) -> Tensor:
        """[b, s, h] -> [b, s, h]"""
        residual, delta = self.add_forward(x, None, documents, cache)
        return residual + delta

    def add_forward(self, residual: Tensor, delta: Tensor | None, documents: Documents | None = None,
                    cache: KeyValueCache | None = None) -> tuple[Tensor, Tensor]:
        """Take and return the residual stream and what is still to be added to it, [b, s, h] all."""
        residual, normed = add_and_norm(self.input_layernorm, residual, delta)
        residual, normed = add_and_norm(self.post_attention_layernorm, residual,
                                         self.self_attn(normed, cache, documents))
        return residual, self.mlp(normed)


class LMHead(nn.Module):
    """Final norm and the projection to the vocabulary, untied from the embedding."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[b, s, h] -> [b, s, v]"""
        return self.add_forward(x, None)

    def add_forward(self, residual: Tensor, delta: Tensor | None) -> Tensor:
        """[b, s, h] twice -> [b, s, v]"""
        return self.lm_head(add_and_norm(self.norm, residual, delta)[1])


def layer_classes(config: ModelConfig) -> list[type[nn.Module]]:
    """Return the classes of the layers in order; layer i of a model is `layer_classes(config)[i](config)`."""
    return [TokenEmbedding, *[TransformerBlock] * config.num_hidden_layers, LMHead]


class Llama(nn.Sequential):
    """All layers of a model, one after the other."""

    def forward(self, input_ids: Tensor) -> Tensor:
        """[b, s] -> [b, s, v]"""
        return _run(self, input_ids, None)


class LlamaWithinDocuments(Llama):
    """All layers of a model; documents that share a sample do not see each other."""

    def __init__(self, *layers: nn.Module, eos_id: int) -> None:
        super().__init__(*layers)
        self.eos_id = eos_id

    def forward(self, input_ids: Tensor) -> Tensor:
        """[b, s] -> [b, s, v]"""
        return within_documents(self, input_ids, self.eos_id)


def within_documents(layers: Iterable[nn.Module], input_ids: Tensor, eos_id: int) -> Tensor:
    """Compute logits so that every document of a sample has those it would have alone: [b, s] -> [b, s, v].

    Args:
        layers: all layers of a model, in order.
        input_ids: [b, s]; a document begins a sample, and after every `eos_id`.
        eos_id: the id that ends a document and stands nowhere else.
    """
    return _run(layers, input_ids, eos_id)


def _run(layers: Iterable[nn.Module], input_ids: Tensor, eos_id: int | None) -> Tensor:
    embedding, *blocks, head = layers
    residual, delta = embedding(input_ids), None
    documents = None if eos_id is None else documents_of(input_ids, eos_id, residual.dtype)
    for block in blocks:
        residual, delta = block.add_forward(residual, delta, documents)
    return head.add_forward(residual, delta)


def initialize_layer(layer: nn.Module, config: ModelConfig, index: int, seed: int) -> None:
    """Fill one layer's weights from seed + index on the host, so that no layout can change them.

    `normal` draws every matrix from N(0, 0.02), as Hugging Face's Llama does and TTL did. `tinyllama` draws from
    N(0, sqrt(2 / 5h)), and the two projections that write into the residual stream from N(0, 1 / (sqrt(h) L)).
    Source: lit-gpt's initialisation as used by TinyLlama (Zhang et al. 2024).
    """
    generator = torch.Generator().manual_seed(seed + index)
    wide = 0.02 if config.init == "normal" else (2 / 5 / config.hidden_size) ** 0.5
    narrow = 0.02 if config.init == "normal" else config.hidden_size**-0.5 / config.num_hidden_layers
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
                continue
            std = narrow if name.endswith(("o_proj.weight", "down_proj.weight")) else wide
            drawn = torch.empty(parameter.shape, dtype=torch.float32).normal_(0.0, std, generator=generator)
            parameter.copy_(drawn)


def build_model(config: ModelConfig, seed: int | None, device: torch.device | str = "cpu",
                dtype: torch.dtype = torch.float32) -> Llama:
    """Build the whole model: `model(input_ids [b, s]) -> logits [b, s, v]`.

    Args:
        config: the architecture.
        seed: layer i is drawn from seed + i; None leaves the memory as it is, for weights about to be loaded.
        device: where the weights live.
        dtype: their dtype; drawn in fp32 and rounded once.
    """
    layers = []
    for index, layer_class in enumerate(layer_classes(config)):
        with torch.device("meta"):
            layer = layer_class(config)
        layer = layer.to(dtype).to_empty(device=device)
        if seed is not None:
            initialize_layer(layer, config, index, seed)
        layers.append(layer)
    return Llama(*layers)
