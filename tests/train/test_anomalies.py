"""Steps without a finite gradient under every stage and layout, and losses that jump."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from layout_runs import Case, deepspeed_settings, joined, run_of, steps_of_data
from tiny_folder import documents, write_dataset, write_tokenizer

from megatron_ttl.checkpoint.state import capture
from megatron_ttl.data.causal_lm_dataset import CausalLMDataset
from megatron_ttl.testing import run_distributed
from megatron_ttl.train.anomalies import DivergedError, NonFiniteSteps, SpikeDetector
from megatron_ttl.train.engine import Engine

CASES = [Case(stage=stage) for stage in range(4)]
CASES += [Case(stage=stage, precision="bf16") for stage in (1, 2, 3)]
CASES += [Case(stage=stage, offload=True) for stage in (1, 2, 3)]
CASES += [Case(engine="flat"), Case(engine="flat", precision="bf16")]
SHARED = [Case(data=2, stage=stage) for stage in range(4)]
SHARED += [Case(tensor=2, stage=0), Case(tensor=2), Case(tensor=2, sequence=True, precision="bf16"), Case(pipeline=2),
           Case(pipeline=2, stage=0), Case(pipeline=2, precision="bf16")]


def with_a_bad_step(mesh, cases, value):
    """Train three steps, one whose loss one rank alone multiplies by `value`, and one more; return what was there."""
    found = {}
    for case in cases:
        run, cut = run_of(case), mesh.cut(case.tensor, case.pipeline, case.sequence)
        engine = Engine(run, deepspeed_settings(case), cut, options=case.options)
        data = list(steps_of_data(run.model.vocab_size, case.micro_batch, cut.data_parallel_rank, cut.data_parallel_size))
        results = [engine.train_step(micro_batches, 1e-2) for micro_batches in data[:3]]
        before = capture(engine.state, run.model, cut)
        owner, name = (engine.module, "loss_fn") if case.pipeline > 1 else (engine, "_scaled_loss")
        real = getattr(owner, name)
        setattr(owner, name, lambda *rest, real=real: real(*rest) * (value if mesh.rank == mesh.world_size - 1 else 1.0))
        results.append(engine.train_step(data[3], 1e-2))
        setattr(owner, name, real)
        after = capture(engine.state, run.model, cut)
        results.append(engine.train_step(data[4], 1e-2))
        found[case] = ([(float(r.loss), float(r.grad_norm), bool(r.skipped)) for r in results], before, after,
                       capture(engine.state, run.model, cut))
        engine.close()
    return found


def without_it(mesh, cases):
    """Train the same steps without the bad one; return the final state."""
    found = {}
    for case in cases:
        run, cut = run_of(case), mesh.cut(case.tensor, case.pipeline, case.sequence)
        engine = Engine(run, deepspeed_settings(case), cut, options=case.options)
        data = list(steps_of_data(run.model.vocab_size, case.micro_batch, cut.data_parallel_rank, cut.data_parallel_size))
        for number in (0, 1, 2, 4):
            engine.train_step(data[number], 1e-2)
        found[case] = capture(engine.state, run.model, cut)
        engine.close()
    return found


@pytest.mark.parametrize(("processes", "cases", "value"), [
    (1, CASES, math.nan), (2, SHARED, math.nan), (2, [Case(tensor=2), Case(pipeline=2), Case(data=2, stage=0)], math.inf)])
def test_a_gradient_that_is_not_finite_moves_nothing_anywhere(processes, cases, value):
    """Weights and moments stay bit for bit, on all ranks, and the run goes on as if the step had not been."""
    results = run_distributed(with_a_bad_step, processes, cases, value)
    references = run_distributed(without_it, processes, cases)
    for case in cases:
        rows = [by_case[case][0] for by_case in results]
        for steps in rows:
            assert [skipped for _, _, skipped in steps] == [False, False, False, True, False], (case, steps)
            assert not math.isfinite(steps[3][1]) and math.isfinite(steps[4][0]), (case, steps)
        before, after, end = (joined([by_case[case][part] for by_case in results]) for part in (1, 2, 3))
        expected = joined([by_case[case] for by_case in references])
        for group, tensors in before.items():
            for name, tensor in tensors.items():
                assert torch.equal(tensor, after[group][name]), (case, group, name)
                assert torch.equal(end[group][name], expected[group][name]), (case, group, name)


def test_so_many_in_a_row_and_the_run_ends():
    """The message names the last checkpoint before them, and how to leave them out."""
    count = NonFiniteSteps(3)
    assert count.count(7, False, [4]) is None
    for step in (8, 9):
        assert f"step {step}: the gradient is not finite; no weight was moved ({step - 7} in a row" in \
            count.count(step, True, [4, 8])
    assert count.count(10, False, []) is None
    count.count(11, True, [4, 10, 11])
    count.count(12, True, [4, 10, 11])
    with pytest.raises(DivergedError, match="step 13: the gradient is not finite, 3 times in a row; .*go on from step 10 "
                                            ".*--skip-steps 11-13"):
        count.count(13, True, [4, 10, 11, 12])


def curve(steps, seed=0):
    """A loss as of a small model: falling, with noise."""
    draw = random.Random(seed)
    return [3 + 6 * math.exp(-step / 150) + draw.gauss(0, 0.03) for step in range(steps)]


def found_in(losses, sigmas=6.0, every=10):
    detector, found = SpikeDetector(sigmas), []
    for step, loss in enumerate(losses):
        detector.observe(step, torch.tensor(loss, dtype=torch.float64), torch.tensor(2.0))
        if step % every == every - 1:
            found += detector.examine()
    return found


def test_twenty_planted_spikes_are_found_and_nothing_else():
    losses = curve(3000)
    planted = sorted(random.Random(1).sample(range(200, 3000), 20))
    for step in planted:
        losses[step] += 0.8
    found = found_in(losses)
    assert [spike.step for spike in found] == planted
    assert all(spike.grad_norm == 2.0 and spike.sigmas > 6 and spike.loss > spike.expected for spike in found)
    assert found_in(curve(3000, seed=3)) == [] and found_in(losses, sigmas=None) == []


def test_a_new_level_and_a_loss_without_noise_are_no_endless_spikes():
    losses = curve(600) + [7 + x for x in curve(600, seed=2)[300:]]
    found = found_in(losses)
    assert 1 <= len(found) <= 20 and found[0].step == 600
    assert found_in([2.0 + 1e-4 * (step % 2) for step in range(400)] + [2.01] * 3) == []


def test_a_resumed_detector_judges_as_the_first():
    losses = curve(400)
    losses[250] += 1.0
    whole, part = SpikeDetector(6.0), SpikeDetector(6.0)
    for step, loss in enumerate(losses[:200]):
        for detector in (whole, part):
            detector.observe(step, torch.tensor(loss), 1.0)
    whole.examine()
    part.examine()
    resumed = SpikeDetector(6.0)
    resumed.load(part.state())
    for step, loss in enumerate(losses[200:], 200):
        for detector in (whole, resumed):
            detector.observe(step, torch.tensor(loss), 1.0)
    found = resumed.examine()
    assert found == whole.examine() and [spike.step for spike in found] == [250]
    assert resumed.state() == whole.state()


def test_documents_of_samples_are_those_that_were_read(tmp_path):
    """Against looking each token up by hand; two sources, windows that cross documents and ends of epochs."""
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    for name, count in (("a", 40), ("b", 12)):
        write_dataset(tmp_path / name, tokenizer, documents(count, seed=len(name) + count))
    dataset = CausalLMDataset([(str(tmp_path / "a"), 0.6), (str(tmp_path / "b"), 0.4)], 24, seed=3)
    numbers = range(5, 5 + 2 * sum(dataset.samples_per_epoch))
    for chosen in (numbers, range(9, 10), range(30, 33)):
        expected = {}
        for number in chosen:
            source, _, window = dataset.locate(number)
            tokens = dataset.datasets[source]
            owner = np.repeat(np.arange(tokens.document_count), np.diff(tokens.document_ends(), prepend=0))
            expected.setdefault(tokens.prefix, set()).update(owner[window * 24 : window * 24 + 25].tolist())
        found = dataset.documents(chosen)
        assert {prefix: {d for first, last in ranges for d in range(first, last + 1)} for prefix, ranges in found.items()} \
            == expected
        assert all(a[1] + 1 < b[0] for ranges in found.values() for a, b in zip(ranges, ranges[1:], strict=False))
