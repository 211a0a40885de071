"""AdamW, accumulation and norm over flat buffers: both paths, against PyTorch's own optimizer in fp64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cuda_emulation import emulation, in_both_orders
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ttl.kernels.adamw import accumulate_, accumulate_and_square_, adamw_, squared_norm

PATHS = ("torch", "cuda")
HYPER = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
POISON = float("nan")
STRETCH = 8192


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    """The kernels on the CPU, fresh numbers in every test and run, and NaN in what is allocated and not written."""
    print("seed", torch.seed())  # shown where a test fails
    torch.use_deterministic_algorithms(True)
    with emulation():
        yield
    torch.use_deterministic_algorithms(False)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


class NoReading(TorchDispatchMode):
    """Refuses whatever waits for the device to know a value."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Raise where a value would be read."""
        assert "_local_scalar_dense" not in str(func) and "nonzero" not in str(func), f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


# ---- accumulation


def some_gradients(seed: int) -> list[Tensor]:
    """Every dtype, shapes of all kinds, layouts other than row-major, places that no vector may be read from."""
    source = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source)

    return [normal(2 * STRETCH + 12).bfloat16(), normal(40, 31).bfloat16().t(), normal(5), normal(1001).half()[1:],
            normal(66, 100), normal(3, 5, 7).permute(2, 0, 1), normal(0), normal(8, 9).bfloat16(), normal(1)[0],
            normal(STRETCH + 1).half(), normal(33).bfloat16()[1:], *(normal(4).bfloat16() for _ in range(130))]


def packed(gradients: list[Tensor], start: int, gap: int) -> tuple[list[int], int]:
    """Return the gradients' places in a buffer, gaps between them, and its size."""
    offsets, place = [], start
    for gradient in gradients:
        offsets.append(place)
        place += gradient.numel() + gap
    return offsets, place


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("start", "gap"), [(0, 0), (3, 1), (4, 4)])
def test_accumulation_is_addition_in_fp32(path: str, start: int, gap: int) -> None:
    rounds = [some_gradients(seed) for seed in torch.randint(2**31, (3,)).tolist()]
    offsets, size = packed(rounds[0], start, gap)

    def run() -> list[Tensor]:
        flat = torch.full((size,), POISON)
        for number, gradients in enumerate(rounds):
            accumulate_(flat, gradients, offsets, first=number == 0, path=path)
        return [flat]

    flat, = in_both_orders(run)
    expected = torch.full((size,), POISON)
    for place, *parts in zip(offsets, *rounds, strict=True):
        wide = [part.reshape(-1).float() for part in parts]
        expected[place : place + parts[0].numel()] = wide[0] + wide[1] + wide[2]
    assert same_bits(flat, expected)  # gaps are poisoned still


@pytest.mark.parametrize("path", PATHS)
def test_accumulation_brings_the_squared_norm_along(path: str) -> None:
    gradients = some_gradients(1)
    offsets, size = packed(gradients, 2, 3)

    def run() -> list[Tensor]:
        flat = torch.zeros(size)
        squares = [accumulate_and_square_(flat, gradients, offsets, first, path) for first in (True, False)]
        return [flat, *squares]

    flat, once, twice = in_both_orders(run)
    exact = flat.double().square().sum()
    assert abs(twice / exact - 1) < 2e-7 and abs(4 * once / exact - 1) < 2e-7 and once.dtype == torch.float32
    assert accumulate_and_square_(torch.zeros(5), [], [], True, path) == 0
    gradients[4][63, 95] = float("inf")
    assert accumulate_and_square_(flat, gradients, offsets, True, path).isinf()


# ---- norm


@pytest.mark.parametrize("path", PATHS)
def test_norm_is_no_worse_than_pytorchs(path: str) -> None:
    ours, pytorchs = [], []
    for size in (1, 3, 1023, STRETCH, 5 * STRETCH + 7, 300_001):
        for start in range(4):
            flat = torch.randn(start + size)[start:] * 10.0 ** torch.randint(-3, 4, ()).item()
            found, = in_both_orders(lambda flat=flat: [squared_norm(flat, path)])
            exact = flat.double().square().sum().sqrt()
            ours.append(abs(found.double().sqrt() / exact - 1))
            pytorchs.append(abs(torch.linalg.vector_norm(flat).double() / exact - 1))
    assert torch.stack(ours).max() <= min(2e-7, 2 * torch.stack(pytorchs).max())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), 1e30])
