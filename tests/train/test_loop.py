"""The loop as a user meets it: stopped and resumed anywhere, cut into any micro batches, on one process or two."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny_session import train_here, write_data, write_settings

from megatron_ttl.testing import run_distributed

ZERO1 = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}}
GENTLE = "optimizer.lr=1e-3"  # at 1e-2 Adam turns the rounding of near-zero gradients into visible differences
GROUPS = ("weights", "exp_avg", "exp_avg_sq", "rng")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def rows(run_dir, event="train"):
    return [row for row in map(json.loads, (Path(run_dir) / "metrics.jsonl").read_text().splitlines())
            if row["event"] == event]


def losses(run_dir):
    return [(row["step"], row["tokens"], row["loss"], row["lr"], row["grad_norm"]) for row in rows(run_dir)]


def same_tensors(first, second, step):
    for group in GROUPS:
        ours, theirs = (load_file(Path(d) / f"checkpoints/step-{step:08d}/{group}.safetensors") for d in (first, second))
        assert ours.keys() == theirs.keys()
        for name in ours:
            if not (ours[name] == theirs[name]).all():
                return False
    return True


def stop_everywhere(mesh, folder, deepspeed, run, steps, stops):
    """One uninterrupted run, and one for every k of `stops`: train k, be stopped, go on."""
    codes = [train_here(mesh, deepspeed, run, [f"run.dir={folder}/whole", f"train.steps={steps}"])]
    for k in stops:
        overrides = [f"run.dir={folder}/k{k}", f"train.steps={steps}"]
        codes.append(train_here(mesh, deepspeed, run, overrides, stop_after=k))
        codes.append(train_here(mesh, deepspeed, run, overrides))
    return codes


@pytest.mark.parametrize(("steps", "stops"), [(12, (1, 2, 7, 11)), pytest.param(40, range(1, 40), marks=pytest.mark.long)],
                         ids=["12", "40"])
@pytest.mark.parametrize("profile", [
    ZERO1,
    {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 1}, "bf16": {"enabled": True}},
    {"train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": 0}},
    {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 2}, "bf16": {"enabled": True}},
    {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 3}},
    {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 1}, "bf16": {"enabled": True}, "engine": "flat"},
], ids=lambda p: f"{p.get('engine', '')}zero{p['zero_optimization']['stage']}-{'bf16' if 'bf16' in p else 'fp32'}")
def test_stopping_at_any_step_changes_nothing(data, tmp_path, profile, steps, stops):
    """Weights, moments, random state, losses, learning rates and norms, bit for bit, for every k; in the long form all."""
    deepspeed, run = write_settings(tmp_path, data, tmp_path / "unused", profile)
    codes = run_distributed(stop_everywhere, 1, str(tmp_path), str(deepspeed), str(run), steps,
                            stops, timeout_s=400)[0]
    assert codes == [0] + [85, 0] * len(stops)
    whole = losses(tmp_path / "whole")
    assert [step for step, *_ in whole] == list(range(1, steps + 1))
    assert whole[-1][2] < whole[0][2] - 1, "it learns"
    for k in stops:
        assert losses(tmp_path / f"k{k}") == whole, k
        assert same_tensors(tmp_path / "whole", tmp_path / f"k{k}", steps), k
        record = json.loads((tmp_path / f"k{k}/checkpoints/step-{k:08d}/record.json").read_text())
        assert (record["step"], record["consumed_samples"], record["consumed_tokens"]) == (k, 8 * k, 256 * k)
        assert record["bos"] is True, "an export must greet the model as its data did"


def micro_batches(mesh, folder, deepspeed, run):
    for micro in (8, 4, 2):
        path = Path(folder) / f"m{micro}.json"
        path.write_text(json.dumps({"train_micro_batch_size_per_gpu": micro, "zero_optimization": {"stage": 1}}))
        train_here(mesh, str(path), run, [f"run.dir={folder}/m{micro}", "checkpoint.every_steps=5", GENTLE])


def test_accumulation_changes_neither_losses_nor_events(data, tmp_path):
    """Accumulation 1, 2 and 4: the same curve, and one set of events per optimizer step."""
    deepspeed, run = write_settings(tmp_path, data, tmp_path / "unused")
    run_distributed(micro_batches, 1, str(tmp_path), str(deepspeed), str(run))
    reference = losses(tmp_path / "m8")
    for micro in (8, 4, 2):
        for ours, theirs in zip(losses(tmp_path / f"m{micro}"), reference, strict=True):
            assert ours == pytest.approx(theirs, abs=2e-6)
        assert [row["step"] for row in rows(tmp_path / f"m{micro}", "checkpoint")] == [5, 10, 12]
        assert [row["step"] for row in rows(tmp_path / f"m{micro}", "evaluation")] == [6, 12]


def one_run(mesh, deepspeed, run, overrides):
    return train_here(mesh, deepspeed, run, overrides)


def test_two_processes_and_a_change_of_their_number(data, tmp_path):
    """The curve of two processes is that of one, and a run stopped on two goes on on one."""
    deepspeed, run = write_settings(tmp_path, data, tmp_path / "one")
    run_distributed(one_run, 1, str(deepspeed), str(run), [GENTLE])
    run_distributed(one_run, 2, str(deepspeed), str(run), [f"run.dir={tmp_path}/two", GENTLE])
    assert run_distributed(train_here, 2, str(deepspeed), str(run), [f"run.dir={tmp_path}/moved", GENTLE], 5) == [85, 85]
    run_distributed(one_run, 1, str(deepspeed), str(run), [f"run.dir={tmp_path}/moved", GENTLE])
    for other in ("two", "moved"):
        for ours, theirs in zip(losses(tmp_path / other), losses(tmp_path / "one"), strict=True):
            assert ours == pytest.approx(theirs, abs=5e-6)
    for other in ("two", "moved"):
        key = f"loss/{data}/held"
        assert [row[key] for row in rows(tmp_path / other, "evaluation")] == pytest.approx(
            [row[key] for row in rows(tmp_path / "one", "evaluation")], abs=5e-6)


WSD = ["schedule.kind=wsd", "schedule.decay_steps=4", "optimizer.lr=5e-3"]


def branch(mesh, folder, deepspeed, run):
    """A trunk of 12 steps with checkpoints, and a decay branched from its step 4 that ends at step 8."""
    train_here(mesh, deepspeed, run, [f"run.dir={folder}/trunk", "checkpoint.every_steps=4", *WSD])
    return train_here(mesh, deepspeed, run, [f"run.dir={folder}/branch", "train.steps=8", *WSD,
                                             f"run.start_from={folder}/trunk/checkpoints/step-00000004"])


def test_a_decay_can_be_branched_from_any_checkpoint(data, tmp_path):
    """The branch goes on at the parent's step with its data and moments, and its rate falls at once."""
    deepspeed, run = write_settings(tmp_path, data, tmp_path / "unused")
    assert run_distributed(branch, 1, str(tmp_path), str(deepspeed), str(run))[0] == 0
    trunk, branched = losses(tmp_path / "trunk"), losses(tmp_path / "branch")
    assert [step for step, *_ in branched] == [5, 6, 7, 8]
    assert branched[0][2] == trunk[4][2], "the loss of the first step is before any update of its own"
    assert branched[0][3] < trunk[4][3]
    assert branched[-1][3] == 0
