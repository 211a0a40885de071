"""One tokenizer and one model for all tests of generation."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_folder import write_model_folder

from megatron_ttl.generate.open_folder import OpenModel, open_model_folder


@pytest.fixture(scope="session", params=[4, 2], ids=["mha", "gqa"])
def model_folder(request, tmp_path_factory, tokenizer_folder) -> Path:
    """A random model with 4 query heads, written by transformers."""
    return write_model_folder(tmp_path_factory.mktemp("model") / "tiny", tokenizer_folder, request.param)


@pytest.fixture(scope="session")
def opened(model_folder) -> OpenModel:
    """The same, opened on the CPU in fp32."""
    return open_model_folder(model_folder, "cpu")
