"""The whole model on the kernels' sources, run on the host, against the whole model on PyTorch's operations."""

from __future__ import annotations

import pytest
import torch
from cuda_emulation import emulation
from spread_model import EOS, logits_and_gradients, spread, token_ids

from megatron_ttl.kernels.paths import KernelPaths
from megatron_ttl.model.llama import LlamaWithinDocuments, build_model, use_paths
from megatron_ttl.parallel.compiled import compile_model
from megatron_ttl.parallel.recompute import recompute_in
from megatron_ttl.testing import tiny_model

CUDA = KernelPaths(rms_norm="cuda", rotary="cuda", swiglu="cuda")
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 0.02}


def results(paths, dtype, kind="none", masked=False, compiled=False):
    model = spread(build_model(tiny_model(num_hidden_layers=3), seed=3, dtype=dtype))
    use_paths(model, paths)
    for layer in model:
        recompute_in(layer, kind)
    if compiled:
        torch._dynamo.reset()
        compile_model(model, "aot_eager")
    model = LlamaWithinDocuments(*model, eos_id=EOS) if masked else model
    ids = token_ids()[:, :17]
    return logits_and_gradients(model(ids[:, :-1]), ids, model)


@pytest.mark.parametrize(("dtype", "kind", "masked", "compiled"), [
    (torch.float32, "none", True, False), (torch.bfloat16, "none", False, False), (torch.float32, "selective", True, False),
    (torch.bfloat16, "full", False, False), (torch.float32, "none", False, True), (torch.float32, "selective", True, True),
    (torch.float32, "full", False, True)])
def test_the_model_on_kernels_is_the_model(dtype, kind, masked, compiled):
    """Logits and every gradient, whatever is forgotten, within documents, eager and compiled."""
    exact = results(KernelPaths(), dtype, masked=masked)
    with emulation():
        plain = results(CUDA, dtype, masked=masked)
        ours = results(CUDA, dtype, kind, masked, compiled)
    for one, eager, reference in zip(ours, plain, exact, strict=True):
        assert (one - reference).norm() <= BOUNDS[dtype] * reference.norm()
        assert compiled or kind == "full" or torch.equal(one, eager)  # `full` adds two gradients after the kernel, not in it
