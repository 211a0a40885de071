"""A small random model, and a task of a few rows, as files."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_folder import write_model_folder, write_tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    """A tokenizer of 350 pieces."""
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tiny")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tokenizer_folder) -> Path:
    """A random model with 48 positions."""
    return write_model_folder(tmp_path_factory.mktemp("model") / "tiny", tokenizer_folder)
