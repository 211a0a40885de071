from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hf_folders import (
    checkpoint_of,
    config_of,
)
from torch import Tensor

from megatron_ttl.checkpoint.hf import export_run, load_model_folder
from megatron_ttl.errors import CheckpointError


@pytest.fixture
def foreign(tmp_path: Path, exported: Any) -> Path:
    return Path(shutil.copytree(exported.folder, tmp_path / "foreign"))


def change_weights(folder: Path, **changes: Tensor | None) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


def test_all_faults_of_weights_at_once(foreign: Path) -> None:
    change_weights(foreign, lm_head__weight=None, extra__weight=torch.ones(1),
                   model__norm__weight=torch.ones(47),
                   model__layers__0__input_layernorm__weight=torch.ones(48, dtype=torch.int64),
                   model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4))
    with pytest.raises(CheckpointError) as caught:
        load_model_folder(foreign)
    text = str(caught.value)
    assert len(caught.value.faults) == 4
    assert "lm_head.weight: is missing; the config asks for (352, 48)" in text
    assert "'extra.weight': is not a weight of this model" in text
    assert "model.norm.weight: has shape (47,); the config asks for (48,)" in text
    assert "input_layernorm.weight: is I64; it must be one of BF16, F16, F32" in text


def test_pickled_weights_are_not_opened(foreign: Path) -> None:
    (foreign / "model.safetensors").rename(foreign / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="has no model.safetensors; pytorch_model.bin is not read, for "
                                              "opening such a file can run code; weights must be "
                                              "safetensors"):
        load_model_folder(foreign)
    (foreign / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match="has no model.safetensors; weights must be safetensors"):
        load_model_folder(foreign)


@pytest.mark.parametrize("name",
                         ["../model.safetensors", "/x.safetensors", "a/b.safetensors", "model.bin", "", 5,
                          None, ".safetensors"])
def test_an_index_cannot_leave_the_folder(foreign: Path, name: Any) -> None:
    (foreign / "model.safetensors").rename(foreign.parent / "model.safetensors")
    index = json.dumps({"weight_map": {"lm_head.weight": name}})
    (foreign / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match="index.json: file .*; it must be a safetensors file of this "
                                              "folder"):
        load_model_folder(foreign)


def test_a_tensor_in_two_files(foreign: Path) -> None:
    (foreign / "model.safetensors").rename(foreign / "a.safetensors")
    safetensors.torch.save_file({"lm_head.weight": torch.ones(352, 48)}, foreign / "b.safetensors")
    index = json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}})
    (foreign / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match="lm_head.weight: stands in two files; it must stand in one"):
        load_model_folder(foreign)


@pytest.mark.parametrize("index",
                         ["{}", '{"weight_map": []}', '{"weight_map": {}}', "[",
                          '{"weight_map": {"a": "absent.safetensors"}}'])
def test_an_index_without_files(foreign: Path, index: str) -> None:
    (foreign / "model.safetensors").unlink()
    (foreign / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match="index.json|is missing|absent.safetensors: is no readable "
                                              "safetensors file"):
        load_model_folder(foreign)


@pytest.mark.parametrize("payload",
                         [b"", b"x", b"\xff" * 100, (2**63).to_bytes(8, "little") + b"{}", b"\x80\x04K\x01."])
def test_damaged_weights(foreign: Path, payload: bytes) -> None:
    (foreign / "model.safetensors").write_bytes(payload)
    with pytest.raises(CheckpointError, match="model.safetensors: is no readable safetensors file"):
        load_model_folder(foreign)


def test_cut_weights(foreign: Path) -> None:
    os.truncate(foreign / "model.safetensors", (foreign / "model.safetensors").stat().st_size - 1)
    with pytest.raises(CheckpointError, match="model.safetensors: is no readable safetensors file"):
        load_model_folder(foreign)


def test_a_huge_config_asks_for_no_memory(foreign: Path) -> None:
    config = json.loads((foreign / "config.json").read_text())
    (foreign / "config.json").write_text(json.dumps({**config, "vocab_size": 2**31 - 1}))
    with pytest.raises(CheckpointError,
                       match=r"lm_head.weight: has shape \(352, 48\); .* asks for \(2147483647, 48\)"):
        load_model_folder(foreign)
    (foreign / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2**31 - 1}))
    with pytest.raises(CheckpointError, match="num_hidden_layers: 2147483647; it must be a whole number from "
                                              "1 to 10000"):
        load_model_folder(foreign)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="absent: does not exist; it must be a model folder"):
        load_model_folder(tmp_path / "absent")


# --- the command ---


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    folder, config = tmp_path_factory.mktemp("runs") / "try", config_of(2)
    for step in (20, 40):
        checkpoint_of(folder / "checkpoints", config, step=step)
    (folder / "settings.json").write_text(json.dumps({"run": {"model": config.model_dump(mode="json")}}))
    shutil.copytree(tokenizer, folder / "tokenizer")
    return folder


def convert(repository: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "tools/convert_to_hf.py", *map(str, arguments)], cwd=repository,
                          text=True, capture_output=True)


def test_the_command(repository: Path, run_folder: Path, tmp_path: Path) -> None:
    done = convert(repository, "--run", run_folder, "--output", tmp_path / "m", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["step"], result["dtype"], result["verified"]) == (40, "float32", "yes")
    assert result["warnings"] == []
    assert load_model_folder(tmp_path / "m")[1] == config_of(2)
    done = convert(repository, "--run", run_folder, "--output", tmp_path / "m", "--no-verify", "--step", "30")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "step must be one of those kept (20, 40)" in done.stderr


def test_a_damaged_checkpoint_is_passed_over_aloud(run_folder: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(run_folder, tmp_path / "run"))
    (run / "checkpoints" / "step-00000040" / "weights.safetensors").write_bytes(b"")
    result = export_run(run, tmp_path / "m", verify=False)
    assert result["step"] == 20 and "checkpoint of step 40 passed over" in result["warnings"][0]


@pytest.mark.parametrize(("damage", "message"), [
    (lambda run: shutil.rmtree(run / "checkpoints"), "run: has no checkpoint yet"),
    (lambda run: (run / "settings.json").unlink(), "run: is no run folder .it has no settings.json."),
    (lambda run: (run / "settings.json").write_text("{}"), "settings.json: run.model cannot be read"),
    (lambda run: (run / "settings.json").write_text('{"run": {"model": {"hidden_size": "a"}}}'),
     "settings.json: run.model cannot be read"),
    (lambda run: (run / "settings.json").write_text('{"run": []}'),
     "settings.json: run.model cannot be read"),
])
def test_broken_run_folders(run_folder: Path, tmp_path: Path, damage: Any, message: str) -> None:
    run = Path(shutil.copytree(run_folder, tmp_path / "run"))
    damage(run)
    with pytest.raises(CheckpointError, match=message):
        export_run(run, tmp_path / "m", verify=False)
