"""Arrange token sequences so that what they share at their beginnings is computed once.

Sequences are sorted; neighbours then share most. Two forms of sharing follow:

    trunk   a long beginning of many sequences (demonstrations before every question): run once, kept as keys and values
    row     sequences as one tree (a question and its choices): shared tokens stand once, every token sees its ancestors

A sequence that is the beginning of another one costs nothing: its tokens are in the other's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

_TRUNK_TOKENS = 32
"""A trunk is at least so long: a shorter one is not worth a pass of its own."""
_BESIDE_TRUNK = 256
"""Tokens that must hang on a trunk: with fewer, trunk and branches go together in one row."""
_ROW_TOKENS = 512
"""A row takes at most so many beside its first sequence: they are compared with each other, whether they see each other
or not, which is a sixth of the work at this length and 512 channels."""

Pair = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class Asked:
    """A request: the tokens `targets` are predicted, the first one from the token at depth `begin`."""

    request: int
    begin: int
    targets: np.ndarray  # [n] int32


@dataclass(frozen=True)
class Leaf:
    """A token sequence that is no beginning of another one, and what is asked of it."""

    ids: np.ndarray  # [length] int32
    asked: list[Asked]

    @property
    def first_asked(self) -> int:
        """Depth before which nothing is predicted."""
        return min(asked.begin for asked in self.asked)


@dataclass
class Row:
    """Sequences as one tree of tokens, without the trunk they hang on.

    Attributes:
        trunk: tokens of the trunk; depths count from there.
        count: tokens of the row (s).
    """

    trunk: int
    count: int = 0
    _pieces: list[np.ndarray] = field(default_factory=list)
    _paths: list[np.ndarray] = field(default_factory=list)  # per sequence: the row's token at each depth
    _shared: list[int] = field(default_factory=list)
    _asked: list[tuple[Asked, np.ndarray]] = field(default_factory=list)

    def add(self, leaf: Leaf, shared: int) -> None:
        """Add a sequence whose first `shared` tokens, trunk included, are those of the one before."""
        kept = max(shared - self.trunk, 0) if self._paths else 0
        new = leaf.ids[self.trunk + kept :]
        before = self._paths[-1][:kept] if self._paths else np.empty(0, np.int64)
        path = np.concatenate((before, np.arange(self.count, self.count + len(new))))
        self._pieces.append(new)
        self._paths.append(path)
        self._shared.append(kept)
        self.count += len(new)
        for asked in leaf.asked:
            start = asked.begin - self.trunk
            self._asked.append((asked, path[start : start + len(asked.targets)]))

    @property
    def beside_first(self) -> int:
        """Tokens that are not of the first sequence."""
        return self.count - len(self._pieces[0])

    @property
    def is_chain(self) -> bool:
        """Whether every token sees all before it, as in plain text."""
        return len(self._paths) == 1

    @property
    def ids(self) -> np.ndarray:
        """[s] int32"""
        return np.concatenate(self._pieces)

    @property
    def depths(self) -> np.ndarray:
        """Position of every token behind the trunk: [s]."""
        return np.concatenate([np.arange(kept, kept + len(piece))
                               for kept, piece in zip(self._shared, self._pieces, strict=True)])

    def sees(self) -> np.ndarray:
        """Return which tokens of the row each one sees, itself included: [s, s] bool."""
        seen = np.zeros((self.count, self.count), dtype=bool)
        for path, kept in zip(self._paths, self._shared, strict=True):
            new = path[kept:]
            seen[np.ix_(new, path[:kept])] = True
            seen[np.ix_(new, new)] = np.tri(len(new), dtype=bool)
        return seen

    def asked(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield per request its number, the tokens of the row that predict, and what they should predict."""
        for asked, nodes in self._asked:
            yield asked.request, nodes, asked.targets


@dataclass(frozen=True)
class Trunk:
    """Rows, and the tokens that stand before all of them; none where rows share too little."""

    ids: np.ndarray
    rows: list[Row]


