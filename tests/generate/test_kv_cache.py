"""The cache gives back what went in, and a model on top of it says what it says without."""

from __future__ import annotations

import pytest
import torch

from megatron_ttl.config.schema import ModelConfig
from megatron_ttl.generate.generate import cached_logits
from megatron_ttl.generate.kv_cache import StaticCache, build_caches
from megatron_ttl.model.llama import build_model


def tiny(kv_heads: int = 2, **changes) -> ModelConfig:
    """A model of 10k weights."""
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
                 num_key_value_heads=kv_heads, vocab_size=61, max_position_embeddings=64)
    return ModelConfig(**{**sizes, **changes})


def test_append_returns_everything_so_far():
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(2, 3, 9, 4, generator=generator) for _ in range(2))
    cache = StaticCache(2, 3, 9, 4, "cpu", torch.float32)
    for start, end in ((0, 5), (5, 6), (6, 9)):
        assert cache.length == start
        key, value = cache.append(keys[:, :, start:end], values[:, :, start:end])
        assert torch.equal(key, keys[:, :, :end]) and torch.equal(value, values[:, :, :end])
    with pytest.raises(AssertionError, match="10 tokens in a cache for 9"):
        cache.append(keys[:, :, :1], values[:, :, :1])


def test_memory_is_taken_once():
    cache = StaticCache(1, 2, 8, 4, "cpu", torch.bfloat16)
    piece = torch.ones(1, 2, 1, 4, dtype=torch.bfloat16)
    places = {cache.append(piece, piece)[0].data_ptr() for _ in range(8)}
    assert len(places) == 1


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_cached_logits_equal_uncached(kv_heads):
    config = tiny(kv_heads)
    # Wide weights, so that attention is not uniform: at 0.02 a forgotten key would hardly be noticed.
    model = build_model(config, seed=1)
    for weight in model.parameters():
        if weight.dim() == 2:
            weight.data.mul_(10)
    ids = torch.randint(0, 61, (2, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        whole = model(ids)
        caches = build_caches(config, 40, "cpu", torch.float32, batch=2)
        # a prompt, single tokens, and several at once on top of a cache
        parts = ids.split([17, 1, 1, 6, 1, 14], dim=1)
        pieces = [cached_logits(model, part, caches, last_only=False) for part in parts]
    assert (torch.cat(pieces, dim=1) - whole).abs().max() <= 1e-5
    assert whole.std() > 0.1


def test_last_only_is_the_last_position():
    config = tiny()
    model = build_model(config, seed=1)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        logits = cached_logits(model, ids, build_caches(config, 10, "cpu", torch.float32))
        assert logits.shape == (1, 1, 61)
        assert (logits - model(ids)[:, -1:]).abs().max() <= 1e-6


def test_repeated_cache_holds_copies():
    cache = StaticCache(1, 2, 5, 4, "cpu", torch.float32)
    prompt = torch.randn(1, 2, 3, 4)
    cache.append(prompt, -prompt)
    many = cache.repeated(3)
    new = torch.arange(3.0)[:, None, None, None].expand(3, 2, 1, 4)
    key, value = many.append(new, new)
    assert (many.length, cache.length) == (4, 3)
    assert torch.equal(key[:, :, :3], prompt.expand(3, -1, -1, -1))
    assert torch.equal(value[2, :, :3], -prompt[0])
    assert torch.equal(key[:, :, 3:], new)
