from __future__ import annotations

import pytest
import torch

from megatron_ttl.checkpoint.names import hf_names, hf_shapes, join_from_hf, packed_names, split_to_hf
from megatron_ttl.config.schema import ModelConfig
from megatron_ttl.model.flops import count_parameters
from megatron_ttl.model.llama import build_model


def config_of(heads: int, groups: int, layers: int = 3) -> ModelConfig:
    return ModelConfig(hidden_size=48, intermediate_size=80, num_hidden_layers=layers,
                       num_attention_heads=heads,
                       num_key_value_heads=groups, vocab_size=40, max_position_embeddings=64)


CONFIGS = [config_of(4, 4), config_of(6, 2), config_of(6, 1), config_of(4, 4, layers=12)]


@pytest.mark.parametrize("config", CONFIGS)
def test_packed_names_are_the_models(config: ModelConfig) -> None:
    with torch.device("meta"):
        assert packed_names(config) == list(build_model(config, None).state_dict())


@pytest.mark.parametrize("config", CONFIGS)
def test_hf_names_and_shapes_are_transformers(config: ModelConfig) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
              "num_key_value_heads",
              "vocab_size")
    with torch.device("meta"):
        theirs = LlamaForCausalLM(LlamaConfig(**{field: getattr(config,
                                                                field) for field in fields})).state_dict()
    shapes = hf_shapes(config)
    assert shapes == {name: tuple(tensor.shape) for name, tensor in theirs.items()}
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == count_parameters(config)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_split_and_join_lose_nothing(config: ModelConfig, dtype: torch.dtype) -> None:
    seen: list[str] = []
    for name, tensor in build_model(config, seed=1, dtype=dtype).state_dict().items():
        tensor = torch.randn(tensor.shape).to(dtype)  # norms are all ones: any mix-up would go unseen
        pieces = split_to_hf(name, tensor, config)
        assert list(pieces) == hf_names(name, config)
        assert {piece: tuple(part.shape) for piece, part in pieces.items()} == {
            piece: hf_shapes(config)[piece] for piece in pieces}
        assert torch.equal(join_from_hf(name, pieces, config), tensor)
        # The order in which a file gives the pieces back must not matter.
        assert torch.equal(join_from_hf(name, dict(reversed(pieces.items())), config), tensor)
        seen += pieces
    assert seen == list(hf_shapes(config))


def test_rows_of_packed_weights() -> None:
    config = config_of(6, 2)  # d = 8
    qkv = torch.arange(80.0)[:, None].expand(80, 48)
    pieces = split_to_hf("2.self_attn.qkv_proj.weight", qkv, config)
    first_rows = {name: (part[0, 0].item(), len(part)) for name, part in pieces.items()}
    assert first_rows == {"model.layers.1.self_attn.q_proj.weight": (0, 48),
                          "model.layers.1.self_attn.k_proj.weight": (48, 16),
                          "model.layers.1.self_attn.v_proj.weight": (64, 16)}


def test_gate_comes_before_up() -> None:
    gate_up = torch.arange(160.0)[:, None].expand(160, 48)
    pieces = split_to_hf("1.mlp.gate_up_proj.weight", gate_up, CONFIGS[0])
    assert {name: part[0, 0].item() for name, part in pieces.items()} == {
        "model.layers.0.mlp.gate_proj.weight": 0, "model.layers.0.mlp.up_proj.weight": 80}


def test_a_missing_or_foreign_piece_is_our_mistake() -> None:
    config = CONFIGS[0]
    pieces = split_to_hf("1.mlp.gate_up_proj.weight", torch.zeros(160, 48), config)
    for wrong in (dict(list(pieces.items())[:1]), {**pieces, "x": torch.zeros(1)}):
        with pytest.raises(AssertionError):
            join_from_hf("1.mlp.gate_up_proj.weight", wrong, config)
    with pytest.raises(AssertionError):
        hf_names("9.mlp.down_proj.weight", config)
