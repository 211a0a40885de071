"""A model folder, and datasets made with its tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_folder import documents, write_dataset, write_model_folder, write_tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    """A tokenizer of 350 pieces."""
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tiny")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tokenizer_folder) -> Path:
    """A random model with 48 positions, written by transformers."""
    return write_model_folder(tmp_path_factory.mktemp("model") / "tiny", tokenizer_folder)


@pytest.fixture(scope="session")
def prefix(tmp_path_factory, tokenizer_folder) -> Path:
    """A dataset of 30 documents."""
    return write_dataset(tmp_path_factory.mktemp("data") / "valid", tokenizer_folder, documents(30, seed=7))


@pytest.fixture(scope="session")
def other_prefix(tmp_path_factory, tokenizer_folder) -> Path:
    """A dataset of 9 other documents, without BOS."""
    folder = tmp_path_factory.mktemp("data")
    return write_dataset(folder / "other", tokenizer_folder, documents(9, seed=8), bos=False)
