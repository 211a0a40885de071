"""Say which source each sample comes from: exact shares at every prefix, in one stage or in several.

All samples have the same length, so shares of samples are shares of tokens. Everything is exact integer arithmetic, equal
on every machine, and knows nothing of ranks, micro batches or the length of the run.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from math import ceil

import numpy as np

_LARGEST_DENOMINATOR = 2**30  # of a share for which 64 bits hold every product; beyond it Python's integers do it


class Mixture:
    """Interleave sources by weight: of any first k samples, each source has its share, to within rounding.

    Construction: a binary tree over the sources. A node that gives its left part the share p sends, of its
    first k samples, floor(k p + 1/2) to the left: the counter rises by 0 or 1 from one sample to the next, so
    each sample has one way down and each source receives 0, 1, 2, ... without a gap. 0.6 is exactly 3/5.
    A source of weight 0 is in no tree and receives nothing.

    Two sources are never more than half a sample off, and no order of whole samples can do better. In a deeper tree a part
    hands down its own error times the share that it gives on, and adds its own half: less than one sample with three or four
    sources, at most half a sample per level with more; `bounds` has the exact figures.

    Args:
        weights: of the sources, relative to each other.

    Attributes:
        shares: of the sources, exact; their sum is 1.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        shares = [Fraction(str(weight)) for weight in weights]
        assert shares and min(shares) >= 0 and max(shares) > 0, weights
        self.shares = [share / sum(shares) for share in shares]
        self._tree = _build_tree([(source, share) for source, share in enumerate(shares) if share])

    def locate(self, number: int) -> tuple[int, int]:
        """Return (source, index within that source) of sample `number`."""
        assert number >= 0, number
        node = self._tree
        while not isinstance(node, int):
            share, left, right = node
            before = _rounded(number, share)
            if _rounded(number + 1, share) > before:
                node, number = left, before
            else:
                node, number = right, number - before
        return node, number

    def locate_many(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (sources, indices) of many samples, int64; equal to `locate` of each."""
        numbers = np.asarray(numbers, dtype=np.int64)
        sources, indices = np.empty_like(numbers), np.empty_like(numbers)
        open_nodes = [(self._tree, np.arange(len(numbers)), numbers)]
        while open_nodes:
            node, places, inside = open_nodes.pop()
            if isinstance(node, int):
                sources[places], indices[places] = node, inside
                continue
            share, left, right = node
            before, goes_left = _rounded_many(inside, share)
            goes_right = ~goes_left
            open_nodes += [(left, places[goes_left], before[goes_left]),
                           (right, places[goes_right], (inside - before)[goes_right])]
        return sources, indices

    def counts(self, total: int) -> list[int]:
        """Return how many of the first `total` samples each source gives."""
        result = [0] * len(self.shares)
        open_nodes = [(self._tree, total)]
        while open_nodes:
            node, count = open_nodes.pop()
            if isinstance(node, int):
                result[node] = count
            else:
                share, left, right = node
                left_count = _rounded(count, share)
                open_nodes += [(left, left_count), (right, count - left_count)]
        return result

    def bounds(self) -> list[Fraction]:
        """Return for each source by how many samples its count is off its share at most, at whatever prefix."""
        result = [Fraction(0)] * len(self.shares)
        open_nodes = [(self._tree, Fraction(0))]
        while open_nodes:
            node, inherited = open_nodes.pop()
            if isinstance(node, int):
                result[node] = inherited
            else:
                share, left, right = node
                own = Fraction(share.denominator // 2, share.denominator)
                open_nodes += [(left, own + share * inherited), (right, own + (1 - share) * inherited)]
        return result

    def samples_until_within(self, deviation: Fraction) -> int:
        """Return from how many samples on the share of every source is within `deviation` of what is asked."""
        return ceil(max(self.bounds()) / deviation)


class StagedMixture:
    """Mixtures one after another: each stage begins its own, and every source goes on where it stood.

    Of a source, a stage draws what comes after all that the earlier stages drew of it: nothing twice and no gap. What a
    later stage is, or how long the last one lasts, changes no earlier sample.

    Args:
        stages: (samples of the run before its end, weights of all sources), ends ascending; the last one never ends,
            whatever stands there.
    """

    def __init__(self, stages: Sequence[tuple[int | None, Sequence[float]]]) -> None:
        assert stages and len({len(weights) for _, weights in stages}) == 1, stages
        self.stages = [Mixture(weights) for _, weights in stages]
        self.begins = [0]
        self._before = [[0] * len(stages[0][1])]
        for (end, _), mixture in zip(stages[:-1], self.stages, strict=False):
            assert end is not None and end > self.begins[-1], stages
            counts = mixture.counts(end - self.begins[-1])
            self._before.append([a + b for a, b in zip(self._before[-1], counts, strict=True)])
            self.begins.append(end)

    def locate(self, number: int) -> tuple[int, int]:
        """Return (source, index within that source) of sample `number`."""
        stage = bisect_right(self.begins, number) - 1
        source, index = self.stages[stage].locate(number - self.begins[stage])
        return source, self._before[stage][source] + index

    def locate_many(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (sources, indices) of many samples, int64; equal to `locate` of each."""
        numbers = np.asarray(numbers, dtype=np.int64)
        sources, indices = np.empty_like(numbers), np.empty_like(numbers)
        stages = np.searchsorted(self.begins, numbers, side="right") - 1
        for stage in np.unique(stages).tolist():
            chosen = stages == stage
            found, inside = self.stages[stage].locate_many(numbers[chosen] - self.begins[stage])
            sources[chosen], indices[chosen] = found, inside + np.array(self._before[stage], dtype=np.int64)[found]
        return sources, indices

    def counts(self, total: int) -> list[int]:
        """Return how many of the first `total` samples each source gives."""
        return [sum(counts) for counts in zip(*self.counts_by_stage(total), strict=True)]

    def counts_by_stage(self, total: int) -> list[list[int]]:
        """Return how many of the first `total` samples each source gives in each stage.  # [stages][sources]"""
        ends = [*self.begins[1:], max(total, self.begins[-1])]
        return [mixture.counts(max(min(total, end) - begin, 0))
                for mixture, begin, end in zip(self.stages, self.begins, ends, strict=True)]


_Node = int | tuple[Fraction, "_Node", "_Node"]


def _build_tree(leaves: list[tuple[int, Fraction]]) -> _Node:
    if len(leaves) == 1:
        return leaves[0][0]
    middle = (len(leaves) + 1) // 2
    left, right = leaves[:middle], leaves[middle:]
    total = sum(share for _, share in leaves)
    return Fraction(sum(share for _, share in left), total), _build_tree(left), _build_tree(right)


def _rounded(count: int, share: Fraction) -> int:
    """Return floor(count * share + 1/2)."""
    return (2 * count * share.numerator + share.denominator) // (2 * share.denominator)


def _rounded_many(counts: np.ndarray, share: Fraction) -> tuple[np.ndarray, np.ndarray]:
    """Return `_rounded` of many counts, int64, and whether one more makes it rise."""
    part, whole = share.numerator, share.denominator
    exact = counts if whole <= _LARGEST_DENOMINATOR else counts.astype(object)
    # Whole multiples of the denominator give whole numbers: only the rest is multiplied, and that is small.
    times = exact // whole
    doubled = 2 * part * (exact - times * whole) + whole
    rounded = doubled // (2 * whole)
    rises = doubled - rounded * (2 * whole) >= 2 * (whole - part)
    return (times * part + rounded).astype(np.int64), rises.astype(bool)
