"""Fixtures of the checkpoint tests."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hf_folders import checkpoint_of, config_of
from tiny_folder import write_tokenizer

from megatron_ttl.checkpoint.hf import export_model_folder
from megatron_ttl.checkpoint.store import CheckpointStore


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "run" / "checkpoints", keep_last=3)


# --- round trip ---


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tiny")


@pytest.fixture(scope="module", params=[6, 2], ids=["mha", "gqa"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory,
             tokenizer: Path) -> Any:
    folder, config = tmp_path_factory.mktemp("exported"), config_of(request.param)
    checkpoint = checkpoint_of(folder / "checkpoints", config)
    result = export_model_folder(checkpoint, config, tokenizer, folder / "model", run_name="try")
    return SimpleNamespace(folder=folder / "model", config=config, checkpoint=checkpoint, result=result)
