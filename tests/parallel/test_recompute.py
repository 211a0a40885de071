"""What a block forgets: less is kept, no product is computed twice, and the numbers stay."""

from __future__ import annotations

import pytest
import torch
from spread_model import logits_and_gradients, spread, token_ids
from torch.utils.flop_counter import FlopCounterMode

from megatron_ttl.model.llama import build_model
from megatron_ttl.parallel import recompute
from megatron_ttl.parallel.recompute import recompute_in
from megatron_ttl.testing import tiny_model


def forgetful(kind, layers=4):
    model = spread(build_model(tiny_model(num_hidden_layers=layers), seed=3))
    for layer in model:
        recompute_in(layer, kind.partition(",")[0])
    return model


def kept_bytes(model, ids):
    """Count what autograd keeps of a forward pass; a weight counts nothing and a storage once."""
    kept = {parameter.data_ptr(): 0 for parameter in model.parameters()}

    def keep(tensor):
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(ids)
    return sum(kept.values())


@pytest.fixture(params=["selective", "selective, kernels", "full"])
def kind(request, monkeypatch):
    """What is forgotten; the way that is for kernels too, here with PyTorch's operations."""
    if "kernels" in request.param:
        monkeypatch.setattr(recompute, "_has_kernels", lambda block: True)
    return request.param


def test_numbers_stay_to_the_bit(kind):
    """The same operations on the same numbers; `selective` computes no product twice, `full` all but the last of a block."""
    ids, flops = token_ids(), {}
    results = []
    for each in ("none", kind):
        model = forgetful(each)
        with FlopCounterMode(display=False) as counter:
            results.append(logits_and_gradients(model(ids[:, :-1]), ids, model))
        flops[each] = counter.get_total_flops()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))
    assert flops[kind] == flops["none"] if kind != "full" else flops["none"] * 1.1 < flops[kind] < flops["none"] * 4 / 3


def test_a_block_more_keeps_what_it_must(kind):
    """`full` its input, not the two parts of it; `selective` two sums, what attention reads and gives, SwiGLU's input."""
    ids = token_ids()[:, :-1]
    tokens, hidden, wide, kv = ids.numel(), 32, 80, 16
    turned = hidden + kv  # new memory beside the packed projection, which the values keep alive
    expected = hidden if kind == "full" else 2 * hidden + (hidden + 2 * kv) + turned + hidden + 2 * wide
    if "kernels" in kind:
        expected += 2 * hidden + wide  # of PyTorch's norms and silu; kernels keep one number per token and norm
    more = kept_bytes(forgetful(kind, 4), ids) - kept_bytes(forgetful(kind, 3), ids)
    assert expected * 4 * tokens <= more <= (expected + 10) * 4 * tokens  # sums of softmax, one per head
