"""How wrong a kernel may be: at most twice as wrong as PyTorch's own operations in the same number format."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill what is allocated and not written with NaN, as PyTorch does where it must be deterministic."""
    before = torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty_like(torch.ones(3)).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def relative_error(value: Tensor, exact: Tensor) -> float:
    """Return the norm of the difference over the norm of what is exact (an fp64 tensor)."""
    return ((value.double() - exact).norm() / exact.norm().clamp(min=1e-300)).item()


def assert_no_worse(ours: Tensor, torchs: Tensor, exact: Tensor, what: str = "", factor: float = 2.0,
                    allowed: float | None = None) -> None:
    """Compare errors against an fp64 result.

    Args:
        ours, torchs: the same quantity by the kernel and by PyTorch, in the same number format.
        exact: in fp64.
        what: a word for the message.
        factor: how much worse than PyTorch's the error may be.
        allowed: an error that is let pass whatever PyTorch's is; by default one unit in the last place where the elements
            are few, for there chance decides whose roundings are the luckier ones.
    """
    assert ours.dtype == torchs.dtype and ours.shape == torchs.shape == exact.shape, what
    if not exact.numel():
        return
    if allowed is None:
        allowed = torch.finfo(ours.dtype).eps if exact.numel() < 512 else 0.0
    error, reference = relative_error(ours, exact), relative_error(torchs, exact)
    assert error <= max(factor * reference, allowed), f"{what}: error {error:.2e}, PyTorch's {reference:.2e}"


def guarded(shape: tuple[int, ...], dtype: torch.dtype, offset: int = 0) -> tuple[Tensor, Tensor]:
    """Return a tensor full of NaN inside a longer one, whose other elements must stay what they are.

    Args:
        shape, dtype: of the tensor.
        offset: elements by which it begins behind a multiple of 16 bytes.
    """
    count, margin = torch.Size(shape).numel(), 64
    whole = torch.full((margin + offset + count + margin,), float("nan"), dtype=dtype)
    whole[:margin + offset], whole[margin + offset + count:] = 7, 7
    return whole, whole[margin + offset:margin + offset + count].view(shape)


def assert_guards_hold(whole: Tensor, inside: Tensor) -> None:
    """Check that everything inside was written, and nothing around it."""
    assert not inside.isnan().any()
    first = (inside.data_ptr() - whole.data_ptr()) // whole.element_size()
    assert (whole[:first] == 7).all() and (whole[first + inside.numel():] == 7).all()
