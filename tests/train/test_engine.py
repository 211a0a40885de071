"""The engine on one process and its edges: clipping, initial bits, held-out loss, recomputing, fp16, accumulation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from layout_runs import Case, deepspeed_settings, joined, plain_loop, run_of, steps_of_data, train_case, train_cases

from megatron_ttl.checkpoint.names import split_to_hf
from megatron_ttl.checkpoint.state import WEIGHTS, capture
from megatron_ttl.model.llama import build_model
from megatron_ttl.parallel.loss import exact_loss_sum
from megatron_ttl.testing import run_distributed
from megatron_ttl.train.engine import Engine

ACCUMULATIONS = [Case(stage=stage, precision=precision, micro_batch=micro_batch) for precision in ("fp32", "bf16")
                 for stage in range(precision == "bf16", 4) for micro_batch in (24, 12, 3)]
ACCUMULATIONS += [Case(engine="flat", precision=precision, micro_batch=micro_batch) for precision in ("fp32", "bf16")
                  for micro_batch in (24, 12, 3)]


def test_every_accumulation_equals_a_plain_torch_loop():
    """Accumulation 1, 2 and 8, all stages: fp32 to 1e-6, bf16 within its rounding."""
    curves = run_distributed(train_cases, 1, ACCUMULATIONS)[0]
    references = {(precision, micro): plain_loop(Case(precision=precision, micro_batch=micro))[0]
                  for precision in ("fp32", "bf16") for micro in (24, 12, 3)}
    for case, (curve, _) in curves.items():
        error = (curve - references[case.precision, case.micro_batch]).abs().amax(1)
        assert error.max() < (5e-4 if case.precision == "bf16" else 1e-6), (case, error)
        if case.engine == "flat":
            theirs = curves[replace(case, engine="deepspeed")][0]
            assert (curve - theirs).abs().max() < (9e-5 if case.precision == "bf16" else 1e-6), (case, curve - theirs)
    for precision, bound in (("fp32", 1e-6), ("bf16", 5e-4)):
        for micro in (12, 3):
            assert (references[precision, micro] - references[precision, 24]).abs().max() < bound


def clipped_and_not(mesh, case):
    """Plain Adam would not notice a scaled gradient; its epsilon, large here, does."""
    kinds = [{"stage": stage} for stage in (0, 1, 2, 3)] + [{"engine": "flat"}]
    return [train_case(mesh, replace(case, **kind), clipping) for kind in kinds for clipping in (0.0, 0.01)]


def test_clipping_really_clips():
    results = run_distributed(clipped_and_not, 1, Case())[0]
    for clipping, results_of in ((0.0, results[0::2]), (0.01, results[1::2])):
        curve, weights = plain_loop(Case(), clipping)
        for ours, state in results_of:
            assert (ours - curve).abs().max() < 1e-6
            found = joined([state])[WEIGHTS]["model.embed_tokens.weight"]
            torch.testing.assert_close(found, weights["model.embed_tokens.weight"], atol=1e-6, rtol=0)
    assert (results[0][0][0] - results[1][0][0]).abs().max() > 1e-5


def initial_states(mesh, cases):
    """Return this process's pieces of fresh engines."""
    found = {}
    for case in cases:
        cut = mesh.cut(case.tensor, case.pipeline, case.sequence)
        engine = Engine(run_of(case), deepspeed_settings(case), cut, options=case.options)
        found[case] = capture(engine.state, run_of(case).model, cut)
        engine.close()
    return found


def test_a_run_begins_with_the_drawn_bits_in_every_dtype_and_layout():
    """DeepSpeed's own masters would be rounded to bf16 first."""
    cases = [Case(data=2, stage=stage, precision=precision, model="odd vocabulary") for precision in ("fp32", "bf16")
             for stage in range(precision == "bf16", 4)]
    cases += [Case(tensor=2, precision="bf16", model="odd vocabulary"), Case(pipeline=2, precision="bf16", model="GQA")]
    results = run_distributed(initial_states, 2, cases)
    for case in cases:
        run = run_of(case)
        drawn = {}
        for name, tensor in build_model(run.model, run.run.seed).state_dict().items():
            drawn |= split_to_hf(name, tensor, run.model)
        state = joined([by_case[case] for by_case in results])[WEIGHTS]
        assert state.keys() == drawn.keys() and all(torch.equal(state[name], drawn[name]) for name in drawn), case


def held_out(mesh, case):
    """Evaluate windows of another number and length than training's between two steps; return nats and later losses."""
    run = run_of(case)
    mesh = mesh.cut(case.tensor, case.pipeline, case.sequence)
    engine = Engine(run, deepspeed_settings(case), mesh, case.recompute, options=case.options)
    data = list(steps_of_data(run.model.vocab_size, case.micro_batch, mesh.data_parallel_rank, mesh.data_parallel_size))
    losses = [float(engine.train_step(data[0], 1e-3).loss)]
    nats = [engine.held_out_nats(*windows(run.model.vocab_size, rows)) for rows in (7, 2, 13)]
    losses += [float(engine.train_step(micro_batches, 1e-3).loss) for micro_batches in data[1:3]]
    engine.close()
    return nats, losses


def windows(vocab_size, rows, length=20):
    ids = torch.randint(vocab_size, (rows, length + 1), generator=torch.Generator().manual_seed(rows))
    labels = ids[:, 1:].clone()
    labels[-1, 4:] = -100
    return ids[:, :-1], labels


