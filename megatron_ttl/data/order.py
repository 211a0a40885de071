"""Say which sample comes when: pure functions of integers, with no index file, no state and no communication.

    sample number k of the run
      -> StagedMixture (mixture.py): which source, and the how-manieth sample of that source it is
      -> EpochOrder:                 in which epoch of the source, and which element of it

Both are exact integer arithmetic, equal on every machine, O(1) in time and memory, and know nothing of the
length of the run: what was drawn stays drawn when training is extended.
"""

from __future__ import annotations

import hashlib
from math import isqrt

import numpy as np

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_ROUNDS = 12  # with fewer, sizes below 10 do not reach all their orders equally often
_LARGEST = 2**62  # sizes and positions, so that sums fit 64 bits


def derive_key(seed: int, source: int, epoch: int) -> int:
    """Return the 64-bit key of a source's epoch: BLAKE2b of the numbers, so near ones give unlike keys."""
    message = b"".join(number.to_bytes(16, "little") for number in (seed, source, epoch))
    digest = hashlib.blake2b(message, digest_size=8, person=b"ttl-data-order").digest()
    return int.from_bytes(digest, "little")


class Permutation:
    """A bijection of range(size) chosen by a 64-bit key.

    Construction: range(a * b) is seen as a grid with a = ceil(sqrt(size)) rows and b = ceil(size / a)
    columns. Rounds alternately add to the row a keyed hash of the column, and to the column one of the row,
    modulo a and b: each round can be undone, so the whole is a bijection. At most a - 1 of the a * b cells
    are not below `size`; from those one walks on until a cell is (one element in sqrt(size) needs that).

    Source: J. Black and P. Rogaway, "Ciphers with Arbitrary Finite Domains" (CT-RSA 2002), sections 4 (cycle
    walking) and 5 (generalised Feistel); the hash is the finaliser of splitmix64, S. Vigna.
    """

    def __init__(self, size: int, key: int) -> None:
        assert 1 <= size <= _LARGEST, size
        self.size = size
        self._rows = isqrt(size - 1) + 1
        self._columns = -(-size // self._rows)
        self._round_keys = [_mix(key + (number + 1) * _GOLDEN & _MASK) for number in range(_ROUNDS)]

    def __call__(self, index: int) -> int:
        """Return the element at position `index`."""
        assert 0 <= index < self.size, (index, self.size)
        while True:
            row, column = divmod(index, self._columns)
            for number, key in enumerate(self._round_keys):
                if number % 2:
                    column = (column + _mix(row ^ key)) % self._columns
                else:
                    row = (row + _mix(column ^ key)) % self._rows
            index = row * self._columns + column
            if index < self.size:
                return index

    def many(self, indices: np.ndarray) -> np.ndarray:
        """Return the elements at many positions, int64; equal to calling the object for each."""
        result = np.array(indices, dtype=np.uint64)
        assert result.size == 0 or result.max() < self.size, (result.max(), self.size)
        walking = np.arange(len(result))
        while len(walking):
            result[walking] = self._once(result[walking])
            walking = walking[result[walking] >= self.size]
        return result.astype(np.int64)

    def _once(self, cells: np.ndarray) -> np.ndarray:
        rows, columns = np.uint64(self._rows), np.uint64(self._columns)
        row, column = np.divmod(cells, columns)
        for number, key in enumerate(self._round_keys):
            # Reduce the hash first: a sum with a full 64-bit hash would wrap, which Python's integers do not.
            if number % 2:
                column = (column + _mix_many(row ^ np.uint64(key)) % columns) % columns
            else:
                row = (row + _mix_many(column ^ np.uint64(key)) % rows) % rows
        return row * columns + column


def permute(index: int, size: int, key: int) -> int:
    """Return the element at position `index` of the permutation of range(size) that `key` chooses."""
    return Permutation(size, key)(index)


def permute_many(indices: np.ndarray, size: int, key: int) -> np.ndarray:
    """Return `permute` of every position, int64."""
    return Permutation(size, key).many(indices)


def _mix(value: int) -> int:
    for shift, factor in _MIX:
        value = (value ^ value >> shift) * factor & _MASK
    return value ^ value >> 31


def _mix_many(values: np.ndarray) -> np.ndarray:
    for shift, factor in _MIX:
        values = (values ^ values >> np.uint64(shift)) * np.uint64(factor)
    return values ^ values >> np.uint64(31)


class EpochOrder:
    """The order in which a source's elements come: each epoch has every one once, in an order of its own."""

    def __init__(self, size: int, seed: int, source: int = 0) -> None:
        assert 1 <= size <= _LARGEST, size
        self.size = size
        self.seed = seed
        self.source = source
        self._last: tuple[int, Permutation] | None = None

    def locate(self, position: int) -> tuple[int, int]:
        """Return (epoch, element) of the sample at `position` of this source."""
        epoch, index = divmod(position, self.size)
        return epoch, self._permutation(epoch)(index)

    def locate_many(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (epochs, elements) of many positions, int64; equal to `locate` of each."""
        epochs, indices = np.divmod(np.asarray(positions, dtype=np.int64), self.size)
        elements = np.empty_like(indices)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            elements[chosen] = self._permutation(int(epoch)).many(indices[chosen])
        return epochs, elements

    def _permutation(self, epoch: int) -> Permutation:
        # Kept from call to call for speed alone; what it is follows from the epoch.
        last = self._last
        if last is None or last[0] != epoch:
            self._last = last = (epoch, Permutation(self.size, derive_key(self.seed, self.source, epoch)))
        return last[1]
