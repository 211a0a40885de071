"""Paired tests against sums written out, and against what is known to be no difference."""

from __future__ import annotations

from itertools import product
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ttl.errors import DataError
from megatron_ttl.evaluate.pack_functions import macro_f1
from megatron_ttl.evaluate.significance import mcnemar, paired_difference


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=60))
@settings(deadline=None)
def test_mcnemar_is_the_two_tails_of_a_fair_coin(pairs):
    a, b = [first for first, _ in pairs], [second for _, second in pairs]
    result = mcnemar(a, b)
    only_a = sum(first and not second for first, second in pairs)
    only_b = sum(second and not first for first, second in pairs)
    flips = only_a + only_b
    tail = sum(comb(flips, heads) for heads in range(min(only_a, only_b) + 1)) / 2**flips
    assert (result.only_a, result.only_b) == (only_a, only_b)
    assert result.p_value == pytest.approx(min(1.0, 2 * tail))
    assert mcnemar(b, a).p_value == pytest.approx(result.p_value)


def test_mcnemar_on_figures_worked_by_hand():
    a, b = [True] * 8 + [False] * 2 + [True] * 5, [False] * 8 + [True] * 2 + [True] * 5
    assert mcnemar(a, b).p_value == pytest.approx(2 * (1 + 10 + 45) / 1024)


def test_models_of_different_items_are_not_compared():
    with pytest.raises(DataError, match="one model has 2 items and the other 3"):
        mcnemar([True, False], [True, False, True])
    with pytest.raises(DataError, match="one model has 1 items and the other 1; both must .* two or more"):
        paired_difference([1.0], [0.0])


def test_exchanged_answers_are_all_exchanges_where_they_are_few():
    a, b = [0.9, 0.4, 0.8, 0.7, 0.1, 0.6], [0.2, 0.5, 0.1, 0.3, 0.2, 0.1]
    found = paired_difference(a, b)
    gaps = np.subtract(a, b)
    every = np.array([np.mean(gaps * signs) for signs in product((1, -1), repeat=6)])
    one_side = min(np.mean(every >= gaps.mean() - 1e-12), np.mean(every <= gaps.mean() + 1e-12))
    assert found.p_value == pytest.approx(2 * one_side) and found.difference == pytest.approx(gaps.mean())
    assert found.low < found.difference < found.high
    turned = paired_difference(b, a)
    assert (turned.p_value, turned.difference) == pytest.approx((found.p_value, -found.difference))


def test_pairs_tell_apart_what_their_spread_would_hide():
    draw = np.random.default_rng(1)
    hard = draw.normal(size=300)
    better = hard + 0.05 + draw.normal(size=300) * 0.05
    found = paired_difference(better.tolist(), hard.tolist())
    assert found.p_value < 0.01 and 0.03 < found.low < found.high < 0.07
    assert found == paired_difference(better.tolist(), hard.tolist()), "the draws are seeded"
    half = 1.96 * np.std(better - hard, ddof=1) / 300**0.5
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)
    alike = paired_difference(hard.tolist(), hard.tolist())
    assert (alike.difference, alike.low, alike.high, alike.p_value) == (0, 0, 0, 1)


def test_scores_that_are_no_means():
    draw = np.random.default_rng(2)
    gold = draw.integers(2, size=120).tolist()
    good = [(label, label if draw.random() < 0.9 else 1 - label) for label in gold]
    bad = [(label, label if draw.random() < 0.5 else 1 - label) for label in gold]
    found = paired_difference(good, bad, macro_f1, resamples=199)
    assert found.difference == pytest.approx(macro_f1(good) - macro_f1(bad)) and found.p_value == 2 / 200
    other = [(label, label if draw.random() < 0.9 else 1 - label) for label in gold]
    assert paired_difference(good, other, macro_f1, resamples=199).p_value > 0.1
