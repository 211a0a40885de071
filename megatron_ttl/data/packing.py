"""Put the documents of a source into sequences: cut their stream as it comes, or fit whole documents together.

A row is a sequence of s input ids with s labels, and has a label at least. Both ways are functions of the index alone,
the same on every process, and say what becomes of every id: tokens of a source = used + remainder. What fills a row up
is padding, counted apart: it carries label -100 and stands last, so nothing learns from it and nothing sees it.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from megatron_ttl.data.token_file import TokenFile

IGNORED_LABEL = -100


class Packing(Protocol):
    """The rows of one source.

    Attributes:
        rows: how many an epoch has.
        used_tokens: ids that they read, as an input or as a label.
        remainder_tokens: ids that no row reads.
        padding: input positions of an epoch that hold no id of the source.
    """

    rows: int
    used_tokens: int
    remainder_tokens: int
    padding: int

    def fill(self, tokens: np.ndarray | TokenFile, row: int, input_ids: np.ndarray, labels: np.ndarray) -> None:
        """Write a row into `input_ids` and `labels`; of `tokens`, the stream, only slices are read.  # [s], [s]"""

    def stretches(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the first and last positions in the stream of all that the rows read, ascending."""


class Concatenated:
    """Row w is `tokens[w * s : w * s + s + 1]`: documents are cut where a row ends, and there is no padding.

    Neighbouring rows share one id, so every id but the first is a label exactly once per epoch; fewer than s ids at
    the end fill no row.
    """

    padding = 0

    def __init__(self, token_count: int, sequence_length: int) -> None:
        self._length = sequence_length
        self.rows = (token_count - 1) // sequence_length
        self.used_tokens = self.rows * sequence_length + 1
        self.remainder_tokens = (token_count - 1) % sequence_length

    def fill(self, tokens: np.ndarray | TokenFile, row: int, input_ids: np.ndarray, labels: np.ndarray) -> None:
        """Write a row into `input_ids` and `labels`.  # [s], [s]"""
        read = tokens[row * self._length : row * self._length + self._length + 1]
        input_ids[:] = read[:-1]
        labels[:] = read[1:]

    def stretches(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the first and last positions in the stream of all that the rows read, ascending."""
        begins = np.sort(rows) * self._length
        return begins, begins + self._length  # of the last label


class BestFit:
    """Cut documents only where they are longer than a row, and fit the rest together, whole, as tightly as they go.

    Every id but the first of a document is a label exactly once per epoch, predicted from its own document: the place
    after an EOS has label -100. A document gives a row for each s labels; what remains, with the EOS as its last input,
    is a piece of 2 to s ids. The longest piece goes first, each into the row with the least room that still holds it
    (best fit decreasing). Documents of a single id have no label and are the remainder.

    Memory: 12 bytes per document and 8 per row, some 80 per document while it is computed.

    Source: Ding et al. 2024, "Fewer Truncations Improve Language Modeling", section 3.
    """

    def __init__(self, document_ends: np.ndarray, sequence_length: int, filler: int) -> None:
        """Fit the documents together.

        Args:
            document_ends: for each document the position in the stream after its last id, int64.
            sequence_length: s.
            filler: id of the padding.
        """
        self._length = s = sequence_length
        self._filler = filler
        begins = np.concatenate(([0], document_ends[:-1])).astype(np.int64)
        labels = np.maximum(document_ends - begins - 1, 0)
        whole = labels // s  # rows that a document fills alone
        earlier = np.cumsum(whole) - whole
        within = np.arange(int(whole.sum())) - np.repeat(earlier, whole)
        self._alone = np.repeat(begins, whole) + within * s  # where each of these rows begins
        rest = np.flatnonzero(labels % s)
        lengths = (labels % s + 1)[rest].astype(np.int32)
        row_of, packed_rows = best_fit_decreasing(lengths, s)
        order = np.argsort(row_of, kind="stable")  # within a row as in the stream
        self._begins = (begins + whole * s)[rest][order]
        self._lengths = lengths[order]
        self._pieces = np.concatenate(([0], np.cumsum(np.bincount(row_of, minlength=packed_rows))))
        self.rows = len(self._alone) + packed_rows
        self.remainder_tokens = int(np.count_nonzero(document_ends - begins == 1))
        self.used_tokens = int(document_ends[-1]) - self.remainder_tokens if len(document_ends) else 0
        self.padding = packed_rows * s - int(lengths.sum(dtype=np.int64))

    def fill(self, tokens: np.ndarray | TokenFile, row: int, input_ids: np.ndarray, labels: np.ndarray) -> None:
        """Write a row into `input_ids` and `labels`.  # [s], [s]"""
        if row < len(self._alone):
            begin = int(self._alone[row])
            read = tokens[begin : begin + self._length + 1]
            input_ids[:] = read[:-1]
            labels[:] = read[1:]
            return
        input_ids[:] = self._filler
        labels[:] = IGNORED_LABEL
        first, after = self._pieces[row - len(self._alone) : row - len(self._alone) + 2]
        place = 0
        for begin, length in zip(self._begins[first:after].tolist(), self._lengths[first:after].tolist(), strict=True):
            read = tokens[begin : begin + length]
            input_ids[place : place + length] = read
            labels[place : place + length - 1] = read[1:]
            place += length

    def stretches(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the first and last positions in the stream of all that the rows read, ascending."""
        alone = self._alone[rows[rows < len(self._alone)]]
        packed = rows[rows >= len(self._alone)] - len(self._alone)
        pieces = [np.arange(self._pieces[row], self._pieces[row + 1]) for row in packed.tolist()]
        chosen = np.concatenate(pieces) if pieces else np.empty(0, np.int64)
        begins = np.concatenate((alone, self._begins[chosen]))
        lasts = np.concatenate((alone + self._length, self._begins[chosen] + self._lengths[chosen] - 1))
        order = np.argsort(begins, kind="stable")
        return begins[order], lasts[order]


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Assign pieces to rows: the longest first, each to the row with the least room that still holds it.

    Among pieces of one length the first one goes first. All pieces of a length are placed at once: a row that takes one
    has then the least room of all that still hold another, so it takes as many as it can before the next row gets any.
    With that the work is O(n log n + d c) for n pieces of d lengths and capacity c, almost all of it inside numpy.

    Args:
        lengths: of the pieces, each in [1, capacity].
        capacity: ids that a row holds.

    Returns:
        The row of each piece, int64; the number of rows.
    """
    row_of = np.empty(len(lengths), np.int64)
    narrow = lengths.astype(np.uint16) if capacity < 2**16 else lengths  # numpy sorts 16 bits by counting
    by_length = np.argsort(narrow, kind="stable")
    ends = np.cumsum(np.bincount(lengths, minlength=capacity + 1))
    with_room: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]  # rows by the room they have left
    is_open = np.zeros(capacity + 1, bool)
    rows = 0

    def open_up(room: int, found: np.ndarray) -> None:
        if room and len(found):
            with_room[room].append(found)
            is_open[room] = True

    def place(pieces: np.ndarray, length: int, room: int, candidates: np.ndarray) -> None:
        """Put pieces into rows of equal room, as many into each as it holds, and open the rows for shorter ones."""
        each = room // length
        used, last = -(-len(pieces) // each), (len(pieces) - 1) % each + 1
        row_of[pieces] = np.repeat(candidates[:used], each)[: len(pieces)]
        open_up(room - each * length, candidates[: used - 1])
        open_up(room - last * length, candidates[used - 1 : used])
        open_up(room, candidates[used:])

    for length in np.unique(lengths)[::-1].tolist():
        pieces = by_length[ends[length - 1] : ends[length]]
        for room in (np.flatnonzero(is_open[length:]) + length).tolist():
            if not len(pieces):
                break
            candidates = np.concatenate(with_room[room])
            with_room[room], is_open[room] = [], False
            fitting = len(candidates) * (room // length)
            place(pieces[:fitting], length, room, candidates)
            pieces = pieces[fitting:]
        if len(pieces):
            new = -(-len(pieces) // (capacity // length))
            place(pieces, length, capacity, np.arange(rows, rows + new))
            rows += new
    return row_of, rows
