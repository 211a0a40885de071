"""The arithmetic of layouts: ranks, stages, and who owns which rows."""

from __future__ import annotations

import itertools

import pytest
import torch

from megatron_ttl.checkpoint.names import hf_shapes, packed_names
from megatron_ttl.model.llama import build_model
from megatron_ttl.parallel.plan import (
    PIECES,
    TENSOR_PLAN,
    Layout,
    Place,
    layer_costs,
    padded_vocabulary,
    parts_of,
    piece_shape,
    stage_bounds,
)
from megatron_ttl.parallel.shard import cut, pack, unpack
from megatron_ttl.testing import tiny_model


def test_every_weight_of_the_model_is_in_the_plan():
    modules = {name.removesuffix(".weight").rpartition(".")[2] for name in packed_names(tiny_model())}
    assert modules == set(TENSOR_PLAN)


@pytest.mark.parametrize("layout", [Layout(2, 3, 4), Layout(1, 2, 1), Layout(4, 1, 2), Layout()])
def test_ranks_and_places_are_one_to_one(layout):
    """In DeepSpeed's order: tensor ranks are neighbours, stages are farthest apart."""
    from megatron_ttl.parallel.door import PipeModelDataParallelTopology

    topology = PipeModelDataParallelTopology(layout.pipeline, layout.tensor, layout.data)
    seen = set()
    for rank in range(layout.world_size):
        place = layout.place(rank)
        seen.add(place)
        assert layout.rank(place) == rank
        coordinates = topology.get_coord(rank)
        assert place == Place(coordinates.model, coordinates.pipe, coordinates.data)
    assert len(seen) == layout.world_size


@pytest.mark.parametrize("blocks", [1, 2, 5, 12])
@pytest.mark.parametrize("vocab_size", [64, 4000])
def test_stages_are_as_even_as_can_be(blocks, vocab_size):
    """Against every possible cut; the embedding never stands alone."""
    config = tiny_model(num_hidden_layers=blocks, vocab_size=vocab_size)
    costs = layer_costs(config, 32)
    for stages in range(1, min(blocks + 1, 5) + 1):
        bounds = stage_bounds(config, 32, stages)
        assert [layer for bound in bounds for layer in bound] == list(range(blocks + 2))
        assert all(len(bound) for bound in bounds) and (stages == 1 or bounds[0].stop >= 2)
        slowest = max(sum(costs[layer] for layer in bound) for bound in bounds)
        for ends in itertools.combinations(range(2, blocks + 2), stages - 1):
            edges = (0, *ends, blocks + 2)
            other = max(sum(costs[a:b]) for a, b in itertools.pairwise(edges))
            assert slowest <= other * (1 + 1e-12)


def test_costs_are_a_third_of_training():
    """Forward operations, against the parameter count and formula C of model/flops.py."""
    from megatron_ttl.model.flops import flops_per_token

    config = tiny_model()
    assert sum(layer_costs(config, 32)) * 3 == pytest.approx(flops_per_token(config, 32, "C"))


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("vocab_size", [96, 97, 5])
def test_parts_cover_every_weight_once(tensor, vocab_size):
    """The ranks' parts, put where the plan says, are the whole weight; replicated ones are the same on all."""
    config = tiny_model(num_attention_heads=8, num_key_value_heads=4, vocab_size=vocab_size)
    layout, shapes = Layout(tensor=tensor), hf_shapes(config)
    for name, whole in build_model(config, seed=3).state_dict().items():
        module = name.removesuffix(".weight").rpartition(".")[2]
        pieces = whole.split([piece_shape(piece, config)[0] for piece in PIECES.get(module, (module,))])
        for index, piece in enumerate(pieces):
            rebuilt, count = torch.full_like(piece, torch.nan), torch.zeros_like(piece)
            for rank in range(tensor):
                parts = parts_of(name, config, layout, rank)
                own = cut(whole, parts)
                assert torch.equal(pack(unpack(own, parts), parts), own)
                part = parts[index]
                block = tuple(slice(a, a + n) for a, n in zip(part.offset, part.extent, strict=True))
                rebuilt[block] = unpack(own, parts)[index]
                count[block] += 1
            assert torch.equal(rebuilt, piece)
            assert (count == (tensor if TENSOR_PLAN[module] == "norm" else 1)).all()
            assert tuple(piece.shape) in shapes.values()


def test_padding_is_as_small_as_can_be_and_zero():
    config = tiny_model(vocab_size=97)
    assert [padded_vocabulary(config, tensor) for tensor in (1, 2, 4)] == [97, 112, 128]
    whole = torch.ones(97, 32)
    parts = [parts_of("0.embed_tokens.weight", config, Layout(tensor=4), rank)[0] for rank in range(4)]
    assert [part.extent[0] for part in parts] == [32, 32, 32, 1] and {part.rows for part in parts} == {32}
    assert cut(whole, [parts[3]])[1:].abs().max() == 0


def test_the_published_models_are_cut_where_the_work_is():
    """TinyLlama on four stages: the head is worth two and a half blocks."""
    config = tiny_model(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
                        num_key_value_heads=4, vocab_size=32_000, max_position_embeddings=2048)
    assert [(b.start, b.stop) for b in stage_bounds(config, 2048, 4)] == [(0, 7), (7, 13), (13, 19), (19, 24)]
