"""Account for a tokenised dataset: what it holds, whether it is whole, how it reads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from megatron_ttl.data.indexed_dataset import IndexedDataset
from megatron_ttl.errors import ConfigError, DataError, raise_faults
from megatron_ttl.tokenizer.tokenizer import Tokenizer

_BLOCK_TOKENS = 1 << 22
_SHOWN_FAULTS = 10
_SPECIAL_IDS = 4  # <unk> <s> </s> <pad>


def inspect_dataset(prefix: str | os.PathLike[str], verify: bool = False,
                    on_progress: Callable[[float], None] | None = None) -> dict[str, Any]:
    """Return counts, shares and the unigram entropy of a dataset; one pass over its ids, in bounded memory.

    Args:
        prefix: path without suffix.
        verify: compare all checksums, and look for exactly one EOS at the end of every document.
        on_progress: is given the tokens done.

    Raises:
        DataError: the dataset is damaged; with `verify`, also for what only a full read finds.
    """
    dataset = IndexedDataset(prefix, verify=verify)
    manifest = dataset.manifest
    scan = _scan(dataset, on_progress)
    result: dict[str, Any] = {
        "prefix": dataset.prefix,
        "documents": dataset.document_count,
        "tokens": dataset.token_count,
        "dtype": dataset.dtype.name,
        "bin_bytes": dataset.token_count * dataset.dtype.itemsize,
        "largest_id": scan["largest_id"],
        "distinct_ids": scan["distinct_ids"],
        "unigram_entropy_nats": scan["entropy"],
        "longest_run": scan["longest_run"],
        "longest_run_id": scan["longest_run_id"],
        "longest_run_at": scan["longest_run_at"],
    }
    if manifest is None:
        result["manifest"] = "none: written by another program, its tokenizer is unknown"
    else:
        special = scan["counts"][:_SPECIAL_IDS].sum()
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
        raise_faults(DataError, _content_faults(dataset, scan))
        result["verified"] = "checksums, one EOS per document" if manifest else "structure (there is no manifest)"
    return result


def decoded_documents(prefix: str | os.PathLike[str], count: int) -> Iterator[tuple[int, int, str]]:
    """Yield (number, tokens, text) of the first documents, decoded with the tokenizer's copy beside the data.

    Raises:
        ConfigError: the count is negative.
        DataError: the dataset has no manifest, or its tokenizer is not there.
    """
    if count < 0:
        raise ConfigError(f"--show: {count}; must be 0 or more; write how many documents to show")
    dataset = IndexedDataset(prefix)
    if dataset.manifest is None:
        raise DataError(f"{dataset.prefix}: has no manifest, so its tokenizer is unknown; must have one to be decoded; "
                        "inspect it without --show")
    tokenizer = Tokenizer.load(dataset.paths.manifest.parent / dataset.manifest.tokenizer.directory)
    for number in range(min(count, dataset.document_count)):
        ids = dataset.document(number)
        yield number, len(ids), tokenizer.decode([i for i in ids.tolist() if i >= _SPECIAL_IDS or i == 0])


def _scan(dataset: IndexedDataset, on_progress: Callable[[float], None] | None) -> dict[str, Any]:
    """Count every id and find the longest run of one id, block by block."""
    counts = np.zeros(0, np.int64)
    best = (0, 0, 0)  # length, id, position
    run_id, run_length = -1, 0
    for start in range(0, dataset.token_count, _BLOCK_TOKENS):
        block = np.asarray(dataset.tokens[start : start + _BLOCK_TOKENS]).astype(np.int64)
        found = np.bincount(block)
        if len(found) > len(counts):
            counts = np.pad(counts, (0, len(found) - len(counts)))
        counts[: len(found)] += found
        changes = np.flatnonzero(np.diff(block)) + 1
        begins, ends = np.append(0, changes), np.append(changes, len(block))
        lengths = ends - begins
        if block[0] == run_id:
            lengths[0] += run_length  # the run began in the block before
        longest = int(lengths.argmax())
        if lengths[longest] > best[0]:
            best = (int(lengths[longest]), int(block[begins[longest]]), start + int(ends[longest] - lengths[longest]))
        run_id, run_length = int(block[-1]), int(lengths[-1])
        if on_progress:
            on_progress(start + len(block))
    shares = counts[counts > 0] / max(1, dataset.token_count)
    return {"counts": counts, "largest_id": len(counts) - 1, "distinct_ids": int((counts > 0).sum()),
            "entropy": float(-(shares * np.log(shares)).sum()), "longest_run": best[0], "longest_run_id": best[1],
            "longest_run_at": best[2]}


def _content_faults(dataset: IndexedDataset, scan: dict[str, Any]) -> list[str]:
    manifest = dataset.manifest
    if manifest is None:
        return []
    faults = []
    if scan["largest_id"] >= manifest.tokenizer.vocab_size:
        faults.append(f"{dataset.paths.bin}: holds id {scan['largest_id']}; must be below the vocabulary's "
                      f"{manifest.tokenizer.vocab_size}; write the dataset again")
    eos = manifest.tokenizer.eos_id
    for number in range(dataset.document_count):
        places = np.flatnonzero(dataset.document(number) == eos)
        if len(places) != 1 or places[0] != len(dataset.document(number)) - 1:
            faults.append(f"{dataset.paths.bin}: document {number} has {len(places)} EOS; must have exactly one, at its "
                          "end; write the dataset again")
            if len(faults) >= _SHOWN_FAULTS:
                break
    return faults