@pytest.mark.parametrize("case", [
    Case(), Case(stage=3, recompute="full"), Case(tensor=2, model="odd vocabulary", sequence=True),
    Case(pipeline=2, recompute="selective"), Case(tensor=2, pipeline=2, model="odd vocabulary", sequence=True),
    Case(pipeline=2, data=2, model="odd vocabulary"), Case(data=2, stage=3), Case(engine="flat", recompute="selective")],
    ids=str)
def test_held_out_loss_in_the_middle_of_training(case):
    """Ragged batches and another length give one process's sums to fp64, and training goes on as if nothing was."""
    reference, losses = run_distributed(held_out, 1, Case(model=case.model))[0]
    for nats, later in run_distributed(held_out, case.world_size, case):
        assert nats == pytest.approx(reference, rel=1e-6)
        assert later == pytest.approx(losses, abs=1e-5)


def test_held_out_loss_is_the_models():
    run = run_of(Case())
    model = build_model(run.model, run.run.seed)
    ids, labels = windows(run.model.vocab_size, 7)
    untrained = run_distributed(untrained_nats, 1, Case())[0]
    assert untrained == pytest.approx(float(exact_loss_sum(model(ids).detach(), labels, run.model.vocab_size)), rel=1e-6)


def untrained_nats(mesh, case):
    engine = Engine(run_of(case), deepspeed_settings(case), mesh, options=case.options)
    return engine.held_out_nats(*windows(run_of(case).model.vocab_size, 7))


def saved_bytes(mesh, case):
    """Count what autograd keeps of one forward pass; a weight or an input counts once."""
    run = run_of(case)
    found = {}
    for recompute in ("none", "selective", "full"):
        engine = Engine(run, deepspeed_settings(case), mesh, recompute)
        kept = {p.data_ptr(): 0 for p in engine.module.parameters()}

        def keep(tensor, kept=kept):
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = engine.module(next(steps_of_data(run.model.vocab_size, 6))[0][0])
        found[recompute] = sum(kept.values()) - logits.numel() * 4
        engine.close()
    return found


def test_recomputing_forgets_activations():
    """Numbers are compared in the parity matrix; here it is what they are for: memory."""
    found = run_distributed(saved_bytes, 1, Case())[0]
    assert found["full"] < 0.3 * found["none"] and found["full"] < found["selective"] < 0.75 * found["none"], found


def with_fp16(mesh, cases):
    """fp16 as a GPU would have it: DeepSpeed refuses it on CPUs, PyTorch computes it there, slowly."""
    from deepspeed.accelerator import get_accelerator

    kind = type(get_accelerator())
    dtypes = kind.supported_dtypes
    kind.is_fp16_supported = lambda self: True
    kind.supported_dtypes = lambda self: [*dtypes(self), torch.float16]
    return train_cases(mesh, cases)


@pytest.mark.parametrize("cases", [
    [Case(precision="fp16", stage=stage, offload=offload) for stage, offload in ((1, False), (2, True), (3, False))],
    [Case(tensor=2, precision="fp16", stage=2, sequence=True), Case(tensor=2, precision="fp16", stage=3)],
    [Case(pipeline=2, precision="fp16")]], ids=str)
def test_fp16_with_loss_scaling(cases):
    """Ten bits of fraction: a hundred times closer to fp32 than the bound of bf16."""
    results = run_distributed(with_fp16, cases[0].world_size, cases)
    expected, _ = plain_loop(Case())
    for case in cases:
        assert (results[0][case][0] - expected).abs().max() < 1e-4, case


def overflowing(mesh, initial_scale_power):
    """Begin with a scale under which gradients overflow; return scales, skips and the state to resume."""
    from deepspeed.accelerator import get_accelerator

    kind = type(get_accelerator())
    dtypes = kind.supported_dtypes
    kind.is_fp16_supported = lambda self: True
    kind.supported_dtypes = lambda self: [*dtypes(self), torch.float16]
    case = Case(precision="fp16", stage=2)
    settings = deepspeed_settings(case)
    settings["fp16"] |= {"loss_scale": 0, "initial_scale_power": initial_scale_power, "hysteresis": 1}
    engine = Engine(run_of(case), settings, mesh)
    rows = []
    for micro_batches in steps_of_data(run_of(case).model.vocab_size, 6):
        before = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
        result = engine.train_step(micro_batches, 1e-3)
        moved = any(not torch.equal(before[name], p) for name, p in engine.module.named_parameters())
        rows.append((result.skipped, moved, engine.loss_scale_row(0)["loss_scale"]))
    state = engine.loss_scaler
    engine.close()
    fresh = Engine(run_of(case), settings, mesh)
    fresh.loss_scaler = state
    return rows, state, fresh.loss_scaler


def test_an_overflow_skips_the_step_and_lowers_the_scale():
    rows, state, resumed = run_distributed(overflowing, 1, 24)[0]
    skipped = [row[0] for row in rows]
    assert skipped[0] and not skipped[-1], "the first scale must overflow and a later one must not"
    assert all(skip != moved for skip, moved, _ in rows), "a skipped step moves nothing, another one does"
    assert rows[-1][2] < 2**24 and state == resumed and state["cur_scale"] == rows[-1][2]


def test_other_precisions_have_no_loss_scale():
    assert run_distributed(no_scale, 1)[0] == ({}, None)


def no_scale(mesh):
    engine = Engine(run_of(Case()), deepspeed_settings(Case()), mesh)
    return engine.loss_scale_row(0), engine.loss_scaler
