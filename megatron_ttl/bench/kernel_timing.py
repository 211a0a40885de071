"""Time single operations: on a GPU what the device takes, whatever the host needs to ask for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

_DELAY_SIZE, _DELAYS = 8192, 6
_COPIED_BYTES = {"cuda": 1 << 30, "cpu": 64 << 20}

Call = tuple[Callable[[], Any], Callable[[Any], Any]]
"""What is prepared, and what is then timed with it."""


def device_seconds(calls: Sequence[Call], device: torch.device) -> list[float]:
    """Return how long the device took for the timed part of each call.

    On a GPU all of them are queued behind a matrix product of some milliseconds, so that none waits for the host.
    """
    if device.type != "cuda":
        return [_host_seconds(*call) for call in calls]
    delay = torch.ones(_DELAY_SIZE, _DELAY_SIZE, device=device, dtype=torch.bfloat16)
    product = torch.empty_like(delay)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in calls]
    torch.cuda.synchronize(device)
    for _ in range(_DELAYS):
        torch.mm(delay, delay, out=product)
    for (prepare, run), (began, ended) in zip(calls, events, strict=True):
        prepared = prepare()
        began.record()
        run(prepared)
        ended.record()
        del prepared
    torch.cuda.synchronize(device)
    return [began.elapsed_time(ended) / 1e3 for began, ended in events]


def _host_seconds(prepare: Callable[[], Any], run: Callable[[Any], Any]) -> float:
    prepared = prepare()
    began = time.perf_counter()
    run(prepared)
    return time.perf_counter() - began


def copy_bytes_per_s(device: torch.device, repeats: int = 8) -> float:
    """Return the best speed of a copy on the device: bytes read and bytes written."""
    size = _COPIED_BYTES[device.type]
    source, target = (torch.randint(256, (size,), dtype=torch.uint8, device=device) for _ in range(2))
    target.copy_(source)
    calls: list[Call] = [(lambda: None, lambda _: target.copy_(source))] * repeats
    return 2 * size / min(device_seconds(calls, device))


def sets_beyond_cache(device: torch.device, bytes_of_a_set: float) -> int:
    """Return how many sets of inputs, used in turn, do not fit into the last cache together; at least two."""
    if device.type != "cuda":
        return 2
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20)
    return max(2, -(-3 * cache // max(1, int(bytes_of_a_set))))


def poison(device: torch.device, count: int, dtype: torch.dtype) -> None:
    """Leave NaN in memory that the next results will lie in, so that what is not written shows."""
    blocks = [torch.full((count,), torch.nan, device=device, dtype=dtype) for _ in range(3)]
    del blocks