def arrange(pairs: Sequence[Pair]) -> list[Trunk]:
    """Return trunks in an order in which neighbours share most, the one without tokens first.

    Args:
        pairs: context and continuation of each request, both with at least one token.
    """
    leaves = _leaves(pairs)
    if not leaves:
        return []
    shared = [0, *(shared_beginning(a.ids, b.ids) for a, b in zip(leaves, leaves[1:], strict=False))]
    bearing: dict[int, list[int]] = {}
    lengths = []
    for place, number in enumerate(_assign(leaves, np.array(shared), lengths)):
        bearing.setdefault(number, []).append(place)
    return [Trunk(leaves[places[0]].ids[: lengths[number]],
                  _rows([leaves[place] for place in places], lengths[number]))
            for number, places in sorted(bearing.items())]


def _leaves(pairs: Sequence[Pair]) -> list[Leaf]:
    """Sort the sequences and join each that is a beginning of another to it."""
    asked: dict[bytes, list[Asked]] = {}
    for number, (context, continuation) in enumerate(pairs):
        whole = np.array([*context, *continuation], dtype=np.int32)
        key = whole[:-1].astype(">u4").tobytes()  # big-endian bytes sort as the numbers do
        asked.setdefault(key, []).append(Asked(number, len(context) - 1, whole[len(context) :]))
    leaves: list[Leaf] = []
    following = b""
    for key in sorted(asked, reverse=True):
        if following.startswith(key):
            leaves[-1].asked.extend(asked[key])
        else:
            leaves.append(Leaf(np.frombuffer(key, dtype=">u4").astype(np.int32), asked[key]))
            following = key
    return leaves[::-1]


def shared_beginning(a: np.ndarray, b: np.ndarray) -> int:
    """Return how many tokens two sequences share at their beginning."""
    length = min(len(a), len(b))
    different = a[:length] != b[:length]
    return int(different.argmax()) if different.any() else length


def _assign(leaves: list[Leaf], shared: np.ndarray, lengths: list[int]) -> list[int]:
    """Give each sequence the number of its trunk; trunk n has `lengths[n]` tokens, trunk 0 none.

    Whole ranges of sorted sequences are looked at, and split where neighbours share least. No trunk reaches over a
    token that predicts something: its result would be gone when the rows are run.
    """
    sizes = np.array([len(leaf.ids) for leaf in leaves])
    firsts = np.array([leaf.first_asked for leaf in leaves])
    usable = shared.copy()
    usable[1:] = np.minimum(shared[1:], np.minimum(firsts[1:], firsts[:-1]))
    numbers = [0] * len(leaves)
    lengths.append(0)
    ranges = [(0, len(leaves), 0)]  # begin, end, trunk
    while ranges:
        begin, end, trunk = ranges.pop()
        tokens = int(sizes[begin] + (sizes - shared)[begin + 1 : end].sum())  # of the tree, trunk included
        if end - begin < 2 or tokens - lengths[trunk] < _BESIDE_TRUNK:
            numbers[begin:end] = [trunk] * (end - begin)
            continue
        least = int(usable[begin + 1 : end].min())
        if least - lengths[trunk] >= _TRUNK_TOKENS and tokens - least >= _BESIDE_TRUNK:
            trunk = len(lengths)
            lengths.append(least)
        cuts = [begin, *(begin + 1 + np.flatnonzero(usable[begin + 1 : end] == least)).tolist(), end]
        ranges += [(a, b, trunk) for a, b in reversed(list(zip(cuts, cuts[1:], strict=False)))]
    return numbers


def _rows(leaves: list[Leaf], trunk: int) -> list[Row]:
    """Join sequences to rows: on a trunk as many as a row takes, without one those that share a quarter."""
    rows: list[Row] = []
    last = np.empty(0, np.int32)
    for leaf in leaves:
        shared = shared_beginning(last, leaf.ids)
        more = len(leaf.ids) - max(shared, trunk)
        fits = bool(rows) and rows[-1].beside_first + more <= _ROW_TOKENS
        if not (fits and (trunk or 4 * shared >= len(leaf.ids))):
            rows.append(Row(trunk))
        rows[-1].add(leaf, shared)
        last = leaf.ids
    return rows
