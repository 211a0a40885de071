"""The head sees the last token of the text, whatever stands around it; the folder is read again, by transformers too."""

from __future__ import annotations

import json

import pytest
import torch
from labelled_files import PAIR, SINGLE
from tiny_folder import documents

from megatron_ttl.errors import CheckpointError, ConfigError
from megatron_ttl.finetune.backbone import Encoded
from megatron_ttl.finetune.classifier import (
    all_logits,
    collate,
    computing_in,
    epoch_batches,
    load_classifier,
    open_backbone,
    predict,
)
from megatron_ttl.finetune.llama_classifier import cut_to_fit

CPU = torch.device("cpu")
TEXTS = [(text[:length],) for text, length in zip(documents(6, seed=3), (80, 15, 40, 1, 60, 25), strict=True)]


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_padding_changes_nothing(model_folder, pooling):
    backbone = open_backbone(model_folder, SINGLE, pooling=pooling)
    encoded = backbone.encode(TEXTS)
    module = backbone.build(0, False, CPU).eval()
    with torch.no_grad():
        module.score.weight *= 10
        alone = torch.cat([module(*collate([text], backbone.pad_id, CPU)) for text in encoded])
        for left, right, filler in ((0, 0, 3), (0, 9, 3), (7, 0, 3), (4, 4, 99)):
            length = max(len(text.ids) for text in encoded)
            rows = [(length - len(text.ids), text.ids) for text in encoded]
            before = [left + short * (left > 0) for short, _ in rows]  # padded on the left, or on the right
            ids = torch.full((len(rows), length + left + right), filler)
            real = torch.zeros(ids.shape, dtype=torch.bool)
            for number, (_, content) in enumerate(rows):
                ids[number, before[number] : before[number] + len(content)] = torch.tensor(content)
                real[number, before[number] : before[number] + len(content)] = True
            assert (module(ids, real) - alone).abs().max() < 1e-5, (left, right)
    assert alone.std(dim=0).min() > 0.1  # the texts are told apart
    for batch in (1, 2, 4):
        assert (all_logits(module, encoded, backbone.pad_id, batch, CPU) - alone).abs().max() < 1e-5


def test_the_folder_is_read_again_by_us_and_by_transformers(model_folder, tmp_path):
    from transformers import AutoModelForSequenceClassification

    backbone = open_backbone(model_folder, SINGLE)
    module = backbone.build(5, False, CPU).eval()
    backbone.write(module, tmp_path)
    classifier = load_classifier(tmp_path, "cpu")
    encoded = classifier.encode(TEXTS)
    assert encoded == backbone.encode(TEXTS)
    ours = all_logits(module, encoded, backbone.pad_id, 3, CPU)
    assert torch.equal(all_logits(classifier.module, encoded, classifier.pad_id, 3, CPU), ours)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path, local_files_only=True).eval()
    ids, real, _ = collate(encoded, backbone.pad_id, CPU)
    with torch.no_grad():
        assert (theirs(input_ids=ids, attention_mask=real.long()).logits - ours).abs().max() < 1e-5
    answers = predict(classifier, TEXTS)
    assert [answer["label"] for answer in answers] == [SINGLE.label_names[number] for number in ours.argmax(-1)]
    assert sum(answers[0]["probabilities"].values()) == pytest.approx(1)


def test_pretrained_weights_are_kept_and_untrained_ones_drawn(model_folder):
    backbone = open_backbone(model_folder, SINGLE)
    state = [backbone.build(seed, untrained, CPU).state_dict()
             for seed, untrained in ((0, False), (1, False), (0, True), (1, True))]
    name = "layers.1.mlp.down_proj.weight"
    assert torch.equal(state[0][name], state[1][name])
    assert not torch.equal(state[0]["score.weight"], state[1]["score.weight"])
    assert not torch.equal(state[2][name], state[0][name]) and not torch.equal(state[2][name], state[3][name])
    assert torch.equal(state[0]["score.weight"], state[2]["score.weight"])


def test_pairs_are_joined_and_cut_at_their_ends(model_folder):
    backbone = open_backbone(model_folder, PAIR, max_tokens=16)
    tokenizer = backbone._tokenizer
    short, long = backbone.encode([("o rio", "a cidade"), ("o rio", documents(1)[0] * 9)])
    separator = tokenizer.encode("\n")
    first = [tokenizer.bos_id, *tokenizer.encode("o rio"), *separator]
    assert short == Encoded([*first, *tokenizer.encode("a cidade")], [], False)
    assert long.cut and len(long.ids) == 16 and long.ids[: len(first)] == first


def test_a_separator_must_leave_room_for_texts(model_folder):
    with pytest.raises(ConfigError, match=r"its separator takes \d+ of 8 tokens; at least 4 must be left"):
        open_backbone(model_folder, PAIR.model_copy(update={"separator": "日本🙂"}), max_tokens=8)


def test_the_longer_text_is_cut_first():
    for first, second, room, kept in ((9, 2, 8, (6, 2)), (2, 9, 8, (2, 6)), (9, 9, 8, (4, 4)), (9, 9, 7, (4, 3)),
                                      (3, 4, 8, (3, 4)), (5, 4, 8, (4, 4))):
        assert tuple(map(len, cut_to_fit([list(range(first)), list(range(second))], room))) == kept, (first, second)
    assert cut_to_fit([[1, 2, 3]], 2) == [[1, 2]]


def test_every_row_comes_once_per_epoch_beside_rows_of_its_length():
    lengths = [number * 7 % 50 + 1 for number in range(1000)]
    batches = list(epoch_batches(lengths, 16, seed=1, epoch=2))
    assert sorted(number for batch in batches for number in batch) == list(range(1000))
    assert batches == list(epoch_batches(lengths, 16, seed=1, epoch=2))
    assert batches != list(epoch_batches(lengths, 16, seed=1, epoch=3))
    padded = sum(len(batch) * max(lengths[number] for number in batch) for batch in batches)
    assert padded < 1.1 * sum(lengths)


def test_bf16_computes_nearly_the_same_and_keeps_weights_in_fp32(model_folder):
    backbone = open_backbone(model_folder, SINGLE)
    module = backbone.build(0, False, CPU)
    batch = collate(backbone.encode(TEXTS), backbone.pad_id, CPU)
    with computing_in("bfloat16", CPU):
        logits = module(*batch)
    assert 0 < (logits.float() - module(*batch)).abs().max() < 0.1
    logits.float().sum().backward()
    assert {parameter.grad.dtype for parameter in module.parameters()} == {torch.float32}


def test_a_damaged_folder_is_refused(model_folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"is no classifier \(it has no classifier.json\)"):
        load_classifier(model_folder)
    with pytest.raises(CheckpointError, match="has no config.json"):
        open_backbone(tmp_path, SINGLE)
    backbone = open_backbone(model_folder, SINGLE)
    backbone.write(backbone.build(0, False, CPU), tmp_path)
    record = json.loads((tmp_path / "classifier.json").read_text())
    (tmp_path / "classifier.json").write_text(json.dumps({**record, "model": {**record["model"], "hidden_size": 64}}))
    with pytest.raises(CheckpointError, match=r"score.weight: has shape \(2, 32\); classifier.json asks for \(2, 64\)"):
        load_classifier(tmp_path, "cpu")
    (tmp_path / "classifier.json").write_text(json.dumps({**record, "pooling": "max"}))
    with pytest.raises(CheckpointError, match="pooling: Input should be 'last' or 'mean'"):
        load_classifier(tmp_path, "cpu")
