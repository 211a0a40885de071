"""A model that carries its residual stream in two parts against its layers one after the other; paths reach the kernels."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from spread_model import EOS, logits_and_gradients, spread, token_ids
from torch import nn

from megatron_ttl.kernels.documents import documents_of
from megatron_ttl.kernels.paths import KernelPaths
from megatron_ttl.model import llama
from megatron_ttl.model.llama import LlamaWithinDocuments, build_model, use_paths
from megatron_ttl.testing import tiny_model

PATHS = KernelPaths("norms", "turns", "gates", "loss", "step", "attends")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_numbers_are_those_of_layer_after_layer(dtype, masked):
    """To the bit, forward and backward: the additions are the same, and two gradients are added in either order."""
    model = spread(build_model(tiny_model(num_hidden_layers=3), seed=3, dtype=dtype))
    ids = token_ids()
    embedding, *blocks, head = model
    x = embedding(ids[:, :-1])
    documents = documents_of(ids[:, :-1], EOS, dtype) if masked else None
    for block in blocks:
        x = block(x, None, documents)
    whole = LlamaWithinDocuments(*model, eos_id=EOS) if masked else model
    for ours, theirs in zip(logits_and_gradients(whole(ids[:, :-1]), ids, model),
                            logits_and_gradients(head(x), ids, model), strict=True):
        assert torch.equal(ours, theirs)
    if not masked:
        assert torch.equal(whole(ids[:, :-1]), nn.Sequential(*model)(ids[:, :-1]))


def test_paths_reach_every_operation_and_all_norms_but_the_first_add(monkeypatch):
    """What is chosen is what is called; with two blocks one norm stands alone and four add."""
    called = Counter()

    def watch(name):
        original = getattr(llama, name)

        def watched(*arguments):
            called[name, arguments[-1]] += 1
            return original(*arguments[:-1], **({} if name != "attention" else {"path": "auto"}))

        monkeypatch.setattr(llama, name, watched)

    for name in ("rms_norm", "add_rms_norm", "rotary_heads", "swiglu", "attention"):
        watch(name)
    model = build_model(tiny_model(), seed=0)
    use_paths(model, PATHS)
    model(token_ids()[:, :-1])
    assert called == {("rms_norm", "norms"): 1, ("add_rms_norm", "norms"): 4, ("rotary_heads", "turns"): 2,
                      ("swiglu", "gates"): 2, ("attention", "attends"): 2}
    assert build_model(tiny_model(), seed=0)[1].mlp.paths == KernelPaths()  # other models keep theirs


def test_attention_leaves_no_copy_to_its_neighbours(monkeypatch):
    """Its output is what the projection reads, and the projection's gradient arrives with the strides of the output."""
    seen = {}
    original = llama.attention

    def watched(*arguments):
        out = original(*arguments)
        out.register_hook(lambda gradient: seen.update(gradient=gradient.stride()))
        seen.update(stride=out.stride(), place=out.data_ptr())
        return out

    monkeypatch.setattr(llama, "attention", watched)
    block = build_model(tiny_model(), seed=0)[1]
    block.self_attn.o_proj.register_forward_pre_hook(lambda _, given: seen.update(read=given[0].data_ptr()))
    x = torch.randn(2, 16, 32)
    block(x).sum().backward()
    assert seen["read"] == seen["place"]
    assert seen["gradient"] == seen["stride"] == (16 * 32, 8, 32, 1)
