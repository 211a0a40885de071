"""Deal the samples of each optimizer step to ranks and micro batches, and read them ahead in the background.

Step t consists of S samples from position p on, for every layout the same ones. Micro batch m of rank r takes
the b samples from p + (m * world_size + r) * b on. The position is the number of samples consumed: one
integer is all that is needed to go on, on any number of ranks.
"""

from __future__ import annotations

import queue
import threading
import time
import weakref
from types import TracebackType
from typing import Protocol

import numpy as np
import torch

from megatron_ttl.errors import ConfigError

MicroBatch = tuple[torch.Tensor, torch.Tensor]


class SampleSource(Protocol):
    """What samples are taken from: a `CausalLMDataset`."""

    def samples(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (input_ids, labels), int64.  # [len(numbers), s] both"""


def step_sample_ids(position: int, samples_per_step: int, micro_batch: int, rank: int,
                    world_size: int) -> np.ndarray:
    """Return the samples that `rank` takes in the step that begins at `position`.  # [accumulation, b]"""
    accumulation = samples_per_step // (micro_batch * world_size)
    first = position + (np.arange(accumulation, dtype=np.int64) * world_size + rank) * micro_batch
    return first[:, None] + np.arange(micro_batch, dtype=np.int64)


class StepBatches:
    """Iterate over optimizer steps without end: lists of (input_ids, labels), one pair per micro batch.

    A thread reads at most `prefetch` steps ahead. What goes wrong there is raised from `next()`. Close it, or
    use it as a context manager; it also stops when it is forgotten and when the program ends.

    Args:
        dataset: where the samples come from.
        samples_per_step: S, over all ranks.
        micro_batch: b.
        rank: data-parallel rank.
        world_size: number of data-parallel ranks.
        consumed_samples: position to begin at: what earlier steps consumed, over all ranks.
        prefetch: steps that may wait, ready.
        pin_memory: put the tensors in page-locked memory, for copies to a GPU that do not wait.

    Attributes:
        consumed_samples: position after the last step that was handed out.
        wait_s: how long the last `next()` waited for data.

    Raises:
        ConfigError: samples_per_step is no multiple of micro_batch * world_size.
    """

    def __init__(self, dataset: SampleSource, samples_per_step: int, micro_batch: int, rank: int,
                 world_size: int, consumed_samples: int, prefetch: int = 2, pin_memory: bool = False) -> None:
        assert 0 <= rank < world_size and consumed_samples >= 0 and prefetch >= 1
        together = micro_batch * world_size
        if samples_per_step % together:
            below = samples_per_step // together * together
            nearest = f"{below} or {below + together}" if below else str(together)
            raise ConfigError(
                f"samples per step: {samples_per_step} cannot be dealt to {world_size} ranks in micro "
                f"batches of {micro_batch}; they must be a multiple of {together}; take {nearest}, "
                "or another micro batch"
            )
        self.consumed_samples = consumed_samples
        self.wait_s = 0.0
        self._samples_per_step = samples_per_step
        self._error: BaseException | None = None
        self._queue: queue.Queue[list[MicroBatch] | BaseException] = queue.Queue(maxsize=prefetch)
        self._stop = threading.Event()
        # The thread must not know this object, or it would never be forgotten.
        layout = (samples_per_step, micro_batch, rank, world_size)
        self._thread = threading.Thread(
            target=_read_ahead, args=(dataset, consumed_samples, layout, pin_memory, self._queue, self._stop),
            name="data-prefetch", daemon=True,
        )
        self._finalizer = weakref.finalize(self, _shut_down, self._stop, self._queue, self._thread)
        self._thread.start()

    def __iter__(self) -> StepBatches:
        return self

    def __next__(self) -> list[MicroBatch]:
        """Return the micro batches of the next step: int64 tensors.  # [b, s] each"""
        if self._error is not None:
            raise self._error
        if not self._finalizer.alive:
            raise StopIteration
        started = time.perf_counter()
        item = self._queue.get()
        self.wait_s = time.perf_counter() - started
        if isinstance(item, BaseException):
            self._error = item
            self.close()
            raise item
        self.consumed_samples += self._samples_per_step
        return item

    def close(self) -> None:
        """Stop reading ahead and wait for the thread to end. May be called twice."""
        self._finalizer()

    def __enter__(self) -> StepBatches:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()


def _read_ahead(dataset: SampleSource, position: int, layout: tuple[int, int, int, int], pin_memory: bool,
                ready: queue.Queue[list[MicroBatch] | BaseException], stop: threading.Event) -> None:
    try:
        while not stop.is_set():
            ids = step_sample_ids(position, *layout)
            input_ids, labels = (torch.from_numpy(part) for part in dataset.samples(ids.ravel()))
            if pin_memory:
                input_ids, labels = input_ids.pin_memory(), labels.pin_memory()
            micro_batch = layout[1]
            _put(ready, list(zip(input_ids.split(micro_batch), labels.split(micro_batch), strict=True)), stop)
            position += layout[0]
    except BaseException as error:  # noqa: BLE001: it is raised where the data is used
        _put(ready, error, stop)


def _put(ready: queue.Queue[list[MicroBatch] | BaseException], item: list[MicroBatch] | BaseException,
         stop: threading.Event) -> None:
    # A full queue is looked at again from time to time, so that a thread nobody reads from can end.
    while not stop.is_set():
        try:
            return ready.put(item, timeout=0.1)
        except queue.Full:
            continue


def _shut_down(stop: threading.Event, ready: queue.Queue[list[MicroBatch] | BaseException],
               thread: threading.Thread) -> None:
    stop.set()
    while True:  # make room, so that a waiting put returns at once
        try:
            ready.get_nowait()
        except queue.Empty:
            break
    if thread is not threading.current_thread() and thread.ident is not None:
        thread.join(timeout=10)
