"""Held-out loss against transformers, against arithmetic, and independent of batch and ranks."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
from tiny_folder import documents, write_dataset, write_tokenizer

from megatron_ttl.data.causal_lm_dataset import HeldOutDataset
from megatron_ttl.data.indexed_dataset import IndexedDataset
from megatron_ttl.errors import CheckpointError, DataError, UserError
from megatron_ttl.evaluate.perplexity import held_out_loss, perplexity_report
from megatron_ttl.files import checksum
from megatron_ttl.kernels.cross_entropy import cross_entropy_reference
from megatron_ttl.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def oracle(model_folder):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(model_folder).eval()


def uniform(input_ids):
    return torch.full((*input_ids.shape, 350), 0.3)


def spoken(input_ids):
    """Logits that depend on the token before, so that a label at the wrong place is noticed."""
    table = torch.randn(350, 350, generator=torch.Generator().manual_seed(0)) * 3
    return table[input_ids]


@pytest.mark.parametrize("length", [7, 48])
@pytest.mark.parametrize("batch", [1, 8])
def test_uniform_model_gives_the_vocabulary_size(prefix, length, batch):
    dataset = HeldOutDataset(prefix, length)
    nats, tokens = held_out_loss(uniform, dataset, batch)
    assert tokens == IndexedDataset(prefix).token_count - 1
    assert math.exp(nats / tokens) == pytest.approx(350, rel=1e-12)


def test_loss_equals_transformers(prefix, oracle):
    """The same windows through transformers' own loss, weighted by their tokens."""
    dataset = HeldOutDataset(prefix, 48)
    nats, tokens = held_out_loss(lambda ids: oracle(ids).logits, dataset, 8)
    flat = np.array(IndexedDataset(prefix).tokens, dtype=np.int64)
    wanted = 0.0
    with torch.no_grad():
        for start in range(0, len(flat) - 1, 48):
            window = torch.from_numpy(flat[start : start + 49])[None]
            # transformers shifts labels itself: 49 tokens are 48 predictions, the last input has no label
            loss = oracle(window, labels=window).loss
            wanted += float(loss) * (window.shape[1] - 1)
    assert (len(flat) - 1) % 48 != 0, "the last window must be ragged"
    assert tokens == len(flat) - 1
    assert nats / tokens == pytest.approx(wanted / tokens, abs=1e-5)


