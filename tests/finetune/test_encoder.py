"""An encoder from a local folder goes the same way as our own models; pickles and code of the folder's own are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from labelled_files import PAIR, SINGLE, small_request, write_task
from tiny_encoder import write_encoder

from megatron_ttl.errors import CheckpointError
from megatron_ttl.finetune.classifier import all_logits, load_classifier, open_backbone
from megatron_ttl.finetune.experiment import fine_tune

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory) -> Path:
    """A random BERT."""
    return write_encoder(tmp_path_factory.mktemp("encoder") / "bert")


def test_texts_are_read_with_cls_and_sep_and_padding_changes_nothing(encoder_folder):
    backbone = open_backbone(encoder_folder, PAIR)
    short, long = backbone.encode([("o trem", "a menina viu"), ("o trem", "a menina viu o rio " * 9)])
    tokens = backbone._tokenizer.convert_ids_to_tokens(short.ids)
    assert tokens == ["[CLS]", "o", "trem", "[SEP]", "a", "menina", "viu", "[SEP]"]
    assert (short.kinds, short.cut, long.cut, len(long.ids)) == ([0, 0, 0, 0, 1, 1, 1, 1], False, True, 24)
    module = backbone.build(0, False, CPU).eval()
    together = all_logits(module, [short, long], backbone.pad_id, 2, CPU)
    alone = all_logits(module, [short, long], backbone.pad_id, 1, CPU)
    assert (together - alone).abs().max() < 1e-5
    swapped, = backbone.encode([("a menina viu", "o trem")])
    assert (all_logits(module, [swapped], backbone.pad_id, 1, CPU) - alone[0]).abs().max() > 1e-3


def test_an_encoder_is_fine_tuned_and_read_again(encoder_folder, tmp_path):
    request = small_request(write_task(tmp_path / "data"), encoder_folder, tmp_path / "output", seeds=1, epochs=12)
    result = fine_tune(request)
    assert result["summary"]["accuracy"]["mean"] == 1  # a word tells the class
    assert (result["pooling"], result["separator"], result["max_tokens"]) == ("[CLS]", "[SEP]", 24)
    classifier = load_classifier(tmp_path / "output" / "seed-0" / "classifier", "cpu")
    encoded = classifier.encode([("a menina viu o trem 1001",), ("a menina perdeu o trem 1000",)])
    assert all_logits(classifier.module, encoded, classifier.pad_id, 2, CPU).argmax(-1).tolist() == [1, 0]


def test_dropout_too_is_of_the_seed_alone(encoder_folder, tmp_path):
    data, seeds = write_task(tmp_path / "data"), []
    for number in range(2):
        torch.manual_seed(number)
        seeds.append(fine_tune(small_request(data, encoder_folder, tmp_path / str(number), seeds=2))["seeds"])
    assert seeds[0] == seeds[1]
    assert seeds[0][0]["epochs"][0]["train_loss"] != seeds[0][1]["epochs"][0]["train_loss"]


def test_the_same_seed_gives_the_same_classifier(encoder_folder):
    backbone = open_backbone(encoder_folder, SINGLE)
    first, again, other, fresh = (dict(backbone.build(seed, untrained, CPU).named_parameters())
                                  for seed, untrained in ((7, False), (7, False), (8, False), (7, True)))
    head, inner = "model.classifier.weight", "model.bert.encoder.layer.0.attention.self.query.weight"
    assert torch.equal(first[head], again[head]) and not torch.equal(first[head], other[head])
    assert torch.equal(first[inner], other[inner]) and not torch.equal(first[inner], fresh[inner])


def test_what_could_run_code_is_refused(encoder_folder, tmp_path):
    pickled = Path(shutil.copytree(encoder_folder, tmp_path / "pickled"))
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="has no safetensors; pytorch_model.bin is not read, .* tools/import_weights"):
        open_backbone(pickled, SINGLE)
    coded = Path(shutil.copytree(encoder_folder, tmp_path / "coded"))
    config = json.loads((coded / "config.json").read_text())
    (coded / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "code.Model"}}))
    with pytest.raises(CheckpointError, match="'auto_map' names code to load"):
        open_backbone(coded, SINGLE)
    cut = Path(shutil.copytree(encoder_folder, tmp_path / "cut"))
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:100])
    with pytest.raises(CheckpointError, match="is no readable safetensors file"):
        open_backbone(cut, SINGLE)
    strange = Path(shutil.copytree(encoder_folder, tmp_path / "strange"))
    (strange / "config.json").write_text(json.dumps({**config, "model_type": "nothing"}))
    with pytest.raises(CheckpointError, match="transformers cannot read its"):
        open_backbone(strange, SINGLE)