@pytest.mark.parametrize("place", [0, 5, 20_000, 20_002])
def test_norm_is_not_finite_where_one_element_is_not(path: str, value: float, place: int) -> None:
    flat = torch.randn(20_004)[1:]
    flat[place] = value
    assert not squared_norm(flat, path).isfinite()
    assert squared_norm(torch.zeros(0), path) == 0


# ---- the update


class State:
    """Flat buffers that begin anywhere in a larger, guarded one."""

    GUARD = 8

    def __init__(self, size: int, start: int, dtype: torch.dtype | None, gradient_start: int | None = None) -> None:
        starts = [start, start if gradient_start is None else gradient_start, start, start]
        self.whole = [torch.full((self.GUARD + begin + size + self.GUARD,), POISON) for begin in starts]
        self.flat = [whole[self.GUARD + begin :][:size] for whole, begin in zip(self.whole, starts, strict=True)]
        for buffer in self.flat:
            buffer.normal_()
        self.flat[3].abs_().mul_(0.1)
        self.weights = None
        if dtype is not None:
            self.whole.append(torch.full((2 * self.GUARD + start + size,), POISON, dtype=dtype))
            self.weights = self.whole[-1][self.GUARD + start :][:size]

    def guards(self) -> list[Tensor]:
        """What must stay poisoned."""
        inside = [*self.flat, *([] if self.weights is None else [self.weights])]
        return [part for whole, buffer in zip(self.whole, inside, strict=True)
                for begin in [buffer.storage_offset()] for part in (whole[:begin], whole[begin + buffer.numel() :])]

    def step(self, number: int, squares: Tensor, path: str, lr: float = 3e-3, clipping: float = 1.0, zero: bool = False
             ) -> None:
        """Do one update."""
        adamw_(*self.flat, self.weights, lr=scalar(lr), step=scalar(number), squared_norm=squares, clipping=clipping,
               **HYPER, zero=zero, path=path)

    def copy(self) -> State:
        """Return the same numbers in buffers of their own, laid out in the same way."""
        other = State.__new__(State)
        other.whole = [whole.clone() for whole in self.whole]
        inside = [whole[buffer.storage_offset() :][: buffer.numel()] for whole, buffer in
                  zip(other.whole, [*self.flat, *([] if self.weights is None else [self.weights])], strict=True)]
        other.flat, other.weights = inside[:4], None if self.weights is None else inside[4]
        return other


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("clipping", [0.0, 1.0])
def test_a_hundred_updates_are_as_exact_as_pytorchs(path: str, clipping: float) -> None:
    size, lr = 3001, scalar(3e-3).item()
    ours = State(size, 0, torch.bfloat16)
    ours.flat[2].zero_()
    ours.flat[3].zero_()
    peers = {}
    for dtype in (torch.float32, torch.float64):
        parameter = torch.nn.Parameter(ours.flat[0].clone().to(dtype))
        peers[dtype] = parameter, torch.optim.AdamW([parameter], lr=lr, **HYPER, foreach=False)
    for number in range(1, 101):
        gradient = torch.randn(size) * (2.0 if number % 2 else 0.01)  # clipped and not
        ours.flat[1].copy_(gradient)
        ours.step(number, squared_norm(ours.flat[1], path), path, lr, clipping)
        for dtype, (parameter, optimizer) in peers.items():
            parameter.grad = gradient.to(dtype)
            if clipping:
                torch.nn.utils.clip_grad_norm_([parameter], clipping)
            optimizer.step()
        assert torch.equal(ours.weights, ours.flat[0].bfloat16())
    exact, close = (peer[0].detach() for peer in (peers[torch.float64], peers[torch.float32]))
    moments = {dtype: optimizer.state[parameter] for dtype, (parameter, optimizer) in peers.items()}
    for found, peer, truth in [(ours.flat[0], close, exact),
                               *((ours.flat[2 + place], moments[torch.float32][key], moments[torch.float64][key])
                                 for place, key in enumerate(("exp_avg", "exp_avg_sq")))]:
        assert (found - truth).norm() <= 2 * (peer - truth).norm()
        assert (found - truth).abs().max() <= 2 * (peer - truth).abs().max()
    if path == "torch" and not clipping:
        assert torch.equal(ours.flat[0], close)  # PyTorch's own operations in PyTorch's own order


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("size", "start", "gradient_start"),
                         [*((size, start, None) for size in (1, 2, 6, 1001) for start in range(4)), (0, 1, None),
                          (2 * STRETCH + 5, 3, None), (STRETCH, 0, None), (STRETCH + 9, 1, 2)])
