"""A tensor that lies in parts on several processes, and in several files."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from torch import Tensor

Block = tuple[tuple[int, ...], tuple[int, ...]]
"""Where a part of a tensor begins, and how far it reaches, in every dimension."""


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


def overlap(a: Block, b: Block) -> Block | None:
    """Return the block that two blocks share, or None."""
    offset = tuple(map(max, a[0], b[0]))
    end = tuple(min(x + m, y + n) for x, m, y, n in zip(a[0], a[1], b[0], b[1], strict=True))
    if any(stop <= start for start, stop in zip(offset, end, strict=True)):
        return None
    return offset, tuple(stop - start for start, stop in zip(offset, end, strict=True))


def cover_fault(shape: tuple[int, ...], blocks: Iterable[Block]) -> str:
    """Say how blocks fail to cover a tensor of `shape` exactly once; nothing when they do.

    A tensor without elements must be one block, or nothing would vouch for its shape.
    """
    blocks = list(blocks)
    if 0 in shape:
        return "" if blocks == [((0,) * len(shape), shape)] else "is empty and not in one piece"
    for offset, extent in blocks:
        dimensions = len(offset) == len(extent) == len(shape)
        if not dimensions or any(start < 0 or size < 1 or start + size > most
                                 for start, size, most in zip(offset, extent, shape, strict=True)):
            return f"has a piece of {list(extent)} at {list(offset)}, which does not lie in its {list(shape)}"
    # In the order of the dimension that is cut most, only blocks that begin before the end of one can overlap it: a
    # forged manifest of very many pieces takes no hours.
    cuts = [len({offset[dimension] for offset, _ in blocks}) for dimension in range(len(shape))]
    most_cut = cuts.index(max(cuts)) if cuts else None
    if most_cut is not None:
        blocks.sort(key=lambda block: block[0][most_cut])
    for index, first in enumerate(blocks):
        for other in range(index + 1, len(blocks)):
            second = blocks[other]
            if most_cut is not None and second[0][most_cut] >= first[0][most_cut] + first[1][most_cut]:
                break
            if overlap(first, second) is not None:
                return f"has pieces that overlap, at {list(first[0])} and {list(second[0])}"
    missing = prod(shape) - sum(prod(extent) for _, extent in blocks)
    return f"lacks {missing:,} of its {prod(shape):,} elements" if missing else ""
