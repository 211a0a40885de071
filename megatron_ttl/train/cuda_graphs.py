"""Record what the host launches once, and replay it: a small step costs less than the host takes to launch it.

What is recorded reads and writes the same memory every time: inputs, scalars and results lie in tensors that stay.

Source: PyTorch, CUDA semantics, "CUDA Graphs"; capture and warm-up as described there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

WARM_CALLS = 2
"""Calls before a recording, real ones: libraries choose their algorithms and make their workspaces in them."""


class GraphRecorder:
    """Records functions on a GPU, all into one pool of memory, for they never run at the same time."""

    def __init__(self, module: nn.Module) -> None:
        """Prepare; `module` is what the recorded functions compute with."""
        self._module = module
        self._pool: Any = None
        self._kept: list[list[Tensor]] = []
        self._stream = torch.cuda.Stream()

    def warm(self, function: Callable[[], None]) -> None:
        """Call a function on a stream beside the usual one, as a recording does."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            function()
        torch.cuda.current_stream().wait_stream(self._stream)

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """Record a function without running it, on the stream whose workspaces are there already; return what runs it.

        Raises:
            RuntimeError: it does something that cannot be recorded, or memory does not suffice.
        """
        graph = torch.cuda.CUDAGraph()
        # The thread that reads data ahead pins memory meanwhile, which a recording of all threads would forbid.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            function()
        self._pool = graph.pool()
        self._kept.append(list(tensors_beside(self._module)))
        return graph.replay


def tensors_beside(module: nn.Module) -> Iterator[Tensor]:
    """Yield tensors that modules keep as plain attributes, e.g. rotary tables.

    A module may replace them by larger ones; a recording goes on reading the former, so somebody must keep those.
    """
    for part in module.modules():
        for value in vars(part).values():
            for item in value if isinstance(value, tuple) else (value,):
                if isinstance(item, Tensor):
                    yield item


class GraphedCalls:
    """Functions without arguments that are called as they are, or recorded after a few calls and replayed since."""

    def __init__(self, recorder: GraphRecorder | None, required: bool, warn: Callable[[str], None]) -> None:
        """Prepare.

        Args:
            recorder: None records nothing.
            required: whether it is an error if something cannot be recorded; otherwise it is said, and never tried again.
            warn: takes that line.
        """
        self._recorder, self._required, self._warn = recorder, required, warn

    def wrap(self, function: Callable[[], None]) -> Callable[[], None]:
        """Return what is to be called instead of a function."""
        calls, replay = 0, None

        def call() -> None:
            nonlocal calls, replay
            if replay is None and self._recorder is not None:
                if calls < WARM_CALLS:
                    calls += 1
                    return self._recorder.warm(function)
                replay = self._record(function)
            return function() if replay is None else replay()

        return call

    def _record(self, function: Callable[[], None]) -> Callable[[], None] | None:
        assert self._recorder is not None
        try:
            return self._recorder.record(function)
        except RuntimeError as error:
            if self._required:
                raise
            self._recorder = None
            reason = str(error).strip().splitlines() or [type(error).__name__]
            self._warn(f"the step could not be recorded as CUDA graphs and is launched piece by piece: {reason[0]}")
            return None
