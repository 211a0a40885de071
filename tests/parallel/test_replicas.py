"""One flipped bit, one skipped clip: found, with rank and tensor named."""

from __future__ import annotations

import pytest
import torch
from layout_runs import Case, deepspeed_settings, run_of, steps_of_data

from megatron_ttl.parallel.replicas import checksum, replica_faults
from megatron_ttl.testing import run_distributed
from megatron_ttl.train import deepspeed_drive
from megatron_ttl.train.engine import Engine


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_single_bit_changes_the_checksum(dtype):
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    tensor = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    seen = {checksum(tensor)}
    for element in range(15):
        for bit in range(8 * tensor.element_size()):
            changed = tensor.clone()
            changed.view(bits).flatten()[element] ^= torch.ones((), dtype=bits) << bit
            seen.add(checksum(changed))
    assert len(seen) == 1 + 15 * 8 * tensor.element_size()
    assert checksum(tensor.flatten()[torch.arange(14, -1, -1)]) != checksum(tensor), "the order counts"


def flip(mesh, case, victim, name):
    """Train a step, flip the lowest bit of one element of one weight on one rank; return faults before and after."""
    run = run_of(case)
    mesh = mesh.cut(case.tensor, case.pipeline, case.sequence)
    engine = Engine(run, deepspeed_settings(case), mesh)
    engine.train_step(next(steps_of_data(run.model.vocab_size, case.micro_batch, mesh.data_parallel_rank,
                                         mesh.data_parallel_size)), 1e-3)
    before = replica_faults(engine.module, mesh)
    if mesh.rank == victim:
        parameter = dict(engine.module.named_parameters())[name]
        tensor = parameter.ds_tensor if case.stage == 3 else parameter.data
        bits = tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()]).flatten()
        bits[3] ^= 1
    return before, replica_faults(engine.module, mesh)


@pytest.mark.parametrize(("case", "victim", "name", "others"), [
    (Case(data=4, stage=1), 2, "2.mlp.down_proj.weight", "0, 1, 3"),
    (Case(data=4, stage=0, precision="fp32"), 0, "0.embed_tokens.weight", "1, 2, 3"),
    (Case(data=4, stage=2, precision="bf16"), 3, "4.norm.weight", "0, 1, 2"),
    (Case(tensor=4, stage=1), 1, "1.input_layernorm.weight", "0, 2, 3"),
    (Case(tensor=4, stage=3, sequence=True), 1, "4.norm.weight", "0, 2, 3"),
], ids=str)
def test_a_flipped_bit_is_found(case, victim, name, others):
    for before, after in run_distributed(flip, 4, case, victim, name):
        assert before == []
        place = f"tensor {victim if case.tensor > 1 else 0}, pipeline 0, data {victim if case.data > 1 else 0}"
        assert after == [f"rank {victim} ({place}): {name} differs from its copies on ranks {others}"]


def test_without_a_majority_all_are_named():
    case = Case(tensor=2, data=1, stage=1)
    for _, after in run_distributed(flip, 2, case, 1, "1.input_layernorm.weight"):
        assert [fault.split(" (")[0] for fault in after] == ["rank 0", "rank 1"]


def test_what_is_cut_may_differ():
    case = Case(tensor=2, stage=1)
    for before, after in run_distributed(flip, 2, case, 1, "1.mlp.down_proj.weight"):
        assert before == after == []


def skip_a_clip(mesh, victim):
    case = Case(tensor=2, data=2, stage=0)
    run = run_of(case)
    mesh = mesh.cut(2)
    real = deepspeed_drive.clip_gradients
    if mesh.rank == victim:
        deepspeed_drive.clip_gradients = lambda parameters, clipping, mesh: real(parameters, 0.0, mesh)
    engine = Engine(run, deepspeed_settings(case), mesh)
    for micro_batches in steps_of_data(run.model.vocab_size, case.micro_batch, mesh.data_parallel_rank, 2, steps=2):
        engine.train_step(micro_batches, 1e-3)
    return replica_faults(engine.module, mesh)


def test_a_skipped_clip_is_found():
    """Every weight of the rank drifts; norms are compared with three copies, the rest with one."""
    faults = run_distributed(skip_a_clip, 4, 2)[0]
    norms = [fault for fault in faults if "norm" in fault]
    assert norms and all(fault.startswith("rank 2 (tensor 0, pipeline 0, data 1)") for fault in norms)
    assert {fault.split(" ")[1] for fault in faults} == {"0", "2"}
