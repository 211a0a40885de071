"""Worker processes: results in order, and an end within seconds whatever happens."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from contextlib import closing
from multiprocessing.connection import Connection

import pytest
from patience import patient

from megatron_ttl.data.processes import in_processes
from megatron_ttl.errors import DataError


def nap(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def die(code: int) -> int:
    if code:
        os._exit(code)
    return code


def refuse(number: int) -> int:
    raise DataError(f"{number}: is refused")


def hears_interrupts(_: int) -> bool:
    return signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_workers_are_deaf_to_interrupts_before_they_run_a_line_of_ours():
    """Else Ctrl-C while they start makes Python in them print a traceback; the parent hears as before."""
    assert [heard for _, heard in in_processes(hears_interrupts, range(4), 2, "")] == [False] * 4
    assert hears_interrupts(0)


def test_results_come_in_the_order_of_the_items_and_are_read_as_needed():
    taken = []

    def items():
        for number in range(12):
            taken.append(number)
            yield 0.1 if number == 0 else 0.0

    with closing(in_processes(nap, items(), 2, "")) as results:
        item, process = next(results)
        assert item == 0.1 and process != os.getpid() and len(taken) == 5
        assert [item for item, _ in results] == [0.0] * 11


def test_who_wants_no_more_does_not_wait_for_what_is_under_way():
    results = in_processes(nap, [0.0, 60.0, 60.0, 60.0], 2, "")
    next(results)
    started = time.monotonic()
    results.close()
    assert time.monotonic() - started < patient(5) and not multiprocessing.active_children()


def die_while_answering(number: int) -> bytes:
    threading.Timer(0.5, os._exit, (1,)).start()
    return bytes(100_000_000) if number else b""


def test_a_worker_that_dies_while_it_answers_is_not_waited_for(monkeypatch):
    """The beginning of an answer is there, and its end never comes."""
    recv = Connection.recv
    monkeypatch.setattr(Connection, "recv", lambda self: (time.sleep(1), recv(self))[1])  # the worker has died by then
    with pytest.raises(DataError, match="a worker process died"):
        list(in_processes(die_while_answering, [0, 1, 1], 2, ""))


def test_what_goes_wrong_in_a_worker_is_said():
    with pytest.raises(DataError, match="a worker process died; .*; buy memory"):
        list(in_processes(die, [0, 0, 9, 0], 2, "buy memory"))
    with pytest.raises(DataError, match="7: is refused"):
        list(in_processes(refuse, [7], 1, ""))
    assert not multiprocessing.active_children()
