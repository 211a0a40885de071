from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from hf_folders import (
    FILES,
    PROMPT,
    checkpoint_of,
    config_of,
    ids_of,
    random_weights,
    transformers_model,
)
from tiny_folder import write_model_folder

from megatron_ttl.checkpoint import hf as hf_module
from megatron_ttl.checkpoint.hf import export_model_folder, load_model_folder
from megatron_ttl.checkpoint.names import hf_names, split_to_hf
from megatron_ttl.checkpoint.store import CheckpointStore
from megatron_ttl.config.schema import ModelConfig
from megatron_ttl.errors import CheckpointError, ConfigError, DataError, DiskError


def test_logits_and_gradients_are_transformers(exported: Any) -> None:
    theirs = transformers_model(exported.folder)
    ours, config = load_model_folder(exported.folder)
    assert config == exported.config
    ids = ids_of(config)
    labels = ids.roll(-1, dims=1)
    labels[:, -1] = -100
    logits = ours(ids)
    their_logits = theirs(ids).logits
    assert their_logits.std() > 0.5, "the comparison would say nothing"
    assert (logits - their_logits).abs().max() <= 1e-5

    for computed in (logits, their_logits):
        torch.nn.functional.cross_entropy(computed.flatten(0, 1), labels.flatten()).backward()
    gradients = {hf: piece for name, parameter in ours.named_parameters()
                 for hf, piece in split_to_hf(name, parameter.grad, config).items()}
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


def test_the_folder_holds_the_checkpoints_bits(exported: Any) -> None:
    stored = safetensors.torch.load_file(exported.folder / "model.safetensors")
    weights = exported.checkpoint.tensors("weights")
    assert stored.keys() == weights.keys()
    assert all(torch.equal(stored[name], weights[name]) for name in weights)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_a_model_written_by_transformers(tmp_path: Path, tokenizer: Path, kv_heads: int) -> None:
    folder = write_model_folder(tmp_path / "theirs", tokenizer, kv_heads)
    ours, config = load_model_folder(folder)
    with torch.no_grad():
        assert (ours(ids_of(config)) - transformers_model(folder)(ids_of(config)).logits).abs().max() <= 1e-5


def test_auto_tokenizer_reads_the_folder(exported: Any) -> None:
    from transformers import AutoTokenizer

    from megatron_ttl.tokenizer.tokenizer import Tokenizer

    theirs, ours = AutoTokenizer.from_pretrained(exported.folder), Tokenizer.load(exported.folder)
    assert theirs.encode(PROMPT, add_special_tokens=False) == ours.encode(PROMPT)
    assert theirs.decode(ours.encode(PROMPT)) == PROMPT
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 3)


def test_transformers_generates_from_the_folder(exported: Any) -> None:
    model = transformers_model(exported.folder)
    ids = model.generate(torch.tensor([[1, 5, 6]]), max_new_tokens=5, do_sample=False)
    assert ids.shape[1] > 3 and model.generation_config.eos_token_id == 2


