"""Let worker processes do a piece of work for each of many items, and give the results in the order of the items."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection, wait
from typing import TypeVar

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
    # An executor and not a multiprocessing.Pool, which waits for ever for the answer of a killed worker.
    # Spawned and not forked: the parent may have threads.
    context = multiprocessing.get_context("spawn")
    held_by_workers, held_here = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, context, initializer=_begin_worker, initargs=(held_by_workers,))
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(function, item)))
            if len(waiting) > 2 * workers:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()
    except BrokenProcessPool:
        raise DataError(f"a worker process died; the system may have stopped it for want of memory; {cure}") from None
    except BaseException:  # Ctrl-C, or nobody wants the rest: an item may take minutes
        held_here.close()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        held_here.close()
        held_by_workers.close()


def _begin_worker(held: Connection) -> None:
    """Leave Ctrl-C to the parent, and end when it does or lets go of the other end of `held`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave_with_parent() -> None:
        wait([held, parent.sentinel])
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()