def test_ranges_of_any_size_that_begin_anywhere(dtype: torch.dtype | None, size: int, start: int,
                                                gradient_start: int | None) -> None:
    before, number = State(size, start, dtype, gradient_start), int(torch.randint(1, 1000, ()))
    squares = scalar(7.0)
    plain = before.copy()
    plain.step(number, squares, "torch")

    def run() -> list[Tensor]:
        state = before.copy()
        state.step(number, squares, "cuda")
        return [*state.flat, *([] if state.weights is None else [state.weights]), *state.guards()]

    results = in_both_orders(run)
    for found, expected, old in zip(results[:4], plain.flat, before.flat, strict=True):
        torch.testing.assert_close(found, expected, rtol=3e-7, atol=5e-7)
        assert expected is plain.flat[1] or not size or not torch.equal(expected, old)
    if dtype is not None:
        assert torch.equal(results[4], results[0].to(dtype))
    guards = results[4 if dtype is None else 5 :]
    assert len(guards) == 2 * len(before.whole) and all(guard.isnan().all() and guard.numel() for guard in guards)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("squares", [float("inf"), float("nan")])
def test_nothing_changes_where_the_norm_is_not_finite(path: str, squares: float) -> None:
    state = State(1003, 1, torch.bfloat16)
    state.weights.normal_()
    before = state.copy()
    state.step(3, scalar(squares), path)
    assert all(same_bits(now, then) for now, then in zip(state.whole, before.whole, strict=True))
    state.step(3, scalar(squares), path, zero=True)
    assert not state.flat[1].any()
    assert all(same_bits(now, then) for place, (now, then) in enumerate(zip(state.whole, before.whole, strict=True))
               if place != 1)


@pytest.mark.parametrize("path", PATHS)
def test_the_gradient_stays_unless_it_is_to_be_zeroed(path: str) -> None:
    state = State(1003, 2, None)
    zeroed, gradient = state.copy(), state.flat[1].clone()
    state.step(1, scalar(1.0), path)
    zeroed.step(1, scalar(1.0), path, zero=True)
    assert torch.equal(state.flat[1], gradient) and not zeroed.flat[1].any()
    assert all(torch.equal(state.flat[place], zeroed.flat[place]) for place in (0, 2, 3))
    assert all(guard.isnan().all() for guard in zeroed.guards())


@pytest.mark.parametrize("path", PATHS)
def test_a_whole_step_asks_the_device_nothing(path: str) -> None:
    gradients = some_gradients(2)
    offsets, size = packed(gradients, 0, 0)
    state = State(size, 0, torch.bfloat16)
    with NoReading():
        accumulate_(state.flat[1], gradients, offsets, True, path)
        squares = accumulate_and_square_(state.flat[1], gradients, offsets, False, path)
        state.step(1, squares, path)
        state.step(2, squared_norm(state.flat[1], path), path)
    with pytest.raises(AssertionError, match="waits"), NoReading():
        squares.item()


@pytest.mark.parametrize("path", PATHS)
def test_what_does_not_fit_is_refused(path: str) -> None:
    state, one = State(8, 0, torch.bfloat16), scalar(1.0)
    scalars = {"lr": one, "step": one, "squared_norm": one}

    def update(*buffers: Tensor | None, **changed: Tensor) -> None:
        adamw_(*buffers, **{**scalars, **changed}, clipping=0.0, **HYPER, path=path)

    for position, name in enumerate(("master", "gradient", "exp_avg", "exp_avg_sq", "weights")):
        buffers: list[Tensor] = [*state.flat, state.weights]
        buffers[position] = buffers[position].repeat_interleave(2)[::2]
        with pytest.raises(ValueError, match=f"{name}.* must be.*contiguous"):
            update(*buffers)
    with pytest.raises(ValueError, match="exp_avg has 7 elements.*; the masters have 8"):
        update(*state.flat[:2], state.flat[2][:7], state.flat[3], None)
    with pytest.raises(ValueError, match="step must be an fp32 scalar"):
        update(*state.flat, None, step=torch.ones((), dtype=torch.int64))
    for gradient, place in ((torch.ones(3), 6), (torch.ones(3), -1)):
        with pytest.raises(ValueError, match="does not fit into 8"):
            accumulate_(state.flat[1], [gradient], [place], True, path)
    with pytest.raises(ValueError, match="must be fp32, bf16 or fp16 on cpu.*float64"):
        accumulate_(state.flat[1], [torch.ones(3).double()], [0], True, path)
