"""A model folder opens whole or says what is wrong with it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from tiny_folder import write_model_folder

from megatron_ttl.errors import CheckpointError, DataError, UserError
from megatron_ttl.generate.open_folder import choose_device, open_model_folder


@pytest.fixture
def copy(model_folder, tmp_path):
    """A folder of one's own to damage."""
    return shutil.copytree(model_folder, tmp_path / "copy")


def test_it_opens(model_folder):
    opened = open_model_folder(model_folder, "cpu", "bfloat16")
    assert (opened.config.vocab_size, opened.tokenizer.vocab_size, opened.add_bos) == (350, 350, True)
    assert {weight.dtype for weight in opened.model.parameters()} == {torch.bfloat16}
    assert not opened.model.training


def test_auto_takes_cuda_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto") == torch.device("cuda")
    assert choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UserError, match="'cuda:2'; this machine has: cpu, cuda, cuda:0, cuda:1; choose"):
        choose_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    for name in ("cuda", "tpu", "", "cpu:1"):
        with pytest.raises(UserError, match=f"device: '{name}'; this machine has: cpu; choose one of them"):
            choose_device(name)


def test_unknown_dtype(model_folder):
    with pytest.raises(UserError, match="dtype: 'float64'; it must be one of float32, bfloat16"):
        open_model_folder(model_folder, "cpu", "float64")


def test_missing_folder(tmp_path):
    with pytest.raises(CheckpointError, match="none: does not exist"):
        open_model_folder(tmp_path / "none", "cpu")


def test_missing_tokenizer(copy):
    (copy / "tokenizer.model").unlink()
    with pytest.raises(DataError, match="tokenizer.model: does not exist"):
        open_model_folder(copy, "cpu")


def test_tokenizer_larger_than_the_model(tmp_path, tokenizer_folder):
    small = write_model_folder(tmp_path / "small", tokenizer_folder, vocab_size=340)
    with pytest.raises(CheckpointError, match="the tokenizer has 350 pieces, the model 340 rows;"):
        open_model_folder(small, "cpu")


@pytest.mark.parametrize(("text", "message"), [
    (None, r"tokenizer_config.json: cannot be read \(No such file"),
    ("{", "tokenizer_config.json: is not JSON"),
    ("[]", "tokenizer_config.json: holds list; it must be a JSON object"),
    ('{"add_bos_token": "yes"}', "add_bos_token: 'yes'; it must be true or false; convert"),
])
def test_bad_tokenizer_config(copy, text, message):
    path = copy / "tokenizer_config.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(CheckpointError, match=message):
        open_model_folder(copy, "cpu")


@pytest.mark.parametrize(("value", "wanted"), [({"add_bos_token": False}, False), ({}, True)])
def test_bos_policy(copy, value, wanted):
    (copy / "tokenizer_config.json").write_text(json.dumps(value))
    assert open_model_folder(copy, "cpu").add_bos is wanted
