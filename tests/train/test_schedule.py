"""The learning rate against the papers' values and against closed forms."""

from __future__ import annotations

import math

import pytest

from megatron_ttl.testing import tiny_run
from megatron_ttl.train.schedule import Schedule


def cosine(peak, minimum, warmup, total):
    return Schedule("cosine", peak, minimum, warmup, 0, total)


@pytest.mark.parametrize(("schedule", "values"), [
    (cosine(6e-4, 0, 5_000, 458_000), {2_500: 3e-4, 5_000: 6e-4, 231_500: 3e-4, 458_000: 0}),
    (cosine(4e-4, 4e-5, 2_000, 1_430_512), {2_000: 4e-4, 716_256: 2.2e-4, 1_430_512: 4e-5}),
], ids=["ttl-160m", "tinyllama"])
def test_published_learning_rates(schedule, values):
    """Every listed step of both papers."""
    for step, lr in values.items():
        assert schedule.at(step) == pytest.approx(lr, rel=1e-12, abs=1e-18)


def test_cosine_equals_its_closed_form_everywhere():
    """One hundred points of a whole run, none above the peak, the last at the minimum."""
    schedule = cosine(1e-3, 1e-4, 100, 1_000)
    for step in range(0, 1_001, 9):  # 99 is the last step of the warm-up
        expected = 1e-3 * step / 100 if step < 100 else 5.5e-4 + 4.5e-4 * math.cos(math.pi * (step - 100) / 900)
        assert schedule.at(step) == pytest.approx(expected, rel=1e-12)
    assert max(schedule.at(step) for step in range(1_001)) == 1e-3


@pytest.mark.parametrize(("shape", "halfway"), [("linear", 0.5), ("sqrt", 1 - math.sqrt(0.5))])
def test_wsd_is_flat_and_then_decays(shape, halfway):
    """Warm-up, the peak until the decay begins, and the minimum at the end."""
    schedule = Schedule("wsd", 1.0e-3, 0.0, 10, 40, 200, shape)
    assert schedule.at(5) == pytest.approx(5e-4)
    assert {schedule.at(step) for step in range(10, 161)} == {1e-3}
    assert schedule.at(180) == pytest.approx(1e-3 * halfway)
    assert schedule.at(200) == 0
    assert all(schedule.at(step + 1) < schedule.at(step) for step in range(160, 200))


def test_a_wsd_branch_goes_on_where_the_trunk_was():
    """A longer trunk and a branch that decays at step 100 agree on every step before it."""
    trunk = Schedule("wsd", 1e-3, 0.0, 10, 50, 1_000)
    branch = Schedule("wsd", 1e-3, 0.0, 10, 50, 150)
    assert [trunk.at(step) for step in range(101)] == [branch.at(step) for step in range(101)]
    assert branch.at(101) < trunk.at(101) == 1e-3


def test_constant_after_warm_up_and_no_warm_up_at_all():
    """The simplest kind; warm-up may be zero."""
    assert [Schedule("constant", 2e-4, 0, 4, 0, 9).at(step) for step in (0, 1, 4, 9)] == [0, 5e-5, 2e-4, 2e-4]
    assert Schedule("constant", 2e-4, 0, 0, 0, 9).at(1) == 2e-4


def test_lengths_in_tokens_mean_the_same():
    """steps and tokens describe one schedule."""
    steps = tiny_run("x", train={"steps": 100}, schedule={"kind": "wsd", "warmup_steps": 10, "decay_steps": 20})
    tokens = tiny_run("x", train={"steps": None, "tokens": 25_600},
                      schedule={"kind": "wsd", "warmup_steps": None, "warmup_tokens": 2_560, "decay_tokens": 5_120})
    assert Schedule.of(steps) == Schedule.of(tokens)
    assert Schedule.of(tokens).total_steps == 100
