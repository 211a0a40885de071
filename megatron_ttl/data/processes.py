"""Let worker processes do a piece of work for each of many items, and give the results in the order of the items."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

from megatron_ttl.errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_processes(function: Callable[[Item], Result], items: Iterable[Item], workers: int,
                 cure: str) -> Iterator[tuple[Item, Result]]:
    """Yield every item with `function(item)`, in order; close the iterator to end the workers, whatever they are at.

    Args:
        function: of a module's top level, perhaps with arguments bound by `functools.partial`: it is sent to workers.
        items: read as the work goes on, never more than two per worker ahead.
        workers: processes.
        cure: what a user can do when a worker died.

    Raises:
        DataError: a worker died; what `function` raises is raised as it is.
    """
    crew = _Crew(function)
    threads = ThreadPoolExecutor(2 * workers, thread_name_prefix="worker")
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    try:
        for item in items:
            if len(crew.processes) < workers:
                crew.hire()
            waiting.append((item, threads.submit(crew.do, item)))
            if len(waiting) > 2 * workers:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()
    except _WorkerDiedError:
        crew.kill()  # one that was hired meanwhile, too
        raise DataError(f"a worker process died; the system may have stopped it for want of memory; {cure}") from None
    except BaseException:  # Ctrl-C, or nobody wants the rest: an item may take minutes
        crew.kill()
        raise
    finally:
        threads.shutdown(cancel_futures=True)
        crew.dismiss()


class _WorkerDiedError(Exception):
    """It will not answer any more."""


class _Worker:
    """A process and what it was asked; it answers in the order in which it was asked."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        # Spawned and not forked: the parent may have threads.
        context = multiprocessing.get_context("spawn")
        self.connection, there = context.Pipe()
        self.process = context.Process(target=_work, args=(function, there), daemon=True)
        with _deaf_children():
            self.process.start()
        there.close()
        self.asked = self.answered = 0
        self._asking, self._turn = threading.Lock(), threading.Condition()

    def ask(self, item: Any) -> tuple[bool, Any]:
        """Hand over an item, and wait for its answer.

        Raises:
            EOFError, OSError: the process has died.
        """
        fault = None
        with self._asking:
            number = self.asked
            self.asked += 1
            try:
                self.connection.send(item)
            except Exception as error:  # its turn must pass all the same, or those behind it would wait for ever
                fault = error
        with self._turn:
            self._turn.wait_for(lambda: self.answered == number)
            try:
                if fault is not None:
                    raise fault
                return self.connection.recv()
            finally:
                self.answered += 1
                self._turn.notify_all()


class _Crew(Generic[Item, Result]):
    """Processes, each with a connection of its own.

    A multiprocessing.Pool waits for ever for the answer of a killed worker, and a ProcessPoolExecutor for the rest of an
    answer whose worker was killed while it wrote, because all share one pipe. Here nobody but the worker holds the other end.
    """

    def __init__(self, function: Callable[[Item], Result]) -> None:
        self._function = function
        self._choosing = threading.Lock()
        self._given: dict[_Worker, int] = {}
        self.processes: list[_Worker] = []

    def hire(self) -> None:
        """Start a process."""
        worker = _Worker(self._function)
        with self._choosing:
            self._given[worker] = 0
        self.processes.append(worker)

    def do(self, item: Item) -> Result:
        """Let the process with the least to do do it; called by twice as many threads, so that none is ever without work."""
        with self._choosing:
            worker = min(self._given, key=self._given.__getitem__)
            self._given[worker] += 1
        try:
            done, answer = worker.ask(item)
        except (EOFError, OSError):
            self.kill()  # or the others would work on before anybody hears of it
            raise _WorkerDiedError from None
        finally:
            with self._choosing:
                self._given[worker] -= 1
        if not done:
            raise answer
        return answer

    def kill(self) -> None:
        """End all, whatever they are at."""
        for worker in self.processes:
            worker.process.kill()

    def dismiss(self) -> None:
        """Let those that live come to their end."""
        for worker in self.processes:
            worker.connection.close()
        for worker in self.processes:
            worker.process.join()


@contextmanager
def _deaf_children() -> Iterator[None]:
    """Leave Ctrl-C to this process: one that begins inside never hears it, not even while Python starts in it.

    A terminal sends it to all. A process that inherits the blocked signal needs no chance to say that it ignores it.
    """
    resource_tracker.ensure_running()  # started later, inside, it would unblock the signal behind itself
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(function: Callable[[Any], Any], connection: Connection) -> None:
    """Answer until the other end is closed; end at once when the parent does."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave_with_parent() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()
    while True:
        try:
            item = connection.recv()
        except EOFError:
            return
        try:
            answer = (True, function(item))
        except Exception as error:
            answer = (False, error)
        connection.send(answer)
