"""Who computes what: the table of how each weight is cut, and the arithmetic of ranks, stages and slices.

Sharding, checkpoints, the dry run and the tests all read it; nobody else knows. No torch: `--dry-run` reads it too.

A weight is named as Hugging Face names its pieces (`q_proj`, not the packed `qkv_proj`): every cut is then one range of
rows or of columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megatron_ttl.config.schema import ModelConfig

Style = Literal["vocabulary", "column", "head", "row", "norm"]

TENSOR_PLAN: dict[str, Style] = {
    "embed_tokens": "vocabulary",  # rows; ids of other ranks look up nothing, then the parts are added
    "qkv_proj": "column",          # whole heads of q, of k and of v
    "o_proj": "row",               # columns; the products are added
    "gate_up_proj": "column",      # the same rows of gate and of up
    "down_proj": "row",
    "lm_head": "head",             # rows; the logits stay cut, the loss is vocabulary-parallel
    "input_layernorm": "norm",     # whole on every rank; with sequence parallelism each sees a part of the tokens
    "post_attention_layernorm": "norm",
    "norm": "norm",
}
"""Module -> how tensor parallelism treats it. Source: Shoeybi et al. 2019, section 3; Korthikanti et al. 2022, 4.2."""

PIECES: dict[str, tuple[str, ...]] = {"qkv_proj": ("q_proj", "k_proj", "v_proj"),
                                      "gate_up_proj": ("gate_proj", "up_proj")}
"""Packed module -> Hugging Face's names of its pieces; a module that is not named here is one piece of its own name."""

_STYLE_OF_PIECE: dict[str, Style] = {piece: style for module, style in TENSOR_PLAN.items()
                                     for piece in PIECES.get(module, (module,))}

_VOCABULARY_MULTIPLE = 8  # rows per rank: matrix products of odd widths miss the tensor cores


@dataclass(frozen=True)
class Layout:
    """The degrees of the three axes, and whether norms and the residual stream are cut along the sequence too."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    sequence: bool = False

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return self.tensor * self.pipeline * self.data

    def place(self, rank: int) -> Place:
        """Return where a rank stands: tensor ranks are neighbours, then data, then pipeline, as in DeepSpeed."""
        assert 0 <= rank < self.world_size
        return Place(tensor=rank % self.tensor, data=rank // self.tensor % self.data,
                     pipeline=rank // (self.tensor * self.data))

    def rank(self, place: Place) -> int:
        """Return the rank that stands at a place."""
        return (place.pipeline * self.data + place.data) * self.tensor + place.tensor

    def __str__(self) -> str:
        sequence = " with sequence parallelism" if self.sequence else ""
        return f"tensor {self.tensor}{sequence} x pipeline {self.pipeline} x data {self.data}"


@dataclass(frozen=True)
class Place:
    """Coordinates of one rank."""

    tensor: int = 0
    pipeline: int = 0
    data: int = 0


def padded_vocabulary(config: ModelConfig, tensor: int) -> int:
    """Return the rows of embedding and head over all ranks: the vocabulary, rounded up so that it divides."""
    multiple = tensor * _VOCABULARY_MULTIPLE if tensor > 1 else 1
    return -(-config.vocab_size // multiple) * multiple


@dataclass(frozen=True)
class Part:
    """What one tensor-parallel rank owns of one piece, and how many rows it takes in the packed weight there."""

    piece: str
    shape: tuple[int, ...]
    """Of the whole piece."""
    offset: tuple[int, ...]
    """Where the owned part begins."""
    extent: tuple[int, ...]
    """How far it reaches."""
    rows: int
    """Rows in the rank's weight: those owned, then padding."""


