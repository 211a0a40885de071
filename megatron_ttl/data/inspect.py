"""Account for a tokenised dataset: what it holds, whether it is whole, how it reads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from megatron_ttl.data.indexed_dataset import IndexedDataset
from megatron_ttl.data.manifest import TokenizerRecord
from megatron_ttl.errors import ConfigError, DataError, raise_faults
from megatron_ttl.tokenizer.tokenizer import Tokenizer

_BLOCK_TOKENS = 1 << 20  # fits the cache
_KEPT_FAULTS = 30
_FILLER_TOKENS = 2_048  # so many equal ids in a row are no text
_LARGEST_VOCABULARY = 1 << 24
_SPECIAL_IDS = 4  # <unk> <s> </s> <pad>


def inspect_dataset(prefix: str | os.PathLike[str], verify: bool = False,
                    on_progress: Callable[[float], None] | None = None) -> dict[str, Any]:
    """Return counts, shares and the unigram entropy of a dataset; one pass over its ids, in bounded memory.

    Args:
        prefix: path without suffix.
        verify: compare all checksums; refuse documents without exactly one EOS, at the end, ids outside of
            the vocabulary, and filler (thousands of equal ids in a row).
        on_progress: is given the bytes of the `.bin` that were read.

    Raises:
        DataError: the dataset is damaged; with `verify`, also for what only a full read finds.
    """
    dataset = IndexedDataset(prefix, verify=False)  # damaged data can be looked at
    manifest = dataset.manifest
    scan = Scan(dataset, manifest.tokenizer if manifest else None).run(on_progress)
    length, run_id, position = scan.longest_run
    shares = scan.counts[scan.counts > 0] / max(1, dataset.token_count)
    result: dict[str, Any] = {
        "prefix": dataset.prefix,
        "documents": dataset.document_count,
        "tokens": dataset.token_count,
        "dtype": dataset.dtype.name,
        "bin_bytes": dataset.token_count * dataset.dtype.itemsize,
        "largest_id": len(scan.counts) - 1,
        "distinct_ids": len(shares),
        "unigram_entropy_nats": float(-(shares * np.log(shares)).sum()),
        "longest_run": length,
        "longest_run_id": run_id,
        "longest_run_at": position,
    }
    if manifest is None:
        result["manifest"] = "none: written by another program, its tokenizer is unknown"
    else:
        special = scan.counts[:_SPECIAL_IDS].sum()
        result |= {
            "text_bytes": manifest.text_bytes,
            "bytes_per_token": manifest.text_bytes / max(1, dataset.token_count),
            "vocab_size": manifest.tokenizer.vocab_size,
            "tokenizer": manifest.tokenizer.checksum,
            "bos": manifest.bos,
            "eos": manifest.eos,
            "special_token_share": float(special) / max(1, dataset.token_count),
            "role": manifest.held_out.role if manifest.held_out else "train",
            "rejected_lines": sum(manifest.rejected.values()),
        }
    if verify:
        raise_faults(DataError, [*dataset.checksum_faults(), *content_faults(dataset, scan)])
        result["verified"] = "checksums, one EOS per document" if manifest else "structure (has no manifest)"
    return result


def decoded_documents(prefix: str | os.PathLike[str], count: int, first: int = 0) -> Iterator[tuple[int, int, str]]:
    """Yield (number, tokens, text) of `count` documents from `first` on, decoded with the tokenizer's copy beside the data.

    Raises:
        ConfigError: the count is negative, or there is no such document.
        DataError: the dataset has no manifest, or its tokenizer is not there.
    """
    if count < 0:
        raise ConfigError(f"--show: {count}; must be 0 or more; write how many documents to show")
    dataset = IndexedDataset(prefix, verify=False)
    if dataset.manifest is None:
        raise DataError(f"{dataset.prefix}: has no manifest, so its tokenizer is unknown; must have one to "
                        "be decoded; inspect it without --show")
    if not 0 <= first < max(1, dataset.document_count):
        raise ConfigError(f"--first: {first}; must be a number from 0 to {dataset.document_count - 1:,}; write the first "
                          "document to show")
    tokenizer = Tokenizer.load(dataset.paths.manifest.parent / dataset.manifest.tokenizer.directory)
    for number in range(first, min(first + count, dataset.document_count)):
        ids = dataset.document(number)
        yield number, len(ids), tokenizer.decode([i for i in ids.tolist() if i >= _SPECIAL_IDS or i == 0])


class Scan:
    """One pass over the ids, block by block: how often each occurs, the longest run, wrong EOS.

    Args:
        dataset: what is read.
        tokenizer: says which id is EOS; absent: nobody knows.

    Attributes:
        counts: how often each id occurs.  # [largest id + 1]
        longest_run: length, id and position of the longest run of one id.
    """

    def __init__(self, dataset: IndexedDataset, tokenizer: TokenizerRecord | None) -> None:
        self.counts = np.zeros(0, np.int64)
        self.longest_run = (0, 0, 0)
        self.wrong_documents: set[int] = set()
        self._open_run = (-1, 0)  # id and length of the run that the last block ended with
        self._dataset = dataset
        self.tokenizer = tokenizer
        self._eos = tokenizer.eos_id if tokenizer else None
        self._ends = dataset.document_ends() if self._eos is not None else np.empty(0, np.int64)

    def run(self, on_progress: Callable[[float], None] | None) -> Scan:
        """Read everything."""
        total = self._dataset.token_count
        for start in range(0, total, _BLOCK_TOKENS):
            block = self._dataset.ids[start : start + _BLOCK_TOKENS]
            self._count(start, block)
            self._follow_runs(start, block)
            if self._eos is not None:
                self._check_ends(start, block)
            if on_progress:
                on_progress((start + len(block)) * block.itemsize)
        return self

    def _count(self, start: int, block: np.ndarray) -> None:
        smallest, largest = int(block.min()), int(block.max())
        if smallest < 0 or largest >= _LARGEST_VOCABULARY:
            place = start + int(block.argmin() if smallest < 0 else block.argmax())
            raise DataError(f"{self._dataset.paths.bin}: holds id {smallest if smallest < 0 else largest} at "
                            f"token {place:,}; no tokenizer has it; write the dataset again")
        found = np.bincount(block)
        if len(found) > len(self.counts):
            self.counts = np.pad(self.counts, (0, len(found) - len(self.counts)))
        self.counts[: len(found)] += found

    def _follow_runs(self, start: int, block: np.ndarray) -> None:
        changes = np.flatnonzero(block[1:] != block[:-1]) + 1
        begins, ends = np.append(0, changes), np.append(changes, len(block))
        lengths = ends - begins
        if block[0] == self._open_run[0]:
            lengths[0] += self._open_run[1]
        longest = int(lengths.argmax())
        if lengths[longest] > self.longest_run[0]:
            self.longest_run = (int(lengths[longest]), int(block[begins[longest]]),
                                start + int(ends[longest] - lengths[longest]))
        self._open_run = (int(block[-1]), int(lengths[-1]))

    def _check_ends(self, start: int, block: np.ndarray) -> None:
        # The places of EOS and the last places of the documents must be the same set.
        first, after = np.searchsorted(self._ends, [start, start + len(block)], side="right")
        places = start + np.flatnonzero(block == self._eos)
        unmatched = np.setxor1d(places, self._ends[first:after] - 1)
        numbers = np.searchsorted(self._ends, unmatched[:_KEPT_FAULTS], side="right")
        self.wrong_documents.update(numbers.tolist())


def content_faults(dataset: IndexedDataset, scan: Scan) -> list[str]:
    """Name filler, ids outside of the vocabulary, and documents without exactly one EOS, at the end."""
    faults = []
    length, run_id, position = scan.longest_run
    if length >= _FILLER_TOKENS:
        faults.append(f"{dataset.paths.bin}: holds id {run_id} {length:,} times in a row from token "
                      f"{position:,}; text has no such runs, filler has; look at the documents "
                      "there, and leave them out")
    if scan.tokenizer is None:
        return faults
    size = scan.tokenizer.vocab_size
    if len(scan.counts) > size:
        faults.append(f"{dataset.paths.bin}: holds id {len(scan.counts) - 1}; must be below the vocabulary's "
                      f"{size}; write the dataset again")
    eos = scan.tokenizer.eos_id
    for number in sorted(scan.wrong_documents)[:_KEPT_FAULTS]:
        ids = dataset.document(number)
        faults.append(f"{dataset.paths.bin}: document {number} has {np.count_nonzero(ids == eos)} EOS (id "
                      f"{eos}) and ends with id {ids[-1]}; must have exactly one, at its end; write it again")
    return faults
