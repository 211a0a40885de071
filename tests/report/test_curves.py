"""The numbers behind each figure, from made-up runs whose figures are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from made_runs import (
    MODEL,
    TOKENS_PER_STEP,
    evaluation_rows,
    event_row,
    loss_at,
    score_row,
    train_rows,
    write_run,
)

from megatron_ttl.errors import DataError
from megatron_ttl.evaluate.records import ScoreRecord
from megatron_ttl.plan.scaling_laws import SCALING_LAWS
from megatron_ttl.report.curves import run_figures, score_figures, smooth
from megatron_ttl.report.runs import read_runs


def figures(*folders, **options):
    return {figure.name: figure for figure in run_figures(read_runs(folders), **options)}


def scores(*rows):
    made, unplaced = score_figures(ScoreRecord.model_validate(row) for row in rows)
    return {figure.name: figure for figure in made}, unplaced


def test_a_curve_has_the_rows_of_the_run_by_their_tokens(tmp_path):
    folder = write_run(tmp_path / "a", train_rows(100, 10) + evaluation_rows(100, 50))
    found = figures(folder)
    raw, strong = found["training_loss"].series
    assert (raw.kind, list(raw.tokens)) == ("raw", [step * TOKENS_PER_STEP for step in range(10, 101, 10)])
    assert raw.values == [loss_at(tokens) for tokens in raw.tokens]
    assert (strong.label, strong.tokens) == ("a", raw.tokens)
    losses = [loss_at(tokens) + 0.1 for tokens in (50e3, 100e3)]
    assert list(found["held_out_loss"].table()) == [
        ("a: data/held", 50e3, losses[0], None), ("a: data/held", 1e5, losses[1], None)]
    assert found["held_out_perplexity"].series[0].values == pytest.approx(list(map(math.exp, losses)))
    assert set(found["learning_rate"].series[0].values) == {1e-3} and set(found["gradient_norm"].series[0].values) == {1.5}


def test_curves_of_runs_that_count_steps_differently_coincide(tmp_path):
    """Counted in micro steps, a run that accumulates twice looks half as fast: its rows lie where their tokens are."""
    twice = [{**row, "step": 2 * row["step"]} for row in train_rows(100, 10)]
    found = figures(write_run(tmp_path / "one", train_rows(100, 10)), write_run(tmp_path / "two", twice))
    _, first, _, second = found["training_loss"].series
    assert (first.tokens, first.values) == (second.tokens, second.values)
    assert first.colour != second.colour


def test_rows_may_come_in_any_order(tmp_path):
    rows = [{**row, "step": 0} for row in reversed(train_rows(100, 10))]
    found = figures(write_run(tmp_path / "a", train_rows(100, 10)), write_run(tmp_path / "b", rows))
    assert found["training_loss"].series[1].values == found["training_loss"].series[3].values


def test_the_mean_is_that_of_a_window_of_tokens_and_shrinks_at_both_ends():
    tokens, values = [0, 10, 20, 30, 40], [5.0, 1.0, 3.0, 8.0, 2.0]
    assert smooth(tokens, values, 20) == pytest.approx([5, 3, 4, 13 / 3, 2])
    assert smooth(tokens, values, 1) == values
    assert smooth([], [], 20) == []
    straight = np.linspace(4, 2, 101)  # a straight line is its own mean everywhere, or the window is not centred
    assert smooth(np.arange(101), straight, 30) == pytest.approx(straight)


def test_the_window_is_said(tmp_path):
    folder = write_run(tmp_path / "a", train_rows(100))
    assert "mean over 2,000 tokens" in figures(folder)["training_loss"].note
    assert "mean over 5,000 tokens" in figures(folder, window=5000)["training_loss"].note


def test_what_happened_is_marked(tmp_path):
    rows = [*train_rows(50), event_row("resume", 20), event_row("spike", 30), event_row("skip", 31),
            event_row("left out", 40), event_row("checkpoint", 50)]
    marks = figures(write_run(tmp_path / "a", rows))["training_loss"].marks
    assert [(mark.event, mark.tokens) for mark in marks] == [("resume", 20e3), ("spike", 30e3), ("skip", 31e3),
                                                             ("left out", 40e3)]


def test_torn_incomplete_and_repeated_rows_are_counted(tmp_path):
    rows = [*train_rows(10), {"event": "train", "step": 11}, {"event": "train", "tokens": True},
            {"tokens": 1e9, "loss": 1.0}, {"event": "train", "tokens": 10 ** 400},
            {"event": "train", "step": 12, "tokens": 12000, "loss": None},
            {"event": "train", "step": 10, "tokens": 10000, "loss": 9.0}]
    run, = read_runs([write_run(tmp_path / "a", rows, tail='not json\n[1]\n{"event": "train", "step": 13, "tok')])
    assert [warning.split(": ", 1)[1] for warning in run.warnings] == [
        "3 lines are no whole row", "4 rows lack event or tokens", "1 rows stand twice; the later ones count",
        "1 rows of training have no loss"]
    tokens, losses = run.column("loss")
    assert (len(losses), tokens[-1], losses[-1]) == (10, 10000, 9.0)


def test_held_out_losses_of_one_moment_may_stand_in_two_rows(tmp_path):
    run, = read_runs([write_run(tmp_path / "a", evaluation_rows(10, 5) + evaluation_rows(10, 5, "data/other"))])
    assert (run.measured("loss"), run.warnings) == (["data/held", "data/other"], [])
    assert run.evaluation("loss", "data/other")[0] == [5000, 10000]


@pytest.mark.parametrize("rows, reason", [
    ([], "has no row of training or evaluation; .*log.every_steps"), ([event_row("resume", 1)], "has no row of training"),
    (None, "cannot be read .*; it must be the rows of a run; give the folder that run.dir names")])
def test_a_run_with_nothing_to_show_is_a_sentence(tmp_path, rows, reason):
    folder = tmp_path / "empty"
    if rows is not None:
        write_run(folder, rows)
    with pytest.raises(DataError, match=reason):
        read_runs([folder])


def test_all_empty_runs_are_told_at_once(tmp_path):
    with pytest.raises(DataError) as caught:
        read_runs([tmp_path / "a", write_run(tmp_path / "good", train_rows(3)), tmp_path / "b"])
    assert len(caught.value.faults) == 2


def test_runs_of_one_name_are_told_apart(tmp_path):
    for place in ("x", "y"):
        write_run(tmp_path / place / "run", train_rows(3))
    places = [f"{tmp_path}/x/run", f"{tmp_path}/y/run"]
    assert [run.name for run in read_runs(places)] == places


def test_laws_are_drawn_for_the_models_size(tmp_path):
    folder = write_run(tmp_path / "a", evaluation_rows(1000, 100))
    law = SCALING_LAWS["besiroglu"]
    figure = figures(folder, laws=[law])["scaling_laws"]
    measured, predicted = figure.series
    assert measured.values == [loss_at(tokens) + 0.1 for tokens in measured.tokens]
    assert (predicted.tokens[0], predicted.tokens[-1]) == pytest.approx((1e5, 1e6))
    head_and_embedding = 2 * 2048 * 64
    per_block = 64 * (4 + 2 * 2) * 16 + 64 * 64 + 3 * 64 * 192 + 2 * 64
    assert predicted.values == [law.loss(head_and_embedding + 2 * per_block + 64, tokens) for tokens in predicted.tokens]
    assert "another tokenizer" in figure.note and "levels cannot" in figure.note
    assert "scaling_laws" not in figures(folder)


@pytest.mark.parametrize("model", [None, {}, {**MODEL, "hidden_size": -1}])
def test_a_run_of_unknown_size_has_no_prediction(tmp_path, model):
    folder = write_run(tmp_path / "a", evaluation_rows(10, 5), model=model)
    run, = read_runs([folder])
    assert "does not tell the model's size" in run.warnings[0]
    assert "scaling_laws" not in figures(folder, laws=[SCALING_LAWS["besiroglu"]])


def test_accuracy_during_training_has_bars(tmp_path):
    rows = [{"event": "evaluation", "step": step, "tokens": step * 1000, "accuracy/agreement_pt": step / 100,
             **({"accuracy_stderr/agreement_pt": 0.1} if step > 10 else {})} for step in (10, 20)]
    figure = figures(write_run(tmp_path / "a", rows))["signal_agreement_pt"]
    assert list(figure.table()) == [("a", 10000, 0.1, None), ("a", 20000, 0.2, 0.1)]


def test_accuracy_per_checkpoint_has_bars_and_baselines():
    found, unplaced = scores(score_row("r", 200, 0.30, stderr=0.02), score_row("r", 100, 0.26), score_row("r", None, 0.5))
    figure = found["score_arc_pt_acc_norm"]
    assert list(figure.table()) == [("r", 100, 0.26, 0.013), ("r", 200, 0.30, 0.02), ("baseline: random", 200, 0.25, None)]
    assert unplaced == 1
    assert "25 shots, 1,170 questions; bars: one standard error" in figure.note


@pytest.mark.parametrize("difference", [{"version": "2.0"}, {"shots": 0}, {"prompt_checksum": "xxh3:q"}, {"limit": 100},
                                        {"data_checksum": "xxh3:e"}, {"definition": "ttl-paper"}, {"sample": True}])
def test_unlike_scores_are_never_in_one_figure(difference):
    found, _ = scores(score_row("r", 100, 0.26), score_row("r", 200, 0.9, **difference))
    assert [figure.series[0].values for figure in found.values()] == [[0.26], [0.9]]
    assert list(found) == ["score_arc_pt_acc_norm", "score_arc_pt_acc_norm_2"]


def test_a_sample_says_so():
    found, _ = scores(score_row("r", 100, 0.26, sample=True, limit=50))
    note = found["score_arc_pt_acc_norm"].note
    assert "Only a sample of the real test set." in note and "Only the first 50 questions." in note
