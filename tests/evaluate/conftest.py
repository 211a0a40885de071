"""Datasets made with the tokenizer of the model folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_folder import documents, write_dataset


@pytest.fixture(scope="session")
def prefix(tmp_path_factory, tokenizer_folder) -> Path:
    """A dataset of 30 documents."""
    return write_dataset(tmp_path_factory.mktemp("data") / "valid", tokenizer_folder, documents(30, seed=7))


@pytest.fixture(scope="session")
def other_prefix(tmp_path_factory, tokenizer_folder) -> Path:
    """A dataset of 9 other documents, without BOS."""
    folder = tmp_path_factory.mktemp("data")
    return write_dataset(folder / "other", tokenizer_folder, documents(9, seed=8), bos=False)