def test_bfloat16_rounds_once(tmp_path: Path, tokenizer: Path, exported: Any) -> None:
    result = export_model_folder(exported.checkpoint, exported.config, tokenizer, tmp_path / "m", "bfloat16")
    assert result["verified"] == "yes"
    stored = safetensors.torch.load_file(tmp_path / "m" / "model.safetensors")
    for name, tensor in exported.checkpoint.tensors("weights").items():
        assert torch.equal(stored[name], tensor.bfloat16())
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == "bfloat16"
    model, _ = load_model_folder(tmp_path / "m", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


# --- what lies in the folder ---


def test_files_and_provenance(exported: Any) -> None:
    assert {path.name for path in exported.folder.iterdir()} == FILES
    provenance = json.loads((exported.folder / "megatron_ttl.json").read_text())
    assert (provenance["run"], provenance["step"], provenance["consumed_tokens"]) == ("try", 40, 1000)
    assert provenance["files"].keys() == FILES - {"megatron_ttl.json"}
    for name, entry in provenance["files"].items():
        payload = (exported.folder / name).read_bytes()
        assert entry == {"bytes": len(payload), "sha256": hashlib.sha256(payload).hexdigest()}
    proof = provenance["verification"]
    assert proof["verified"] == "yes" and proof["largest_logit_difference"] <= 1e-5
    modes = {path.stat().st_mode & 0o044 for path in exported.folder.iterdir()}
    assert modes == {0o044}, "others must be able to read it"
    everything = "".join(path.read_text() for path in exported.folder.glob("*.json"))
    assert str(exported.folder.parent) not in everything, "it must not tell of this machine"


def test_several_files_with_an_index(tmp_path: Path, tokenizer: Path, exported: Any) -> None:
    export_model_folder(exported.checkpoint, exported.config, tokenizer, tmp_path / "m",
                        max_shard_bytes=50_000)
    names = sorted(path.name for path in (tmp_path / "m").glob("*.safetensors"))
    assert len(names) > 5 and names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == names
    sizes = [tensor.nbytes for tensor in exported.checkpoint.tensors("weights").values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    largest = max(sizes)
    assert all((tmp_path / "m" / name).stat().st_size <= max(50_000, largest) + 4096 for name in names)
    ids = ids_of(exported.config)
    with torch.no_grad():
        assert torch.equal(load_model_folder(tmp_path / "m")[0](ids),
                           load_model_folder(exported.folder)[0](ids))


@pytest.mark.parametrize("bos", [True, False, None])
def test_bos_follows_the_data(tmp_path: Path, tokenizer: Path, bos: bool | None) -> None:
    config = config_of(2)
    record = {} if bos is None else {"bos": bos}
    export_model_folder(checkpoint_of(tmp_path / "c", config, record), config, tokenizer, tmp_path / "m",
                        verify=False)
    from transformers import AutoTokenizer

    begins = AutoTokenizer.from_pretrained(tmp_path / "m").encode("a")[0] == 1
    assert begins == (True if bos is None else bos)


# --- what is refused ---


def test_an_output_is_not_overwritten_unasked(tmp_path: Path, tokenizer: Path, exported: Any) -> None:
    def export(**options: Any) -> None:
        export_model_folder(exported.checkpoint, exported.config, tokenizer, tmp_path / "m", verify=False,
                            **options)

    (tmp_path / "m").mkdir()
    export()
    with pytest.raises(ConfigError, match="m: exists and is not empty; a model is not overwritten unasked"):
        export()
    (tmp_path / "m" / "old.txt").write_text("")
    export(overwrite=True)
    assert {path.name for path in (tmp_path / "m").iterdir()} == FILES and os.listdir(tmp_path) == ["m"]
    (tmp_path / "m" / "config.json").unlink()
    with pytest.raises(ConfigError, match="m: is not empty and no model folder .* only a model folder is "
                                          "overwritten"):
        export(overwrite=True)
    shutil.rmtree(tmp_path / "m")
    (tmp_path / "m").write_text("")
    with pytest.raises(ConfigError, match="m: is a file; the output must be a folder"):
        export(overwrite=True)
    with pytest.raises(ConfigError, match="--dtype: 'float8'; it must be one of float32, bfloat16"):
        export_model_folder(exported.checkpoint, exported.config, tokenizer, tmp_path / "n", "float8")


def test_weights_of_another_config(tmp_path: Path, tokenizer: Path, exported: Any) -> None:
    other = exported.config.model_copy(update={"intermediate_size": 96, "num_hidden_layers": 4})
    with pytest.raises(CheckpointError,
                       match=r"mlp.down_proj.weight: has shape \(48, 80\); .* ask for \(48, 96\)") as caught:
        export_model_folder(exported.checkpoint, other, tokenizer, tmp_path / "m")
    assert len(caught.value.faults) == 3 * 3 + 9


def test_a_tokenizer_that_does_not_fit(tmp_path: Path, tokenizer: Path) -> None:
    config = config_of(2, vocab_size=300)
    checkpoint = checkpoint_of(tmp_path / "c", config)
    with pytest.raises(CheckpointError, match="tiny: has 350 pieces, the model 300 rows; every piece must "
                                              "have a row"):
        export_model_folder(checkpoint, config, tokenizer, tmp_path / "m")
    with pytest.raises(DataError, match="absent: does not exist"):
        export_model_folder(checkpoint, config, tmp_path / "absent", tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(("damage", "message"), [
    (lambda folder: (folder / "tokenizer_config.json").unlink(),
     "tokenizer_config.json: is missing; a tokenizer folder has it"),
    (lambda folder: (folder / "tokenizer_config.json").write_text('{"auto_map": {}}'),
     "'auto_map' names code to load"),
])
def test_a_tokenizer_folder_for_others(tmp_path: Path, tokenizer: Path, exported: Any, damage: Any,
                                       message: str) -> None:
    shutil.copytree(tokenizer, tmp_path / "t")
    damage(tmp_path / "t")
    with pytest.raises(DataError, match=message):
        export_model_folder(exported.checkpoint, exported.config, tmp_path / "t", tmp_path / "m")
    assert os.listdir(tmp_path) == ["t"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"),
                                   OSError(errno.EIO, "Input/output error")])
def test_a_full_disk_leaves_nothing(tmp_path: Path, tokenizer: Path, exported: Any,
                                    monkeypatch: pytest.MonkeyPatch,
                                    error: OSError) -> None:
    def refuse(*arguments: Any) -> None:
        raise error
    monkeypatch.setattr(hf_module, "_copy_tokenizer", refuse)
    with pytest.raises(DiskError, match=rf"could not be written \({error.strerror}\); it needs \d+"):
        export_model_folder(exported.checkpoint, exported.config, tokenizer, tmp_path / "m")
    assert os.listdir(tmp_path) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(DiskError, match="the model folder needs .*, 1000 B are free"):
        export_model_folder(exported.checkpoint, exported.config, tokenizer, tmp_path / "m")


def wrong_names(name: str, config: ModelConfig) -> list[str]:
    """Hugging Face's names with gate and up in the wrong places."""
    names = hf_names(name, config)
    return names[::-1] if "gate_up" in name else names


def test_an_export_that_is_another_model_is_refused(tmp_path: Path, tokenizer: Path, exported: Any,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_ttl.checkpoint import names

    monkeypatch.setattr(names, "hf_names", wrong_names)
    with pytest.raises(CheckpointError,
                       match=r"transformers computes other logits, by up to \d.*must be at most 0.0001"):
        export_model_folder(exported.checkpoint, exported.config, tokenizer, tmp_path / "m")
    assert os.listdir(tmp_path) == []


def test_nan_weights_are_never_exported_as_proven(tmp_path: Path, tokenizer: Path) -> None:
    config = config_of(2)
    weights = random_weights(config)
    weights["model.norm.weight"][0] = float("nan")
    store = CheckpointStore(tmp_path / "c")
    store.save(1, {"weights": weights}, {})
    with pytest.raises(CheckpointError, match="transformers computes other logits, by up to nan"):
        export_model_folder(store.open(1), config, tokenizer, tmp_path / "m")


def test_a_tokenizer_that_transformers_reads_otherwise(tmp_path: Path, tokenizer: Path,
                                                       exported: Any) -> None:
    shutil.copytree(tokenizer, tmp_path / "t")
    settings = json.loads((tmp_path / "t" / "tokenizer_config.json").read_text())
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps({**settings, "add_prefix_space": True}))
    with pytest.raises(CheckpointError, match="transformers reads other tokens than sentencepiece"):
        export_model_folder(exported.checkpoint, exported.config, tmp_path / "t", tmp_path / "m")


def test_without_transformers_it_says_so(tmp_path: Path, tokenizer: Path, exported: Any,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = export_model_folder(exported.checkpoint, exported.config, tokenizer, tmp_path / "m")
    assert result["verified"].startswith("no: transformers cannot be imported")
    provenance = json.loads((tmp_path / "m" / "megatron_ttl.json").read_text())
    assert provenance["verification"]["verified"].startswith("no: ")


# --- model folders of others ---
