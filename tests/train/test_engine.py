"""DeepSpeed's every stage against a plain torch loop, and its state taken out and put back."""

from __future__ import annotations

import pytest
import torch

from megatron_ttl.checkpoint.names import split_to_hf
from megatron_ttl.checkpoint.state import MOMENTS, WEIGHTS, capture, restore
from megatron_ttl.kernels.cross_entropy import cross_entropy
from megatron_ttl.model.llama import build_model
from megatron_ttl.testing import run_distributed, tiny_run
from megatron_ttl.train.engine import Engine
from megatron_ttl.train.optimizer import build_optimizer, parameter_groups

STEPS, BATCH, SEQUENCE = 10, 12, 32


def deepspeed_settings(stage, bf16, micro_batch, data_parallel=1, clipping=0.3):
    accumulation = BATCH // micro_batch // data_parallel
    settings = {"train_micro_batch_size_per_gpu": micro_batch, "gradient_accumulation_steps": accumulation,
                "train_batch_size": BATCH, "gradient_clipping": clipping, "zero_optimization": {"stage": stage},
                "communication_data_type": "fp32", "zero_allow_untested_optimizer": True, "steps_per_print": 10**9}
    if bf16:
        settings |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    return settings


def steps_of_data(micro_batch, rank=0, world_size=1, vocab_size=96):
    """Yield ten steps; the first rows carry ignored labels, so micro batches differ in their valid tokens."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(STEPS):
        ids = torch.randint(vocab_size, (BATCH, SEQUENCE + 1), generator=generator)
        labels = ids[:, 1:].clone()
        labels[:3, : SEQUENCE - 5] = -100
        pairs = list(zip(ids[:, :-1].split(micro_batch), labels.split(micro_batch), strict=True))
        yield pairs[rank::world_size]


def plain_loop(run, bf16, micro_batch, clipping=0.3):
    """Train without DeepSpeed: fp32 masters, fp32 accumulation, torch's AdamW and clipping."""
    master = build_model(run.model, run.run.seed)
    model = build_model(run.model, run.run.seed, dtype=torch.bfloat16 if bf16 else torch.float32)
    optimizer = build_optimizer(parameter_groups(master, run.optimizer), run.optimizer, torch.device("cpu"))
    losses, norms = [], []
    for micro_batches in steps_of_data(micro_batch):
        tokens = sum(int((labels != -100).sum()) for _, labels in micro_batches)
        total = 0.0
        for ids, labels in micro_batches:
            nats = cross_entropy(model(ids), labels)
            (nats / tokens).backward()
            total += nats.item()
            for wide, low in zip(master.parameters(), model.parameters(), strict=True):
                wide.grad = low.grad.float() if wide.grad is None else wide.grad + low.grad.float()
                low.grad = None
        norm = torch.nn.utils.clip_grad_norm_(master.parameters(), clipping or 1e9)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for wide, low in zip(master.parameters(), model.parameters(), strict=True):
                low.copy_(wide)
        losses.append(total / tokens)
        norms.append(float(norm))
    return torch.tensor([losses, norms], dtype=torch.float64), master


def engine_loop(mesh, run, stage, bf16, micro_batch, clipping=0.3):
    """Train through the engine; return losses, norms and the final weights."""
    engine = Engine(run, deepspeed_settings(stage, bf16, micro_batch, mesh.world_size, clipping), mesh)
    results = [engine.train_step(micro_batches, run.optimizer.lr)
               for micro_batches in steps_of_data(micro_batch, mesh.rank, mesh.world_size)]
    curve = torch.tensor([[float(r.loss) for r in results], [float(r.grad_norm) for r in results]], dtype=torch.float64)
    state = capture(engine.deepspeed, run.model, keep=mesh.is_first)
    engine.close()
    return curve, state


def one_process_matrix(mesh, run):
    return {(stage, bf16, micro): engine_loop(mesh, run, stage, bf16, micro)[0]
            for bf16 in (False, True) for stage in range(int(bf16), 4) for micro in (12, 6, 3)}


def test_every_stage_equals_a_plain_torch_loop():
    """fp32 to 1e-6 and bf16 within its rounding over ten steps, clipping active, accumulation 1, 2 and 4."""
    run = tiny_run("unused")
    curves = run_distributed(one_process_matrix, 1, run)[0]
    references = {(bf16, micro): plain_loop(run, bf16, micro)[0] for bf16 in (False, True) for micro in (12, 6, 3)}
    assert references[False, 12][1].min() > 0.35, "clipping must be active or it is not tested"
    for (stage, bf16, micro), curve in curves.items():
        error = (curve - references[bf16, micro]).abs().amax(1)
        assert error.max() < (5e-4 if bf16 else 1e-6), (stage, bf16, micro, error)
    for bf16, bound in ((False, 1e-6), (True, 5e-4)):
        for micro in (6, 3):
            assert (references[bf16, micro] - references[bf16, 12]).abs().max() < bound


