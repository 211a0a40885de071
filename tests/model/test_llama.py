"""The model against Hugging Face's Llama, and its initial weights."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_ttl.checkpoint.names import split_to_hf
from megatron_ttl.kernels.cross_entropy import cross_entropy
from megatron_ttl.model.llama import build_model, initialize_layer, layer_classes
from megatron_ttl.testing import tiny_model


def hugging_face_twin(config, model):
    """Return transformers' Llama with the same weights."""
    twin = LlamaForCausalLM(LlamaConfig(
        hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers, num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads, vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings, rms_norm_eps=config.rms_norm_eps,
        tie_word_embeddings=False))
    weights = {}
    for name, tensor in model.state_dict().items():
        weights |= split_to_hf(name, tensor, config)
    twin.load_state_dict(weights, strict=True)
    return twin


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_logits_and_gradients_equal_hugging_face(kv_heads):
    """fp32 logits to 1e-5 and gradients to 1e-4 relative, for multi-head and grouped attention."""
    config = tiny_model(num_key_value_heads=kv_heads, num_hidden_layers=3)
    model = build_model(config, seed=3)
    with torch.no_grad():  # norms that differ from one, or a forgotten scale would not show
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.mul_(4)
    twin = hugging_face_twin(config, model)
    ids = torch.randint(config.vocab_size, (2, 33), generator=torch.Generator().manual_seed(0))
    ours, theirs = model(ids[:, :-1]), twin(ids[:, :-1]).logits
    assert (ours - theirs).abs().max() <= 1e-5 * max(1, theirs.abs().max())
    cross_entropy(ours, ids[:, 1:]).backward()
    torch.nn.functional.cross_entropy(theirs.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    gradients = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        for hf_name, gradient in split_to_hf(name, parameter.grad, config).items():
            reference = gradients[hf_name].grad
            assert (gradient - reference).norm() <= 1e-4 * reference.norm(), hf_name


def test_initial_weights_follow_the_papers():
    """Standard deviations of both rules, norms at one, and the two residual projections of TinyLlama narrower."""
    wide = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 1024}
    for name, weight in build_model(tiny_model(**wide), seed=0).state_dict().items():
        assert weight.std().item() == pytest.approx(0.02, rel=0.02) if weight.dim() > 1 else (weight == 1).all(), name
    for name, weight in build_model(tiny_model(**wide, init="tinyllama"), seed=0).state_dict().items():
        narrow = "o_proj" in name or "down_proj" in name
        expected = 256**-0.5 / 4 if narrow else (2 / 5 / 256) ** 0.5
        assert weight.std().item() == pytest.approx(expected, rel=0.03) if weight.dim() > 1 else (weight == 1).all(), name


def test_tinyllama_init_gives_its_published_deviations():
    """The two numbers of the 1.1B model: 0.01398 and 0.001004."""
    config = tiny_model(hidden_size=2048, intermediate_size=64, num_attention_heads=32, num_key_value_heads=4,
                        num_hidden_layers=22, vocab_size=64, init="tinyllama")
    block = layer_classes(config)[1](config)
    initialize_layer(block, config, index=1, seed=0)
    assert block.self_attn.qkv_proj.weight.std().item() == pytest.approx(0.01398, rel=2e-3)
    assert block.self_attn.o_proj.weight.std().item() == pytest.approx(0.001004, rel=2e-3)


def test_a_layer_built_alone_equals_the_same_layer_of_the_whole():
    """Initial weights do not depend on which process builds which layer."""
    config = tiny_model()
    whole = build_model(config, seed=11)
    for index, layer_class in enumerate(layer_classes(config)):
        alone = layer_class(config)
        initialize_layer(alone, config, index, seed=11)
        for name, weight in alone.state_dict().items():
            assert torch.equal(weight, whole.state_dict()[f"{index}.{name}"]), name
    assert not torch.equal(whole[1].mlp.down_proj.weight, whole[2].mlp.down_proj.weight)


def test_bfloat16_model_keeps_fp32_angles():
    """A bf16 model's rotary tables stay fp32, and its logits stay near the fp32 model's."""
    config = tiny_model()
    exact, rounded = build_model(config, seed=2), build_model(config, seed=2, dtype=torch.bfloat16)
    ids = torch.arange(32)[None]
    error = (exact(ids) - rounded(ids).float()).norm() / exact(ids).norm()
    assert error < 0.02
    assert rounded[1].self_attn._rotary[0].dtype == torch.float32


def test_a_token_never_sees_its_future():
    """Changing the last token changes no earlier logit."""
    model = build_model(tiny_model(), seed=5)
    ids = torch.arange(20)[None]
    other = ids.clone()
    other[0, -1] = 90
    assert torch.equal(model(ids)[:, :-1], model(other)[:, :-1])
    assert not torch.equal(model(ids)[:, -1], model(other)[:, -1])