def test_report_equals_transformers(model_folder, prefix, oracle):
    report = perplexity_report(model_folder, [prefix], batch=3, device="cpu")
    flat = torch.from_numpy(np.array(IndexedDataset(prefix).tokens, dtype=np.int64))
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(flat) - 1, 48):
            window = flat[start : start + 49][None]
            nats += float(oracle(window, labels=window).loss) * (window.shape[1] - 1)
    mean = nats / (len(flat) - 1)
    assert report["total"]["nats_per_token"] == pytest.approx(mean, abs=1e-5)
    assert report["total"]["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
    assert report["context_tokens"] == 48 and "non-overlapping" in report["windowing"]


def test_documents_apart_equal_transformers(model_folder, prefix, other_prefix, oracle, tokenizer_folder):
    """Every stretch of a document in a window alone through transformers; bytes of what is asked, with and without BOS."""
    report = perplexity_report(model_folder, [prefix, other_prefix], batch=3, device="cpu", document_mask=True)
    assert report["windowing"].endswith("its window and its document")
    for row in report["prefixes"]:
        flat = torch.from_numpy(np.array(IndexedDataset(row["prefix"]).tokens, dtype=np.int64))
        nats, tokens, asked = 0.0, 0, []
        for start in range(0, len(flat) - 1, 48):
            window = flat[start : start + 49]
            ends = [place + 1 for place in range(48) if place < len(window) and window[place] == 2]
            for begin, end in zip([0, *ends], [*ends, len(window)], strict=True):
                if end - begin > 1:
                    with torch.no_grad():
                        loss = oracle(window[None, begin:end], labels=window[None, begin:end]).loss
                    nats, tokens = nats + float(loss) * (end - begin - 1), tokens + end - begin - 1
                    asked += window[begin + 1 : end].tolist()
        assert row["tokens"] == tokens == len(flat) - IndexedDataset(row["prefix"]).document_count
        assert row["nats_per_token"] == pytest.approx(nats / tokens, abs=1e-5)
        assert row["bytes"] == sum(piece_bytes(asked, tokenizer_folder))
    ordinary = perplexity_report(model_folder, [prefix], device="cpu")["total"]["nats_per_token"]
    assert abs(report["prefixes"][0]["nats_per_token"] - ordinary) > 1e-3


def test_each_window_starts_afresh(prefix):
    """The loss by hand: every token but the first, from the one before."""
    flat = torch.from_numpy(np.array(IndexedDataset(prefix).tokens, dtype=np.int64))
    wanted = float(cross_entropy_reference(spoken(flat[:-1]).double(), flat[1:]))
    for length in (1, 5, 48, 10_000):
        nats, tokens = held_out_loss(spoken, HeldOutDataset(prefix, length), 4)
        assert tokens == len(flat) - 1
        assert nats == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("batch", [1, 2, 7, 1000])
def test_batch_changes_nothing(prefix, batch):
    dataset = HeldOutDataset(prefix, 20)
    assert len(dataset) % 7 and len(dataset) % 2, "batches must be ragged"
    wanted = held_out_loss(spoken, dataset, 3)
    rows = []
    found = held_out_loss(lambda ids: (rows.append(len(ids)), spoken(ids))[1], dataset, batch)
    assert sum(rows) == len(dataset) and max(rows) <= batch
    assert found[1] == wanted[1] and found[0] == pytest.approx(wanted[0], rel=1e-12)


@pytest.mark.parametrize("world_size", [2, 3, 200])
def test_ranks_add_up_and_call_equally_often(prefix, world_size):
    dataset = HeldOutDataset(prefix, 20, max_tokens=20 * 61 - 5)  # 61 windows, the last one ragged
    assert len(dataset) % world_size, "a rank must lack a window"
    wanted = held_out_loss(spoken, dataset, 4)
    shapes, sums = [], []
    for rank in range(world_size):
        seen = []
        sums.append(held_out_loss(lambda ids, seen=seen: (seen.append(ids.shape), spoken(ids))[1], dataset, 4,
                                  rank=rank, world_size=world_size))
        shapes.append(seen)
    assert all(seen == shapes[0] for seen in shapes)
    assert sum(tokens for _, tokens in sums) == wanted[1]
    assert sum(nats for nats, _ in sums) == pytest.approx(wanted[0], rel=1e-12)


def test_a_model_in_training_stays_in_training(prefix, model_folder):
    from megatron_ttl.generate.open_folder import open_model_folder

    model = open_model_folder(model_folder, "cpu").model.train()
    held_out_loss(model, HeldOutDataset(prefix, 48, max_tokens=100), 2)
    assert model.training and all(weight.grad is None for weight in model.parameters())
    # Rotary tables made during evaluation must be of use to autograd.
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    assert model[0].embed_tokens.weight.grad is not None


def test_no_gradient_is_kept(prefix):
    weight = torch.ones((), requires_grad=True)
    kept = []
    held_out_loss(lambda ids: (kept.append(uniform(ids) * weight), kept[-1])[1],
                  HeldOutDataset(prefix, 48, max_tokens=60), 2)
    assert not any(logits.requires_grad for logits in kept)


def test_progress_counts_tokens(prefix):
    done = []
    _, tokens = held_out_loss(uniform, HeldOutDataset(prefix, 48), 4, progress=done.append)
    assert done == sorted(done) and len(done) > 2 and done[-1] == tokens


def test_many_rows_are_summed_in_parts(prefix, monkeypatch):
    from megatron_ttl.parallel import loss

    dataset = HeldOutDataset(prefix, 48)
    wanted = held_out_loss(spoken, dataset, 8)
    monkeypatch.setattr(loss, "_ROWS", 17)
    assert held_out_loss(spoken, dataset, 8) == (pytest.approx(wanted[0], rel=1e-12), wanted[1])


def target_bytes(prefix, tokenizer_folder, count) -> int:
    """UTF-8 bytes of tokens 1 to count - 1."""
    return sum(piece_bytes(np.array(IndexedDataset(prefix).tokens[1:count]).tolist(), tokenizer_folder))


def piece_bytes(ids, tokenizer_folder):
    """Yield the UTF-8 bytes of each piece: no decoder has a say."""
    processor = Tokenizer.load(tokenizer_folder)._processor
    for token in ids:
        if processor.is_byte(token):
            yield 1
        elif not processor.is_control(token):
            yield len(processor.id_to_piece(token).replace("\u2581", " ").encode())


def test_bits_per_byte_of_everything(model_folder, prefix, other_prefix, tokenizer_folder):
    report = perplexity_report(model_folder, [prefix, other_prefix], device="cpu")
    texts = {str(prefix): documents(30, seed=7), str(other_prefix): documents(9, seed=8)}
    assert [row["prefix"] for row in report["prefixes"]] == list(texts)
    for row in report["prefixes"]:
        tokens = IndexedDataset(row["prefix"]).token_count
        assert row["complete"] is True and row["tokens"] == tokens - 1
        assert row["bytes"] == target_bytes(row["prefix"], tokenizer_folder, tokens)
        assert row["bits_per_byte"] == row["nats"] / math.log(2) / row["bytes"]
    with_bos, without = report["prefixes"]
    assert with_bos["bytes"] == sum(len(text.encode()) for text in texts[str(prefix)])
    # Without BOS the first token of the text is read but never predicted.
    assert without["bytes"] < sum(len(text.encode()) for text in texts[str(other_prefix)])
    total = report["total"]
    for key in ("nats", "tokens", "bytes", "windows"):
        assert total[key] == sum(row[key] for row in report["prefixes"])
    assert total["perplexity"] == math.exp(total["nats"] / total["tokens"])


@pytest.mark.parametrize("limit", [2, 50, 300])
def test_bits_per_byte_of_a_part(model_folder, prefix, other_prefix, tokenizer_folder, limit):
    report = perplexity_report(model_folder, [prefix, other_prefix], max_tokens=limit, device="cpu")
    for row in report["prefixes"]:
        assert row["complete"] is False and row["tokens"] == limit - 1
        assert row["bytes"] == target_bytes(row["prefix"], tokenizer_folder, limit)


def test_sequence_length_is_the_context(model_folder, prefix):
    short = perplexity_report(model_folder, [prefix], sequence_length=4, device="cpu")
    long = perplexity_report(model_folder, [prefix], device="cpu")
    assert short["context_tokens"] == 4 and short["total"]["tokens"] == long["total"]["tokens"]
    assert short["total"]["nats"] != long["total"]["nats"]
    with pytest.raises(DataError, match="sequence_length: 49; .* has 48 positions; give at most so many"):
        perplexity_report(model_folder, [prefix], sequence_length=49, device="cpu")


def test_numbers_that_make_no_sense(model_folder):
    with pytest.raises(UserError, match="perplexity: no dataset; it must be one or more prefixes") as caught:
        perplexity_report(model_folder, [], batch=0, max_tokens=-1, sequence_length=0)
    assert [fault.split(":")[0] for fault in caught.value.faults] == [
        "perplexity", "batch", "max_tokens", "sequence_length"]


def test_another_tokenizer_is_refused(model_folder, tmp_path):
    other = write_tokenizer(tmp_path / "other", seed=5)
    prefix = write_dataset(tmp_path / "theirs", other, documents(5))
    with pytest.raises(DataError, match="theirs: its tokenizer is xxh3:.*, that of .* is xxh3:.*; they must "
                                        "be the same; tokenize the text again with --tokenizer"):
        perplexity_report(model_folder, [prefix], device="cpu")


def test_all_datasets_are_checked_at_once(model_folder, prefix, tmp_path):
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{prefix}{suffix}", tmp_path / f"foreign{suffix}")
    with pytest.raises(DataError) as caught:
        perplexity_report(model_folder, [tmp_path / "none", tmp_path / "foreign", prefix], device="cpu")
    text = str(caught.value)
    assert "none.bin: does not exist" in text
    assert "foreign.json: does not exist; it must say which tokenizer made the ids" in text


def test_ids_without_a_row_are_refused(model_folder, prefix, tmp_path):
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(f"{prefix}{suffix}", tmp_path / f"bad{suffix}")
    payload = bytearray((tmp_path / "bad.bin").read_bytes())
    payload[40:42] = (400).to_bytes(2, "little")
    (tmp_path / "bad.bin").write_bytes(payload)
    manifest = json.loads((tmp_path / "bad.json").read_text())  # as a wrong writer would leave it
    manifest["bin"]["checksum"] = checksum(tmp_path / "bad.bin")
    (tmp_path / "bad.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="bad: holds id 400; .* has 350 rows, every id must be below"):
        perplexity_report(model_folder, [tmp_path / "bad"], device="cpu")


def test_a_damaged_model_is_named(model_folder, prefix, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(model_folder, tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = math.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="(loss is nan nats per token|not finite|NaN)"):
        perplexity_report(folder, [prefix], device="cpu")


def test_prefixes_named_twice_count_once(model_folder, prefix):
    assert len(perplexity_report(model_folder, [prefix, prefix], device="cpu")["prefixes"]) == 1


def test_bfloat16_is_near(model_folder, prefix):
    exact, half = (perplexity_report(model_folder, [prefix], device="cpu", dtype=dtype)["total"]["nats"]
                   for dtype in ("float32", "bfloat16"))
    assert half == pytest.approx(exact, rel=0.02) and half != exact


def test_report_is_json(model_folder, prefix):
    report = perplexity_report(model_folder, [prefix], device="cpu", max_tokens=60)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
