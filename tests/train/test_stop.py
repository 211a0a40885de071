"""Signals set a flag and nothing else."""

from __future__ import annotations

import os
import signal

import pytest

from megatron_ttl.train.stop import StopRequest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_sets_the_flag_and_a_second_one_changes_nothing(number, capsys):
    """Twice the same signal: one message, no exception; afterwards the old handler is back."""
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.is_set
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        assert stop.is_set
        assert stop.signal_name == signal.Signals(number).name
    assert signal.getsignal(number) == before
    assert capsys.readouterr().err.count("a checkpoint will be written") == 1


def test_one_process_speaks_for_all(capsys):
    with StopRequest(speaks=False) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.is_set
    assert capsys.readouterr().err == ""