def clipping_pair(mesh, run):
    """Update once with and once without clipping; plain Adam would not notice a scaled gradient, its epsilon does."""
    return [engine_loop(mesh, run, stage, False, 12, clipping) for stage in (0, 1, 2, 3) for clipping in (0.0, 0.01)]


def test_clipping_really_clips():
    """Moments after clipped steps equal torch's, and differ from those without clipping."""
    run = tiny_run("unused", optimizer={"eps": 1e-3})
    results = run_distributed(clipping_pair, 1, run)[0]
    for clipping, results_of in ((0.0, results[0::2]), (0.01, results[1::2])):
        curve, master = plain_loop(run, False, 12, clipping)
        expected = master.state_dict()["0.embed_tokens.weight"]
        for ours, state in results_of:
            assert (ours - curve).abs().max() < 1e-6
            torch.testing.assert_close(state[WEIGHTS]["model.embed_tokens.weight"], expected, atol=1e-6, rtol=0)
    assert (results[0][0][0] - results[1][0][0]).abs().max() > 1e-4


def two_process_loops(mesh, run):
    return {(stage, bf16): engine_loop(mesh, run, stage, bf16, 3)
            for bf16 in (False, True) for stage in range(int(bf16), 4)}


def test_two_processes_give_the_curve_of_one():
    """Token-weighted loss and norm do not depend on data parallelism, though micro batches differ in valid tokens."""
    run = tiny_run("unused")
    results = run_distributed(two_process_loops, 2, run)
    for (stage, bf16), (curve, state) in results[0].items():
        reference, master = plain_loop(run, bf16, 3)
        assert (curve - reference).abs().max() < (5e-4 if bf16 else 1e-6), (stage, bf16)
        assert torch.equal(curve, results[1][stage, bf16][0])
        final = state[WEIGHTS]["lm_head.weight"]
        torch.testing.assert_close(final, master.state_dict()["3.lm_head.weight"], atol=2e-3 if bf16 else 2e-5, rtol=0)


def initial_states(mesh, run):
    """Return whether a fresh engine holds exactly the drawn fp32 weights, for every stage and dtype."""
    drawn = {}
    for name, tensor in build_model(run.model, run.run.seed).state_dict().items():
        drawn |= split_to_hf(name, tensor, run.model)
    same = {}
    for bf16 in (False, True):
        for stage in range(int(bf16), 4):
            engine = Engine(run, deepspeed_settings(stage, bf16, 3, mesh.world_size), mesh)
            state = capture(engine.deepspeed, run.model, keep=True)
            same[bf16, stage] = all(torch.equal(state[WEIGHTS][name], drawn[name]) for name in drawn)
            engine.close()
    return same


def test_a_run_begins_with_the_drawn_bits_in_every_dtype():
    """DeepSpeed's own masters would be rounded to bf16 first."""
    results = run_distributed(initial_states, 2, tiny_run("unused"))
    assert len(results[0]) == 7 and all(results[0].values()), results[0]


def crossed_restores(mesh, run):
    """Train five steps per stage, take the state out, put it into every stage, train five more."""
    data = list(steps_of_data(2, mesh.rank, mesh.world_size))
    found = {}
    for bf16 in (False, True):
        for source in range(int(bf16), 4):
            engine = Engine(run, deepspeed_settings(source, bf16, 2, mesh.world_size), mesh)
            for micro_batches in data[:5]:
                engine.train_step(micro_batches, 1e-3)
            state = capture(engine.deepspeed, run.model, keep=True)
            ahead = [float(engine.train_step(micro_batches, 1e-3).loss) for micro_batches in data[5:]]
            engine.close()
            for target in range(int(bf16), 4):
                engine = Engine(run, deepspeed_settings(target, bf16, 2, mesh.world_size), mesh)
                restore(engine.deepspeed, run.model, state.__getitem__, step=5)
                again = capture(engine.deepspeed, run.model, keep=True)
                same = all(torch.equal(state[kind][name], again[kind][name])
                           for kind in (WEIGHTS, *MOMENTS) for name in state[kind])
                after = [float(engine.train_step(micro_batches, 1e-3).loss) for micro_batches in data[5:]]
                engine.close()
                found[bf16, source, target] = (same, ahead, after)
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_state_moves_between_stages(world_size):
    """Weights and moments arrive bit for bit in any stage; the same stage goes on with the same losses.

    Three processes do not divide the partitions evenly: the last one is padded.
    """
    run = tiny_run("unused")
    found = run_distributed(crossed_restores, world_size, run)[0]
    assert len(found) == 16 + 9
    for (bf16, source, target), (same, ahead, after) in found.items():
        assert same, (bf16, source, target)
        if source == target:
            assert after == ahead, (bf16, source)
        else:
            bound = 5e-4 if bf16 else 2e-6
            assert max(abs(a - b) for a, b in zip(after, ahead, strict=True)) < bound, (bf16, source, target)
