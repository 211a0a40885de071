"""Paired tests against sums written out, and against what is known to be no difference."""

from __future__ import annotations

from math import comb

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ttl.errors import DataError
from megatron_ttl.evaluate.significance import mcnemar


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
