"""AdamW over flat buffers on a GPU: the same numbers as on the host, graphs, no waiting, and bandwidth."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import pytest
import torch
from gpu import needs_gpu
from torch import Tensor

from megatron_ttl.kernels.adamw import accumulate_, accumulate_and_square_, adamw_, squared_norm

pytestmark = list(needs_gpu)
PATHS = ("torch", "cuda")
HYPER = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "clipping": 1.0}
SHAPES = [(3000, 257), (5,), (1025, 64), (128, 1024), (33,)]
SIZE = sum(torch.Size(shape).numel() for shape in SHAPES)
OFFSETS = [sum(torch.Size(shape).numel() for shape in SHAPES[:place]) for place in range(len(SHAPES))]


def gradients(device: str) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.bfloat16).to(device) for shape in SHAPES]


def buffers(device: str, size: int = SIZE) -> list[Tensor]:
    """Masters, gradient, both moments, bf16 weights."""
    made = [torch.randn(size).to(device) for _ in range(4)]
    made[3].abs_()
    return [*made, made[0].bfloat16()]


def whole_step(state: list[Tensor], micro_batches: list[list[Tensor]], lr: Tensor, step: Tensor, path: str) -> Tensor:
    """Accumulate, sum squares, update in two ranges of which one begins at an odd element."""
    accumulate_(state[1], micro_batches[0], OFFSETS, True, path)
    squares = accumulate_and_square_(state[1], micro_batches[1], OFFSETS, False, path)
    for part in (slice(0, 70_001), slice(70_001, SIZE)):
        adamw_(*(buffer[part] for buffer in state), lr=lr, step=step, squared_norm=squares, **HYPER, path=path)
    return squares


@pytest.mark.parametrize("path", PATHS)
def test_a_gpu_gives_the_numbers_of_the_host(path: str) -> None:
    host, micro_batches = buffers("cpu"), [gradients("cpu") for _ in range(2)]
    state = [buffer.cuda() for buffer in host]
    for number in range(1, 4):
        scalars = torch.tensor(3e-3), torch.tensor(float(number))
        expected = whole_step(host, micro_batches, *scalars, "torch")
        squares = whole_step(state, [[part.cuda() for part in parts] for parts in micro_batches],
                             *(value.cuda() for value in scalars), path)
        torch.testing.assert_close(squares.cpu(), expected, rtol=3e-7, atol=0)
        torch.testing.assert_close(squared_norm(state[1], path), squares, rtol=3e-7, atol=0)
    for ours, theirs in zip(state[:4], host[:4], strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=2e-6, atol=2e-6)
    assert torch.equal(state[1].cpu(), host[1]) and torch.equal(state[4], state[0].bfloat16())


@pytest.mark.parametrize("path", PATHS)
def test_a_captured_step_is_the_eager_step(path: str) -> None:
    lr, step = torch.zeros((), device="cuda"), torch.zeros((), device="cuda")
    micro_batches = [gradients("cuda") for _ in range(2)]
    eager = buffers("cuda")
    replayed = [buffer.clone() for buffer in eager]
    scratch = [buffer.clone() for buffer in eager]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        whole_step(scratch, micro_batches, lr + 1e-3, step + 1, path)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = whole_step(replayed, micro_batches, lr, step, path)
    for number in range(1, 5):
        lr.fill_(1e-3 / number)
        step.fill_(number)
        for parts in micro_batches:
            for part in parts:
                part.normal_()
        if number == 3:
            micro_batches[1][0][7, 7] = float("inf")
        squares = whole_step(eager, micro_batches, lr, step, path)
        graph.replay()
        assert torch.equal(captured, squares)
        assert all(torch.equal(one, other) for one, other in zip(replayed, eager, strict=True))


@pytest.mark.parametrize("path", PATHS)
def test_a_step_does_not_wait_for_the_gpu(path: str) -> None:
    state, micro_batches = buffers("cuda"), [gradients("cuda") for _ in range(2)]
    lr, step = torch.full((), 1e-3, device="cuda"), torch.ones((), device="cuda")
    whole_step(state, micro_batches, lr, step, path)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        whole_step(state, micro_batches, lr, step, path)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def milliseconds(run: Callable[[], object]) -> float:
    """Return the median of twenty runs on the GPU's clock."""
    times = []
    for number in range(25):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        if number >= 5:
            times.append(begin.elapsed_time(end))
    return median(times)


def test_kernels_come_close_to_a_copy() -> None:
    size = 1 << 27
    state = [torch.randn(size, device="cuda") for _ in range(4)]
    state[3].abs_()
    state.append(state[0].bfloat16())
    parts = [torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(size >> 24)]
    offsets = [place << 24 for place in range(len(parts))]
    one = torch.ones((), device="cuda")
    copy = 8 * size / milliseconds(lambda: state[0].copy_(state[1]))
    state[0].normal_()
    runs = {
        "adamw": (30, lambda: adamw_(*state, lr=one * 1e-4, step=one, squared_norm=one, **HYPER, path="cuda")),
        "first accumulation": (6, lambda: accumulate_(state[1], parts, offsets, True, "cuda")),
        "accumulation": (10, lambda: accumulate_(state[1], parts, offsets, False, "cuda")),
        "accumulation and squares": (10, lambda: accumulate_and_square_(state[1], parts, offsets, False, "cuda")),
        "squares": (4, lambda: squared_norm(state[1], "cuda")),
    }
    shares = {name: bytes_each * size / milliseconds(run) / copy for name, (bytes_each, run) in runs.items()}
    print({name: round(share, 3) for name, share in shares.items()})
    assert min(shares.values()) >= 0.85, shares


def test_apex_does_the_same_update() -> None:
    pytest.importorskip("amp_C")
    lr, step, squares = (torch.full((), value, device="cuda") for value in (1e-3, 3.0, 9.0))
    ours = buffers("cuda")
    theirs = [buffer.clone() for buffer in ours]
    for state, path in ((ours, "cuda"), (theirs, "apex")):
        adamw_(*state, lr=lr, step=step, squared_norm=squares, **HYPER, zero=True, path=path)
    for one, other in zip(ours[:4], theirs[:4], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    before = [buffer.clone() for buffer in theirs]
    adamw_(*theirs, lr=lr, step=step, squared_norm=squares * float("nan"), **HYPER, path="apex")
    assert all(torch.equal(one, other) for one, other in zip(before, theirs, strict=True))
