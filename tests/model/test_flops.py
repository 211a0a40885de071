"""Parameter and FLOP counts against the published models."""

from __future__ import annotations

import pytest

from megatron_ttl.model.flops import count_parameters, flops_per_token, matrix_parameters
from megatron_ttl.model.llama import build_model
from megatron_ttl.testing import tiny_model

MODELS = {  # layers, hidden, intermediate, heads, kv heads: parameters; N, C, NC, A FLOPs per token at 2,048
    (12, 768, 3072, 12, 12): (162_417_408, 1_053_540_864, 940.2e6, 1053.4e6, 1201.0e6),
    (24, 1024, 4096, 16, 16): (468_239_360, 3_216_807_936, 2914.5e6, 3216.5e6, 3413.4e6),
    (22, 2048, 5632, 32, 4): (1_100_048_384, 7_314_370_560, 6760.2e6, 7313.8e6, 7707.6e6),
    (12, 768, 2048, 12, 1): (121_129_728, None, None, None, None),
}


def shape(layers, hidden, intermediate, heads, kv_heads, vocab_size=32_000):
    return tiny_model(num_hidden_layers=layers, hidden_size=hidden, intermediate_size=intermediate,
                      num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=vocab_size,
                      max_position_embeddings=2048)


@pytest.mark.parametrize("sizes", MODELS)
def test_counts_equal_the_published_models(sizes):
    """The exact parameter counts, and FLOPs by each formula."""
    parameters, plain, causal, full, palm = MODELS[sizes]
    config = shape(*sizes)
    assert count_parameters(config) == parameters
    if plain:
        assert flops_per_token(config, 2048, "N") == plain
        for formula, expected in (("C", causal), ("NC", full), ("A", palm)):
            assert flops_per_token(config, 2048, formula) == pytest.approx(expected, rel=1e-4)


def test_chat_vocabulary_adds_two_rows_twice():
    """TTL-460m-Chat has 32,002 pieces."""
    assert count_parameters(shape(24, 1024, 4096, 16, 16, 32_002)) == 468_243_456


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_counts_equal_a_built_model(kv_heads):
    """The formula and the modules agree."""
    config = tiny_model(num_key_value_heads=kv_heads)
    model = build_model(config, seed=None, device="meta")
    sizes = {name: weight.numel() for name, weight in model.state_dict().items()}
    assert count_parameters(config) == sum(sizes.values())
    norms = sum(size for name, size in sizes.items() if "norm" in name)
    assert matrix_parameters(config) == sum(sizes.values()) - norms - sizes["0.embed_tokens.weight"]
