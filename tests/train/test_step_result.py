"""Outcomes that come late: read one step behind, in order, once each, and all of them before anything is kept."""

from __future__ import annotations

import pytest
import torch

from megatron_ttl.train.step_result import DelayedFlag, RunAhead


class Late:
    """A flag as a device gives it: asking for it is noted."""

    def __init__(self, name, value, asked):
        self.name, self.value, self.asked = name, value, asked

    def __bool__(self):
        self.asked.append(self.name)
        return self.value


def test_a_late_outcome_is_asked_for_after_the_next_step_was_launched():
    """Never more than one step ahead, and never before the next one is on its way."""
    asked, dealt = [], []
    ahead = RunAhead(lambda step, skipped: dealt.append((step, skipped)))
    for step in range(1, 5):
        ahead.launched(step, Late(step, step == 2, asked))
        assert asked == list(range(1, step)), "the step just launched must not be waited for"
    assert dealt == [(1, False), (2, True), (3, False)]
    ahead.drain()
    ahead.drain()
    assert dealt[3:] == [(4, False)] and asked == [1, 2, 3, 4]


def test_known_outcomes_are_dealt_with_at_once_and_in_order():
    asked, dealt = [], []
    ahead = RunAhead(lambda step, skipped: dealt.append((step, skipped)))
    ahead.launched(1, Late(1, True, asked))
    assert dealt == []
    ahead.launched(2, False)
    assert dealt == [(1, True), (2, False)] and asked == [1]
    ahead.launched(3, True)
    assert dealt[2:] == [(3, True)]


def test_a_fault_names_its_own_step_and_is_raised_once():
    def deal_with(step, skipped):
        if skipped:
            raise ValueError(f"step {step}")

    ahead = RunAhead(deal_with)
    ahead.launched(6, Late(6, True, []))
    with pytest.raises(ValueError, match="step 6"):
        ahead.launched(7, Late(7, False, []))
    ahead.drain()


def test_a_flag_is_that_of_its_own_step():
    """The next step writes into the same tensor before anybody has read it."""
    flag = torch.zeros((), dtype=torch.bool)
    first = DelayedFlag(flag)
    flag.fill_(True)
    assert not bool(first) and bool(DelayedFlag(flag))
