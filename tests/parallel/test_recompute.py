"""What a block forgets: less is kept, no product is computed twice, and the numbers stay."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from cuda_emulation import emulation
from gpu import gpu_test
from spread_model import logits_and_gradients, spread, token_ids
from torch.utils.flop_counter import FlopCounterMode

from megatron_ttl.config.kernels import KernelsConfig
from megatron_ttl.kernels.cross_entropy import cross_entropy
from megatron_ttl.kernels.paths import KernelPaths, resolve_paths
from megatron_ttl.model.llama import build_model, use_paths
from megatron_ttl.parallel import recompute
from megatron_ttl.parallel.plan import Layout
from megatron_ttl.parallel.recompute import recompute_in
from megatron_ttl.parallel.tensor import RowParallelLinear
from megatron_ttl.plan.activations import FUSED, kept_by_block, token_of
from megatron_ttl.testing import tiny_model

STEPS, LAYERS = 3, 2


def forgetful(kind, layers=4, dtype=torch.float32):
    model = spread(build_model(tiny_model(num_hidden_layers=layers), seed=3, dtype=dtype))
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


def on_kernels(*arguments):
    model = forgetful(*arguments)
    use_paths(model, KernelPaths(rms_norm="cuda", rotary="cuda", swiglu="cuda"))
    return model


def trained(model):
    """Return the losses of a few steps, and the weights they lead to."""
    ids, optimizer, losses = token_ids()[:, :17], torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = cross_entropy(model(ids[:, :-1]), ids[:, 1:])
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [*losses, *model.parameters()]


def cut(linear):
    """Return the product as one rank of a group has it; this one is alone in it."""
    return RowParallelLinear(linear.weight.detach(), SimpleNamespace(leave=lambda x: x))


def fetched(linear):
    """Mark the weight as ZeRO 3 marks one that is here only while its module runs."""
    linear.weight.ds_id = 0
    return linear


@pytest.mark.parametrize(("change", "dtype", "forwards"), [
    (None, torch.float32, 1), (None, torch.bfloat16, 1), (cut, torch.float32, 2), (fetched, torch.bfloat16, 2)])
def test_training_on_kernels_stays_and_gates_once(change, dtype, forwards, monkeypatch):
    """To the bit; SwiGLU's forward kernel runs again only where an exchange follows or the weight comes and goes."""
    model, calls = on_kernels("selective", LAYERS, dtype), Counter()
    for block in [] if change is None else model[1:-1]:
        block.mlp.down_proj = change(block.mlp.down_proj)
    with emulation() as library:
        expected, call = trained(on_kernels("none", LAYERS, dtype)), library.call
        monkeypatch.setattr(library, "call", lambda name, *rest, **more: calls.update([name]) or call(name, *rest, **more))
        found = trained(model)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert calls["swiglu_forward"] == forwards * LAYERS * STEPS and calls["swiglu_backward"] == LAYERS * STEPS


def test_a_block_on_kernels_keeps_what_the_forecast_says():
    """To the byte, with the table of angles that each block has."""
    ids, config = token_ids()[:, :17], tiny_model()
    with emulation():
        more = kept_bytes(on_kernels("selective", 3), ids) - kept_bytes(on_kernels("selective", 2), ids)
    token = token_of(config, Layout(), 4, ids.shape[1])
    assert more == ids.numel() * kept_by_block(token, FUSED, "selective") + ids.shape[1] * config.head_dim * 4


@pytest.mark.slow
@gpu_test
def test_selective_costs_at_most_four_per_cent_on_a_gpu():
    """Forward and backward through blocks as wide as the 460M model's; the rest of a step is the same for both."""
    config = tiny_model(hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, num_attention_heads=16,
                        num_key_value_heads=16, max_position_embeddings=2048)
    ids, models, best = torch.randint(0, config.vocab_size, (8, 2049), device="cuda"), {}, {}
    for kind in ("none", "selective"):
        models[kind] = build_model(config, 1, "cuda", torch.bfloat16)
        use_paths(models[kind], resolve_paths(KernelsConfig().model_dump(), torch.device("cuda")).paths)
        for layer in models[kind]:
            recompute_in(layer, kind)
    for _ in range(20):  # alternately: both meet the same clocks and temperatures
        for kind, model in models.items():
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            torch.autograd.grad(cross_entropy(model(ids[:, :-1]), ids[:, 1:]), list(model.parameters()))
            ended.record()
            ended.synchronize()
            best[kind] = min(best.get(kind, float("inf")), began.elapsed_time(ended))
    assert best["selective"] <= 1.04 * best["none"], best
