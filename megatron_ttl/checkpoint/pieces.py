"""A tensor that lies in parts on several processes, and in several files."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """A block of a tensor."""

    tensor: Tensor
    shape: tuple[int, ...]
    """Of the whole tensor."""
    offset: tuple[int, ...]
    """Where the block begins in it."""


def whole(tensor: Tensor) -> Piece:
    """Return a tensor as the one piece it is."""
    return Piece(tensor, tuple(tensor.shape), (0,) * tensor.dim())
