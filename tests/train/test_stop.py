"""Signals set a flag and nothing else; but Ctrl-C for the third time, and any before the processes have met."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from megatron_ttl.train.stop import StopRequest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_sets_the_flag_and_a_second_one_changes_nothing(number, capsys):
    """Twice the same signal: one message, no exception; afterwards the old handler is back."""
    before, wake = signal.getsignal(number), signal.set_wakeup_fd(-1)
    with StopRequest() as stop:
        assert not stop.is_set
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        assert stop.is_set
        assert stop.signal_name == signal.Signals(number).name
    assert signal.getsignal(number) == before and signal.set_wakeup_fd(-1) == wake == -1
    assert capsys.readouterr().err == f"{signal.Signals(number).name}: stopping after this step; a checkpoint will be written\n"


def test_a_signal_after_the_end_is_not_the_exit_code():
    before = signal.getsignal(signal.SIGTERM)
    try:
        with StopRequest(to_the_end=True):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def test_one_process_speaks_for_all(capsys):
    with StopRequest(speaks=False) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.is_set
    assert capsys.readouterr().err == ""


# The main thread runs no Python, and so no handler, while a lock of C holds it.
WAITING = """
import ctypes, os, sys
from megatron_ttl.train.stop import StopRequest
with StopRequest(waits_for_peers=sys.argv[1] == "waits"):
    print("ready", flush=True)
    pthread, lock = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    pthread.pthread_mutex_lock(lock)
    pthread.pthread_mutex_lock(lock)
"""


@pytest.fixture()
def waiting():
    """Start a process whose main thread is held up in C."""
    started = []

    def start(mode):
        process = subprocess.Popen([sys.executable, "-c", WAITING, mode], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   text=True, cwd=os.getcwd())
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.3)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_before_the_processes_met_a_signal_ends_it_at_once(waiting, number):
    process = waiting("waits")
    process.send_signal(number)
    _, said = process.communicate(timeout=5)
    assert process.returncode == 85
    assert said == f"{number.name}: stopped before the processes met; there is nothing to keep\n"


def test_the_third_ctrl_c_ends_it_and_the_second_says_so(waiting):
    """What comes within a second is one Ctrl-C that came by two ways; SIGTERM does not count."""
    process = waiting("trains")
    for number, pause in ((signal.SIGINT, 0.2), (signal.SIGINT, 1.1), (signal.SIGTERM, 1.1), (signal.SIGTERM, 1.1),
                          (signal.SIGINT, 0.2), (signal.SIGINT, 1.1)):
        process.send_signal(number)
        time.sleep(pause)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=5)
    assert process.returncode == 130
    assert said.splitlines() == ["SIGINT: stopping after this step; a checkpoint will be written",
                                 "Ctrl-C: already stopping; a third one ends the run at once, without a checkpoint",
                                 "Ctrl-C for the third time: ended without a checkpoint"]
