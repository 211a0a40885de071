"""Blocks that are compiled one by one compute what they computed."""

from __future__ import annotations

import pytest
import torch
from gpu import gpu_test
from spread_model import EOS, logits_and_gradients, spread, token_ids
from torch._dynamo.utils import counters

from megatron_ttl.errors import ConfigError
from megatron_ttl.generate.generate import cached_logits
from megatron_ttl.generate.kv_cache import build_caches
from megatron_ttl.kernels.paths import KernelPaths
from megatron_ttl.model.llama import LlamaWithinDocuments, build_model, use_paths
from megatron_ttl.parallel.compiled import compile_model
from megatron_ttl.parallel.recompute import recompute_in
from megatron_ttl.parallel.tensor import ColumnParallelLinear
from megatron_ttl.testing import tiny_model

LAYERS = 10  # more than dynamo's limit of compilations of one function


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    counters.clear()


def models(kind, masked, backend):
    """Return a model and its twin, which is compiled."""
    twins = []
    for _ in range(2):
        model = spread(build_model(tiny_model(num_hidden_layers=LAYERS), seed=3))
        for layer in model:
            recompute_in(layer, kind)
        twins.append(LlamaWithinDocuments(*model, eos_id=EOS) if masked else model)
    compile_model(twins[1], backend)
    return twins


def assert_equal_to_rounding(plain, compiled):
    ids = token_ids()
    for ours, theirs in zip(*(logits_and_gradients(model(ids[:, :-1]), ids, model) for model in (compiled, plain)),
                            strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize(("kind", "masked"), [("none", False), ("none", True), ("selective", True), ("full", False)])
def test_compiled_equals_eager(kind, masked):
    """Logits and every gradient; three graphs for any number of blocks: the first, the others, the head."""
    plain, compiled = models(kind, masked, "aot_eager")
    assert_equal_to_rounding(plain, compiled)
    assert counters["stats"]["unique_graphs"] == 3


@pytest.mark.long
def test_inductor_equals_eager():
    """What a GPU would run, with code for this processor."""
    assert_equal_to_rounding(*models("selective", True, "inductor"))


@gpu_test
@pytest.mark.parametrize("paths", [KernelPaths(), KernelPaths("cuda", "cuda", "cuda")], ids=["torch", "cuda"])
@pytest.mark.parametrize("kind", ["none", "selective"])
def test_compiled_equals_eager_on_a_gpu(kind, paths):
    """In bf16, with heads of 64 channels in groups; PyTorch's operations, and our kernels as operators of the region."""
    config = tiny_model(hidden_size=256, intermediate_size=512, num_hidden_layers=LAYERS)
    ids, found = token_ids().cuda(), []
    for compiled in (False, True):
        model = build_model(config, seed=3, device="cuda", dtype=torch.bfloat16)
        use_paths(model, paths)
        for layer in model:
            recompute_in(layer, kind)
        if compiled:
            compile_model(model)
        found.append(logits_and_gradients(model(ids[:, :-1]), ids, model))
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() <= 0.05 * theirs.norm()  # bf16 on a CPU is 0.016 away from fp32 here


def test_only_training_is_compiled():
    """Windows of any size, and tokens on a cache, run as before and compile nothing."""
    plain, compiled = models("none", False, "aot_eager")
    ids = token_ids()[:, :-1]
    caches = [build_caches(tiny_model(num_hidden_layers=LAYERS), 32, "cpu", torch.float32, batch=2) for _ in range(2)]
    with torch.no_grad():
        assert torch.equal(compiled(ids), plain(ids))
        for length in (9, 1):
            ours, theirs = (cached_logits(model, ids[:, :length], cache)
                            for model, cache in zip((compiled, plain), caches, strict=True))
            assert torch.equal(ours, theirs)
    compiled.eval()
    assert torch.equal(compiled(ids[:1, :5]), plain(ids[:1, :5]))
    assert not counters["stats"]


def test_layers_that_are_cut_are_refused():
    """Their exchanges cannot be compiled, and are not quietly left out."""
    model = build_model(tiny_model(), seed=0)
    model[1].mlp.gate_up_proj = ColumnParallelLinear(model[1].mlp.gate_up_proj.weight.detach(), None)
    with pytest.raises(ConfigError, match="compile: true.*cut over ranks.*parallel.tensor 1"):
        compile_model(model)
