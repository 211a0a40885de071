"""Signal tasks and samples during training: the same in every layout, and nothing of the training is touched."""

from __future__ import annotations

import json
import math

import pytest
from test_loop import GENTLE, losses, rows, same_tensors
from tiny_session import train_here, write_data, write_settings

from megatron_ttl.errors import DataError
from megatron_ttl.evaluate.answer import ModelAnswerer
from megatron_ttl.evaluate.open_run import open_checkpoint_model
from megatron_ttl.evaluate.signals import read_signal_tasks
from megatron_ttl.evaluate.task import Request
from megatron_ttl.testing import run_distributed

PROMPTS = ["o menino", ""]
ASKED = [f"evaluation.samples={json.dumps(PROMPTS)}", "evaluation.sample_tokens=9", "evaluation.task_items=7",
         'evaluation.tasks=["agreement_pt", "cloze_pt"]', "model.max_position_embeddings=44"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def profile(stage=1, micro_batch=2, **changes):
    return {"train_micro_batch_size_per_gpu": micro_batch, "zero_optimization": {"stage": stage}, **changes}


def samples(run_dir):
    return [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]


def train_settings(mesh, calls):
    """Call `train_here` for each; in one process group."""
    return [train_here(mesh, *call) for call in calls]


def train_all(folder, data, run_dir, processes, *overrides, **changes):
    deepspeed, run = write_settings(folder, data, run_dir, profile(**changes))
    codes = run_distributed(train_settings, processes, [(str(deepspeed), str(run), [GENTLE, *more], stop)
                                                       for more, stop in overrides])
    return codes[0]


@pytest.fixture(scope="module")
def one(data, tmp_path_factory):
    """One process: asked everything, asked nothing, and asked everything with a stop after the first evaluation."""
    folder = tmp_path_factory.mktemp("one")
    stopped = f"run.dir={folder}/stopped"
    assert train_all(folder, data, folder / "asked", 1, (ASKED, None),
                     (["evaluation.every_steps=100", ASKED[-1], f"run.dir={folder}/silent"], None),
                     ([*ASKED, stopped], 7), ([*ASKED, stopped], None)) == [0, 0, 85, 0]
    return folder


def test_figures_of_every_evaluation(one):
    found = rows(one / "asked", "evaluation")
    assert [row["step"] for row in found] == [6, 12]
    for row in found:
        for task in ("agreement_pt", "cloze_pt"):
            share = row[f"accuracy/{task}"]
            assert share * 7 == pytest.approx(round(share * 7)) and 0 <= share <= 1
            assert row[f"accuracy_stderr/{task}"] == pytest.approx(math.sqrt(share * (1 - share) / 6))
        assert row["target_perplexity/cloze_pt"] > 1
    assert found[0]["target_perplexity/cloze_pt"] != found[1]["target_perplexity/cloze_pt"], "it learns"


def test_samples_are_kept(one):
    found = samples(one / "asked")
    assert [(row["step"], row["prompt"], row["sampling"]["temperature"]) for row in found] == [
        (step, prompt, temperature) for step in (6, 12) for temperature in (0.0, 1.0) for prompt in PROMPTS]
    assert all(1 <= row["new_tokens"] <= 9 and row["ended"] in ("eos", "length") for row in found)
    assert all(row["ended"] == "eos" or row["new_tokens"] == 9 for row in found)


def test_asking_changes_nothing_of_the_training(one):
    assert losses(one / "asked") == losses(one / "silent")
    assert same_tensors(one / "asked", one / "silent", 12), "weights, moments, random state"


def test_a_resumed_run_says_the_same(one):
    assert samples(one / "stopped") == samples(one / "asked")
    assert losses(one / "stopped") == losses(one / "asked")
    for ours, theirs in zip(rows(one / "stopped", "evaluation"), rows(one / "asked", "evaluation"), strict=True):
        assert {**ours, "time": 0} == {**theirs, "time": 0}


def test_a_checkpoint_is_judged_as_the_run_judged_itself(one):
    """The accuracies of `tools/evaluate.py`'s own scoring of the last checkpoint."""
    row = rows(one / "asked", "evaluation")[-1]
    answerer = ModelAnswerer(open_checkpoint_model(one / "asked", device="cpu"))
    for task in read_signal_tasks(["agreement_pt", "cloze_pt"], limit=7):
        right, nats = [], []
        for number, item in enumerate(task.items):
            found = answerer.loglikelihood([Request(item.context, text, number) for text in item.continuations])
            nats.append(-found[0][0])
            likelihoods = [likelihood for likelihood, _ in found]
            right.append(found[0][1] if item.answer is None else likelihoods.index(max(likelihoods)) == item.answer)
        assert row[f"accuracy/{task.name}"] == sum(right) / 7
        if not task.has_choices:
            assert row[f"target_perplexity/{task.name}"] == pytest.approx(math.exp(sum(nats) / 7), rel=1e-5)
    assert answerer.truncated, "some context must be too long for 44 positions"


@pytest.mark.parametrize(("processes", "changes"), [
    (2, {"stage": 3}), (4, {"parallel": {"tensor": 2, "pipeline": 2, "sequence": True}}),
    pytest.param(2, {"parallel": {"tensor": 2}, "stage": 2, "micro_batch": 4}, marks=pytest.mark.long),
    pytest.param(2, {"parallel": {"pipeline": 2}, "stage": 0}, marks=pytest.mark.long),
    pytest.param(4, {"parallel": {"tensor": 2}, "stage": 3}, marks=pytest.mark.long)],
    ids=["zero3", "both", "tensor", "pipeline", "tensor-zero3"])
def test_every_layout_answers_alike(data, tmp_path, one, processes, changes):
    assert train_all(tmp_path, data, tmp_path / "run", processes, (ASKED, None), **changes) == [0]
    for ours, theirs in zip(rows(tmp_path / "run", "evaluation"), rows(one / "asked", "evaluation"), strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours:
            if key.startswith("accuracy"):
                assert ours[key] == theirs[key], key
            elif "/" in key:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key
    assert samples(tmp_path / "run") == samples(one / "asked")


def stopped_while_asked(mesh, deepspeed, run):
    """SIGTERM arrives on the last rank in the middle of the tasks; where do the others end?"""
    import os
    import signal

    from megatron_ttl.train.engine import Engine

    real, calls = Engine.row_scores, []

    def scores(engine, input_ids, labels):
        calls.append(len(input_ids))
        if mesh.rank == mesh.world_size - 1 and len(input_ids) == 1:  # not the held-out windows, which come in twos
            os.kill(os.getpid(), signal.SIGTERM)
        return real(engine, input_ids, labels)

    Engine.row_scores = scores
    try:
        return train_here(mesh, deepspeed, run, [*ASKED[:2], *ASKED[3:], "evaluation.task_items=3", "evaluation.prefixes=[]"]), len(calls)
    finally:
        Engine.row_scores = real


def test_a_request_to_stop_cuts_the_evaluation_short(data, tmp_path):
    """Three items of two choices on two processes, two rows at once each: the second pass is the one of one row.

    It ends the first task, whose figures are kept; the second one is not begun.
    """
    deepspeed, run = write_settings(tmp_path, data, tmp_path / "run", profile())
    assert run_distributed(stopped_while_asked, 2, str(deepspeed), str(run)) == [(85, 2)] * 2
    row, = rows(tmp_path / "run", "evaluation")
    assert [key for key in row if "/" in key] == ["accuracy/agreement_pt", "accuracy_stderr/agreement_pt"]
    assert not samples(tmp_path / "run")
    assert (tmp_path / "run/checkpoints/step-00000007").is_dir(), "one more step, then a checkpoint"


@pytest.mark.parametrize(("override", "fault"), [
    (f'evaluation.samples=["{"o rio " * 15}"]',
     r"evaluation.samples\[0\]: has \d+ tokens; with 9 new ones it must fit into train.sequence_length, 32; shorten it to 23"),
    ('evaluation.tasks=["agreement"]', "agreement: is no signal task; it must be one of agreement_pt, .* did you mean"),
    ('evaluation.tasks=["none.jsonl"]', "none.jsonl: cannot be read .No such file or directory.; it must be a file of items")])
def test_what_cannot_be_asked_is_refused_before_anything_is_built(data, tmp_path, override, fault):
    from megatron_ttl.config.load import load_settings
    from megatron_ttl.train.open_data import open_data
    from megatron_ttl.train.open_signals import open_signals

    deepspeed, run = write_settings(tmp_path, data, tmp_path / "run")
    key = override.partition("=")[0]
    run = load_settings(deepspeed, run, [*(one for one in ASKED if not one.startswith(f"{key}=")), override]).run
    with pytest.raises(DataError, match=fault):
        open_signals(run, open_data(run)[0])
