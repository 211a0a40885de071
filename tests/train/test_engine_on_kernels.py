"""The flat engine with every operation in our kernels, whose sources the host runs: the numbers of PyTorch's operations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cuda_emulation import emulation
from layout_runs import Case, deepspeed_settings, run_of, steps_of_data

from megatron_ttl.kernels.paths import KernelPaths
from megatron_ttl.parallel.mesh import Mesh
from megatron_ttl.train.engine import Engine, EngineOptions

ON_KERNELS = KernelPaths("cuda", "cuda", "cuda", "cuda", "cuda")


def trained(case, paths, recompute):
    """Four steps of two micro batches and more; return losses and norms."""
    engine = Engine(run_of(case), deepspeed_settings(case), Mesh(0, 1, 0, torch.device("cpu")), recompute,
                    options=EngineOptions("flat", paths=paths))
    data = steps_of_data(run_of(case).model.vocab_size, case.micro_batch, steps=4)
    results = [engine.train_step(micro_batches, 1e-3) for micro_batches in data]
    return [float(result.loss) for result in results], [float(result.grad_norm) for result in results]


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-6), ("bf16", 2e-4)])
def test_a_run_on_kernels_is_the_run(precision, bound):
    """Loss, clipping, update: everything but attention and matrix products; recompute changes not a bit."""
    case = replace(Case(engine="flat"), precision=precision)
    expected = trained(case, KernelPaths(), "none")
    with emulation():
        found, again = trained(case, ON_KERNELS, "none"), trained(case, ON_KERNELS, "selective")
    assert found[0] == pytest.approx(expected[0], abs=bound)
    assert found[1] == pytest.approx(expected[1], rel=10 * bound)
    assert again == found
