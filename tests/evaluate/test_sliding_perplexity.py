"""Perplexity in overlapping windows, and of each file that a dataset was made of."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from tiny_folder import documents

from megatron_ttl.data.causal_lm_dataset import HeldOutDataset
from megatron_ttl.data.encode import EncodeSettings
from megatron_ttl.data.indexed_dataset import IndexedDataset
from megatron_ttl.data.preprocess import preprocess
from megatron_ttl.errors import DataError, UserError
from megatron_ttl.evaluate.perplexity import held_out_loss, perplexity_report, windowing

LENGTH = 48


def flat_ids(prefix):
    return np.array(IndexedDataset(prefix).tokens, dtype=np.int64)


@pytest.mark.parametrize(("length", "stride"), [(48, 1), (48, 20), (7, 5), (48, 48), (10_000, 3)])
def test_each_token_is_predicted_once_with_enough_before_it(prefix, length, stride):
    dataset, flat = HeldOutDataset(prefix, length, max_tokens=400, stride=stride), flat_ids(prefix)[:400]
    seen = []
    for number in range(len(dataset)):
        input_ids, labels = dataset.sample(number)
        for place in np.flatnonzero(labels != -100):
            position = number * stride + place + 1
            seen.append(position)
            assert labels[place] == flat[position] and input_ids[place] == flat[position - 1]
            assert place + 1 >= min(position, length - stride + 1), "too little before it"
    assert seen == list(range(1, 400))


@pytest.mark.parametrize("stride", [1, 13, 48])
def test_uniform_model_gives_the_vocabulary_size(prefix, stride):
    dataset = HeldOutDataset(prefix, LENGTH, max_tokens=1000, stride=stride)
    nats, tokens = held_out_loss(lambda ids: torch.full((*ids.shape, 350), 0.3), dataset, 8)
    assert tokens == 999 and math.exp(nats / tokens) == pytest.approx(350, rel=1e-12)


def test_side_by_side_is_the_stride_of_a_window(prefix):
    ours, theirs = HeldOutDataset(prefix, LENGTH, stride=LENGTH), HeldOutDataset(prefix, LENGTH)
    assert len(ours) == len(theirs)
    for mine, other in zip(ours.sample(len(ours) - 1), theirs.sample(len(ours) - 1), strict=True):
        assert np.array_equal(mine, other)


@pytest.mark.parametrize("stride", [16, 31])
def test_equals_transformers(model_folder, prefix, tokenizer_folder, stride):
    """transformers' own loss, labels of what a window before has predicted left out; bytes as side by side."""
    from transformers import LlamaForCausalLM

    oracle, flat = LlamaForCausalLM.from_pretrained(model_folder).eval(), torch.from_numpy(flat_ids(prefix))
    nats, done = 0.0, 1
    for start in range(0, len(flat), stride):
        window = flat[start : start + LENGTH + 1]
        labels = window.clone()
        labels[: done - start] = -100
        asked = len(flat[done : start + LENGTH + 1])
        if asked:
            with torch.no_grad():
                nats += float(oracle(window[None], labels=labels[None]).loss) * asked
        done += asked
    assert done == len(flat)
    report = perplexity_report(model_folder, [prefix], batch=5, device="cpu", stride=stride)
    chunked = perplexity_report(model_folder, [prefix], device="cpu")
    total = report["total"]
    assert total["tokens"] == len(flat) - 1 and total["bytes"] == chunked["total"]["bytes"]
    assert total["nats_per_token"] == pytest.approx(nats / (len(flat) - 1), abs=1e-5)
    assert abs(total["nats_per_token"] - chunked["total"]["nats_per_token"]) > 1e-3
    assert report["windowing"] == windowing(stride, False) and f"sliding, stride {stride}" in report["windowing"]


@pytest.fixture(scope="module")
def two_files(tmp_path_factory, tokenizer_folder):
    """One dataset made of two files, and one of each alone."""
    folder = tmp_path_factory.mktemp("files")
    files = {"stories": documents(9, seed=31), "letters": documents(5, seed=32)}
    for name, texts in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        preprocess([folder / f"{name}.jsonl"], folder / name, EncodeSettings(str(tokenizer_folder), held_out_fraction=0.0))
    preprocess([folder / f"{name}.jsonl" for name in files], folder / "both",
               EncodeSettings(str(tokenizer_folder), held_out_fraction=0.0))
    return folder


@pytest.mark.parametrize("mask", [False, True])
def test_figures_of_each_file(model_folder, two_files, mask):
    """With documents apart, and windows that are long enough, a file has the loss that it has alone."""
    row, = perplexity_report(model_folder, [two_files / "both"], device="cpu", document_mask=mask, stride=1)["prefixes"]
    alone = perplexity_report(model_folder, [two_files / "stories", two_files / "letters"], device="cpu",
                              document_mask=mask, stride=1)["prefixes"]
    assert [part["source"] for part in row["sources"]] == ["stories.jsonl", "letters.jsonl"]
    for key in ("tokens", "bytes"):
        assert sum(part[key] for part in row["sources"]) == row[key]
    assert sum(part["nats"] for part in row["sources"]) == pytest.approx(row["nats"], rel=1e-12)
    for part, one in zip(row["sources"], alone, strict=True):
        # The first token of the second file is predicted from the end of the first one, unless documents are apart.
        assert part["tokens"] == one["tokens"] + (not mask and part["source"] == "letters.jsonl")
        assert part["bytes"] == one["bytes"], "BOS stands for no bytes"
        assert part["bits_per_byte"] == part["nats"] / math.log(2) / part["bytes"]
        if mask or part["source"] == "stories.jsonl":
            assert part["nats"] == pytest.approx(one["nats"], rel=1e-5)


def test_a_dataset_of_one_file_has_no_parts(model_folder, prefix, two_files):
    first, cut = (perplexity_report(model_folder, [name], device="cpu", max_tokens=60)["prefixes"][0]
                  for name in (prefix, two_files / "both"))
    assert "sources" not in first
    assert [part["source"] for part in cut["sources"]] == ["stories.jsonl"], "the second file is not reached"


def test_strides_that_make_no_sense(model_folder, prefix):
    with pytest.raises(DataError, match="stride: 49; windows have 48 tokens, and with a larger stride some would be in none"):
        perplexity_report(model_folder, [prefix], stride=49, device="cpu")
    with pytest.raises(UserError, match="stride: 0; it must be at least 1; leave it out for the usual value"):
        perplexity_report(model_folder, [prefix], stride=0, device="cpu")
