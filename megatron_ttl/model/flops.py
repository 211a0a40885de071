"""Count parameters and floating-point operations. No torch: `--dry-run` must be quick."""

from __future__ import annotations

from typing import Literal

from megatron_ttl.config.schema import ModelConfig

BYTES_PER_PARAMETER = 12
"""Of a checkpoint: fp32 weight and two fp32 moments."""

Formula = Literal["C", "NC", "A", "N"]


def embedding_parameters(config: ModelConfig) -> int:
    """Count the weights of the token embedding; the head has as many."""
    return config.vocab_size * config.hidden_size


def matrix_parameters(config: ModelConfig) -> int:
    """Count the weights that a token is multiplied with: all but the token embedding and the norms."""
    hidden, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    attention = hidden * (heads + 2 * kv_heads) * config.head_dim + heads * config.head_dim * hidden
    per_layer = attention + 3 * hidden * config.intermediate_size
    return config.num_hidden_layers * per_layer + embedding_parameters(config)


def norm_parameters(config: ModelConfig) -> int:
    """Count the RMSNorm weights."""
    return (2 * config.num_hidden_layers + 1) * config.hidden_size


def count_parameters(config: ModelConfig) -> int:
    """Count all weights; embedding and head are two."""
    return embedding_parameters(config) + matrix_parameters(config) + norm_parameters(config)


def flops_per_token(config: ModelConfig, sequence_length: int, formula: Formula = "C") -> float:
    """Return floating-point operations per token, forward and backward.

    Formulas, with L layers, h hidden and s sequence:

    - C: 6 N_matrix + 6 L h s. Causal attention counted once; Megatron-LM's and ours.
    - NC: 6 N_matrix + 12 L h s. Full attention; TinyLlama's published 56 %.
    - A: 6 N_all + 12 L h s. Counts the embedding lookup too; PaLM's appendix B and nanoGPT.
    - N: 6 (N_all - embedding) + 12 L h s. As NC, with the norms.
    """
    span = config.num_hidden_layers * config.num_attention_heads * config.head_dim * sequence_length
    if formula == "C":
        return 6.0 * matrix_parameters(config) + 6.0 * span
    weights = {"NC": matrix_parameters(config), "A": count_parameters(config),
               "N": matrix_parameters(config) + norm_parameters(config)}[formula]
    return 6.0 * weights + 12.0 * span
