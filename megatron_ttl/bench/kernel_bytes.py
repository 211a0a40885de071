"""How many bytes each operation must move at least: what its time is measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_ttl.config.schema import ModelConfig

Direction = Literal["forward", "backward", "both"]
MOMENTS = 8
"""Bytes of AdamW's two moments of one parameter."""


@dataclass(frozen=True)
class Widths:
    """The shapes of a model that decide about its operations."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int


WIDTHS = {"small": Widths(128, 384, 4, 2, 32, 2048), "160m": Widths(768, 3072, 12, 12, 64, 32_000),
          "460m": Widths(1024, 4096, 16, 16, 64, 32_000), "1b1": Widths(2048, 5632, 32, 4, 64, 32_000)}
"""A small model, and those of configs/ttl_160m.toml, configs/ttl_460m.toml and configs/tinyllama_1b1.toml."""


def widths_of(config: ModelConfig) -> Widths:
    """Return the widths of a model."""
    return Widths(config.hidden_size, config.intermediate_size, config.num_attention_heads, config.num_key_value_heads,
                  config.head_dim, config.vocab_size)


def bytes_per_token(op: str, widths: Widths, itemsize: int) -> dict[Direction, int]:
    """Return the least traffic of one token, in bytes by direction; each number is read or written once.

    - rms_norm: reads x, writes y, and 4 bytes of statistics; backward reads x and dy, writes dx.
    - add_rms_norm: reads x and delta, writes sum and y; backward reads sum, dy and dsum, writes dx.
    - rotary_heads: queries and keys are read and written in place; backward also copies the values' gradient into the
      packed one.
    - swiglu: reads gate and up, writes their product; backward reads those and dy, writes two gradients.
    - cross_entropy: the logits are read once, and their gradient is written into their place.

    Args:
        op: its name.
        widths: of the model.
        itemsize: bytes of an activation.
    """
    h, f = widths.hidden * itemsize, widths.intermediate * itemsize
    turned = (widths.heads + widths.kv_heads) * widths.head_dim * itemsize
    values = widths.kv_heads * widths.head_dim * itemsize
    table: dict[str, dict[Direction, int]] = {
        "rms_norm": {"forward": 2 * h + 4, "backward": 3 * h + 4},
        "add_rms_norm": {"forward": 4 * h + 4, "backward": 4 * h + 4},
        "rotary_heads": {"forward": 2 * turned, "backward": 2 * (turned + values)},
        "swiglu": {"forward": 3 * f, "backward": 5 * f},
        "cross_entropy": {"both": 2 * widths.vocab * itemsize},
    }
    return table[op]


def adamw_bytes_per_parameter(weight_bytes: int) -> int:
    """Return the least traffic of AdamW with an fp32 gradient: master and moments read and written, gradient read.

    Args:
        weight_bytes: of the copy that the model computes with; 0 where the master is that.
    """
    return 2 * (4 + MOMENTS) + 4 + weight_bytes
