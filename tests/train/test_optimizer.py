"""Which weights decay, by what they are."""

from __future__ import annotations

import pytest
import torch

from megatron_ttl.config.schema import OptimizerConfig
from megatron_ttl.model.llama import build_model
from megatron_ttl.testing import tiny_model
from megatron_ttl.train.optimizer import build_optimizer, parameter_groups


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("embeddings", [False, True])
def test_groups_hold_every_parameter_once(norms, embeddings):
    """The groups partition the model, and the switches move norms and the embedding."""
    model = build_model(tiny_model(), seed=0)
    groups = parameter_groups(model, OptimizerConfig(lr=1e-3, decay_norms=norms, decay_embeddings=embeddings))
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(dict(model.named_parameters()))
    decayed = {name for group in groups if group["weight_decay"] for name in group["names"]}
    assert ("1.input_layernorm.weight" in decayed) == ("3.norm.weight" in decayed) == norms
    assert ("0.embed_tokens.weight" in decayed) == embeddings
    assert {"1.mlp.down_proj.weight", "3.lm_head.weight"} <= decayed


def test_a_step_of_decay_alone_moves_only_what_decays():
    """With zero gradients a norm stays bit for bit and a matrix shrinks by 1 - lr * decay."""
    model = build_model(tiny_model(), seed=0)
    config = OptimizerConfig(lr=0.1, weight_decay=0.5)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    build_optimizer(parameter_groups(model, config), config, torch.device("cpu")).step()
    for name, weight in model.state_dict().items():
        expected = before[name] if "norm" in name else before[name] * 0.95
        torch.testing.assert_close(weight, expected, atol=0, rtol=0 if "norm" in name else 1e-6)
