"""Checkpoints of a run opened directly: the models that their exports give, and what a score says of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_folders import checkpoint_of, config_of, ids_of, random_weights
from store_peers import on_all

from megatron_ttl.checkpoint.hf import export_run
from megatron_ttl.checkpoint.pieces import Piece
from megatron_ttl.checkpoint.store import CheckpointStore
from megatron_ttl.config.schema import ModelConfig
from megatron_ttl.errors import CheckpointError, UserError
from megatron_ttl.evaluate.answer import ModelAnswerer
from megatron_ttl.evaluate.open_run import checkpoint_steps, open_checkpoint, open_checkpoint_model, open_folder
from megatron_ttl.evaluate.task import Request
from megatron_ttl.generate.open_folder import open_model_folder

CONFIG = config_of(2)
RECORD = {"consumed_tokens": 1000, "energy": {"energy_kwh": 0.25, "emissions_kg_co2e": 0.1}, "bos": False}


def halves(tensor: torch.Tensor, rank: int) -> Piece:
    """The rows that one of two processes holds."""
    half = tensor.shape[0] // 2
    start = rank * half
    own = tensor[start : half if rank == 0 else None]
    return Piece(own.contiguous(), tuple(tensor.shape), (start, *(0,) * (tensor.dim() - 1)))


def write_settings(folder: Path, config: ModelConfig) -> None:
    (folder / "settings.json").write_text(json.dumps({"run": {"model": config.model_dump(mode="json")}}))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A run with a checkpoint that one process wrote, and one of the same weights that two wrote in pieces."""
    folder = tmp_path_factory.mktemp("runs") / "try"
    checkpoint_of(folder / "checkpoints", CONFIG, RECORD, step=20)
    weights = random_weights(CONFIG)

    def save(peers: Any) -> None:
        pieces = {name: halves(tensor, peers.rank) for name, tensor in weights.items()}
        CheckpointStore(folder / "checkpoints").save(40, {"weights": pieces}, {**RECORD, "consumed_tokens": 2000}, peers)

    on_all(2, save)
    write_settings(folder, CONFIG)
    shutil.copytree(tokenizer_folder, folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "m"
    export_run(run, folder, verify=False)
    return folder


def test_both_formats_give_the_model_of_the_export(run: Path, exported: Path) -> None:
    assert checkpoint_steps(run) == [20, 40]
    expected = open_model_folder(exported, "cpu")
    assert CheckpointStore(run / "checkpoints").open(40).manifest.version == 2
    for step in (20, 40, None):
        opened = open_checkpoint_model(run, step, "cpu")
        with torch.no_grad():
            assert torch.equal(opened.model(ids_of(CONFIG)), expected.model(ids_of(CONFIG)))
        assert opened.add_bos is expected.add_bos is False, "the data of the run have no BOS"
        asked = [Request("a menina", " viu o rio", 0), Request("", "o trem", 1)]
        assert ModelAnswerer(opened).loglikelihood(asked) == ModelAnswerer(expected).loglikelihood(asked)


def test_what_a_score_says_of_a_checkpoint(run: Path, exported: Path) -> None:
    """The same weights have one checksum: in one file or in pieces, and in a model folder."""
    first, last, folder = open_checkpoint(run, 20, "cpu").scored, open_checkpoint(run, None, "cpu").scored, open_folder(
        exported, "cpu").scored
    assert (first.name, first.run, first.step, first.tokens, first.kwh) == ("try", "try", 20, 1000, 0.25)
    assert (last.step, last.tokens) == (40, 2000)
    assert folder == last.model_copy(update={"name": "m"})
    assert first.checksum == last.checksum
    weights = open_checkpoint(run, None, "cpu").opened.model
    assert first.parameters == sum(weight.numel() for weight in weights.parameters())
    half = open_checkpoint(run, 20, "cpu", "bfloat16")
    assert half.scored.checksum == first.checksum, "it is of what is stored"
    assert next(half.opened.model.parameters()).dtype == torch.bfloat16


def test_a_folder_without_provenance(tmp_path: Path, exported: Path) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "theirs"))
    (folder / "megatron_ttl.json").unlink()
    theirs = open_folder(folder, "cpu").scored
    assert (theirs.name, theirs.run, theirs.step, theirs.tokens, theirs.kwh) == ("theirs", None, None, None, None)
    assert theirs.checksum == open_folder(exported, "cpu").scored.checksum


def test_a_provenance_of_other_weights(tmp_path: Path, exported: Path, capsys: pytest.CaptureFixture) -> None:
    """It is no word about these."""
    folder = Path(shutil.copytree(exported, tmp_path / "changed"))
    path = folder / "model.safetensors"
    payload = bytearray(path.read_bytes())
    payload[-1] ^= 1
    path.write_bytes(bytes(payload))
    scored = open_folder(folder, "cpu").scored
    assert (scored.run, scored.step, scored.kwh) == (None, None, None)
    assert scored.checksum != open_folder(exported, "cpu").scored.checksum
    assert "is not about the weights beside it" in capsys.readouterr().err


def test_a_provenance_that_is_no_record(tmp_path: Path, exported: Path) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "odd"))
    path = folder / "megatron_ttl.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "step": "forty", "consumed_tokens": []}))
    with pytest.raises(CheckpointError, match=r"megatron_ttl.json: cannot be read \(step, tokens\)"):
        open_folder(folder, "cpu")


def test_a_damaged_checkpoint(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture) -> None:
    """Asked for, it is refused; as the newest one, it is passed over aloud."""
    broken = Path(shutil.copytree(run, tmp_path / "try"))
    path = broken / "checkpoints" / "step-00000040" / "weights-00001.safetensors"
    payload = bytearray(path.read_bytes())
    payload[-1] ^= 1
    path.write_bytes(bytes(payload))
    with pytest.raises(CheckpointError, match="weights-00001.safetensors"):
        open_checkpoint_model(broken, 40, "cpu")
    assert open_checkpoint(broken, None, "cpu").scored.step == 20
    assert "checkpoint of step 40 passed over" in capsys.readouterr().err


@pytest.mark.parametrize(("damage", "message"), [
    (lambda run: (run / "settings.json").unlink(), "is no run folder"),
    (lambda run: shutil.rmtree(run / "tokenizer"), "tokenizer: does not exist"),
    (lambda run: shutil.rmtree(run / "checkpoints"), "has no checkpoint yet"),
    (lambda run: write_settings(run, config_of(3)), "the run's settings ask for"),
    (lambda run: write_settings(run, config_of(2, 60)), "pieces, the model 60 rows"),
])
def test_broken_runs(tmp_path: Path, run: Path, damage: Any, message: str) -> None:
    broken = Path(shutil.copytree(run, tmp_path / "try"))
    damage(broken)
    with pytest.raises(UserError, match=message):
        open_checkpoint_model(broken, None, "cpu")


def test_wrong_arguments(run: Path) -> None:
    with pytest.raises(UserError, match="dtype: 'float8'"):
        open_checkpoint_model(run, None, "cpu", "float8")
    with pytest.raises(CheckpointError, match=r"step must be one of those kept \(20, 40\)"):
        open_checkpoint_model(run, 30, "cpu")