def piece_shape(piece: str, config: ModelConfig) -> tuple[int, ...]:
    """Return the whole shape of a piece by Hugging Face's module name, e.g. `q_proj`."""
    hidden, wide = config.hidden_size, config.intermediate_size
    if _STYLE_OF_PIECE[piece] == "norm":
        return (hidden,)
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    rows = {"embed_tokens": config.vocab_size, "lm_head": config.vocab_size, "q_proj": queries,
            "k_proj": keys, "v_proj": keys, "gate_proj": wide, "up_proj": wide}
    columns = {"o_proj": queries, "down_proj": wide}
    return (rows.get(piece, hidden), columns.get(piece, hidden))


def parts_of(weight: str, config: ModelConfig, layout: Layout, tensor_rank: int) -> list[Part]:
    """Return what one tensor-parallel rank owns of a packed weight, one part per piece, in the order of its rows.

    Args:
        weight: the model's name, e.g. `3.self_attn.qkv_proj.weight`.
        config: the whole model.
        layout: the degrees.
        tensor_rank: which rank.
    """
    module = weight.removesuffix(".weight").rpartition(".")[2]
    return [_part(piece, config, layout.tensor, tensor_rank) for piece in PIECES.get(module, (module,))]


def _part(piece: str, config: ModelConfig, tensor: int, tensor_rank: int) -> Part:
    shape, style = piece_shape(piece, config), _STYLE_OF_PIECE[piece]
    whole = Part(piece, shape, (0,) * len(shape), shape, shape[0])
    if style == "norm" or tensor == 1:
        return whole
    if style in ("vocabulary", "head"):
        share = padded_vocabulary(config, tensor) // tensor
        start = min(shape[0], tensor_rank * share)
        return Part(piece, shape, (start, 0), (min(shape[0] - start, share), shape[1]), share)
    dim = 1 if style == "row" else 0
    assert shape[dim] % tensor == 0, (piece, shape)
    share = shape[dim] // tensor
    offset, extent = [0, 0], list(shape)
    offset[dim], extent[dim] = tensor_rank * share, share
    return Part(piece, shape, tuple(offset), tuple(extent), extent[0])


def layer_costs(config: ModelConfig, sequence_length: int) -> list[float]:
    """Return forward operations per token of each layer: embedding (a lookup), blocks, norm and head."""
    hidden, queries = config.hidden_size, config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    matrices = hidden * (queries + 2 * keys) + queries * hidden + 3 * hidden * config.intermediate_size
    block = 2.0 * matrices + 2.0 * queries * sequence_length
    return [0.0, *[block] * config.num_hidden_layers, 2.0 * hidden * config.vocab_size]


def stage_bounds(config: ModelConfig, sequence_length: int, stages: int) -> list[range]:
    """Deal consecutive layers to pipeline stages so that the slowest stage is as fast as can be.

    Among equals the most even one is taken. The embedding never stands alone: DeepSpeed adds up the gradient norms of
    the stages group by group, so every stage needs matrices and norms.

    Returns:
        One range of layer numbers per stage, none empty; 0 is the embedding, L + 1 the head. There are at most L + 1.
    """
    costs = layer_costs(config, sequence_length)
    count = len(costs)
    assert 1 <= stages < count
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    # best[i]: (slowest stage, sum of squares, ends of the stages) for layers i.. dealt to s stages, s growing
    best = {i: (sums[count] - sums[i], (sums[count] - sums[i]) ** 2, (count,)) for i in range(count)}
    for s in range(2, stages + 1):
        best = {i: _best_first_stage(i, sums, best, range(max(i + 1, 2), count - s + 2)) for i in range(count - s + 1)}
    ends = best[0][2]
    return [range(start, end) for start, end in zip((0, *ends), ends, strict=False)]


def _best_first_stage(start: int, sums: list[float], rest: dict[int, tuple], ends: range) -> tuple:
    found: tuple = (math.inf,)
    for end in ends:
        first = sums[end] - sums[start]
        if first > found[0]:
            break  # it grows with every layer: no later end is better, and hundreds of stages stay quick
        slowest = max(first, rest[end][0])
        if slowest <= found[0]:
            found = min(found, (slowest, first**2 + rest[end][1], (end, *rest[end][2])))
    return found
