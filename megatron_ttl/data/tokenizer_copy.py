"""The copy of a tokenizer beside a dataset, and what the manifest says of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_ttl.data.manifest import TokenizerRecord
from megatron_ttl.files import atomic_directory, checksum
from megatron_ttl.tokenizer.folder import copy_tokenizer
from megatron_ttl.tokenizer.tokenizer import Tokenizer


def holds_tokenizer(folder: Path, tokenizer: Tokenizer | None) -> bool:
    """Say whether a folder is a copy of the tokenizer."""
    model = folder / "tokenizer.model"
    return tokenizer is not None and model.is_file() and checksum(model) == tokenizer.checksum


def tokenizer_record(tokenizer: Tokenizer, copy: Path) -> TokenizerRecord:
    """Return what the manifest says of a tokenizer whose copy is at `copy`."""
    return TokenizerRecord(directory=copy.name, checksum=tokenizer.checksum, eos_id=tokenizer.eos_id,
                           bos_id=tokenizer.bos_id, vocab_size=tokenizer.vocab_size)


def place_tokenizer(tokenizer: Tokenizer, copy: Path) -> TokenizerRecord:
    """Put a copy of the tokenizer's folder at `copy`, unless it is there; return what the manifest says of it.

    Raises:
        DataError: a file of the folder is not what its name says.
        OSError: the copy cannot be written.
    """
    if not holds_tokenizer(copy, tokenizer):
        with atomic_directory(copy) as folder:
            copy_tokenizer(tokenizer.directory, folder)
    return tokenizer_record(tokenizer, copy)


def text_bytes_of(tokenizer: Tokenizer, counts: np.ndarray) -> int:
    """Return the UTF-8 bytes of the text that ids stand for, from how often each occurs.  # [at most vocab_size]"""
    return int(np.dot(counts.astype(np.int64), tokenizer.bytes_per_id()[: len(counts)]))
