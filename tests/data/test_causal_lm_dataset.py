"""What may be trained on, what may be evaluated on, and that the two are never the same."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from megatron_ttl.data.causal_lm_dataset import CausalLMDataset, HeldOutDataset, require_apart
from megatron_ttl.data.indexed_dataset import IndexedDatasetWriter
from megatron_ttl.data.manifest import Description, HeldOutRecord, TokenizerRecord
from megatron_ttl.errors import DataError

EOS = 2


def write(prefix, seed=0, role=None, eos=EOS, checksum="sum", bos=False, tokens=200, manifest=True):
    """Write documents of ten ids; a role means that the documents were split."""
    draw = np.random.default_rng(seed)
    description = Description(
        text_bytes=tokens, bos=bos, held_out=role and HeldOutRecord(fraction=0.1, seed=0, role=role),
        tokenizer=TokenizerRecord(directory="t", checksum=checksum, vocab_size=500, eos_id=eos, bos_id=1))
    with IndexedDatasetWriter(prefix, "uint16", 500, eos) as writer:
        for _ in range(tokens // 10):
            writer.add_document(np.append(draw.integers(4, 500, 9), eos))
        writer.finish(description if manifest else None)
    return str(prefix)


def test_held_out_data_is_no_training_source(tmp_path):
    """Nor is the training side a held-out one; what was never split may be either."""
    train, held_out = write(tmp_path / "pt", 1, "train"), write(tmp_path / "pt_heldout", 2, "held_out")
    whole = write(tmp_path / "other", 3)
    with pytest.raises(DataError, match="pt_heldout: is held-out data; training may not read it; name the"):
        CausalLMDataset([(train, 1.0), (held_out, 1.0)], 8, seed=0)
    with pytest.raises(DataError, match="pt: is the training side of a split; a held-out loss needs text"):
        HeldOutDataset(train, 8)
    training = CausalLMDataset([(train, 1.0), (whole, 1.0)], 8, seed=0)
    require_apart(training, [HeldOutDataset(held_out, 8)])
    with pytest.raises(DataError, match="other: is the same data as the training source .*other"):
        require_apart(training, [HeldOutDataset(held_out, 8), HeldOutDataset(whole, 8)])


def test_a_copy_under_another_name_is_recognised(tmp_path):
    """By its content, and through a link."""
    train = write(tmp_path / "a")
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(f"{train}{suffix}", f"{tmp_path}/copy{suffix}")
        (tmp_path / f"link{suffix}").symlink_to(f"{train}{suffix}")
    training = CausalLMDataset([(train, 1.0)], 8, seed=0)
    for name in ("copy", "link"):
        with pytest.raises(DataError, match=f"{name}: is the same data as the training source"):
            require_apart(training, [HeldOutDataset(tmp_path / name, 8)])
    with pytest.raises(DataError, match="link: is the same data as .*a; a source is named once; add the two"):
        CausalLMDataset([(train, 1.0), (str(tmp_path / "link"), 1.0)], 8, seed=0)


@pytest.mark.parametrize(("options", "message"), [
    ({"checksum": "other"}, "b: tokenizer checksum is other, that of .*a is sum; they must be equal for {}"),
    ({"eos": 3}, "b: EOS id is 3, that of .*a is 2; they must be equal for {}"),
    ({"bos": True}, r"b: BOS policy is one BOS \(1\) per document, that of .*a is no BOS; .* for {}"),
])
def test_ids_of_unlike_meaning_are_not_put_together(tmp_path, options, message):
    """Neither mixed, nor trained on the one and evaluated on the other."""
    first, second = write(tmp_path / "a", 1), write(tmp_path / "b", 2, **options)
    with pytest.raises(DataError, match=message.format("training")):
        CausalLMDataset([(first, 1.0), (second, 1.0)], 8, seed=0)
    with pytest.raises(DataError, match=message.format("evaluation beside training")):
        require_apart(CausalLMDataset([(first, 1.0)], 8, seed=0), [HeldOutDataset(second, 8)])


def test_all_faults_of_all_sources_come_at_once(tmp_path):
    """Files first; then weights and lengths together."""
    good, short = write(tmp_path / "a"), write(tmp_path / "short", tokens=10)
    with pytest.raises(DataError) as caught:
        CausalLMDataset([("none", 1.0), (good, 1.0), ("nor", 1.0)], 8, seed=0)
    assert len(caught.value.faults) == 4  # a .bin and an .idx of both
    with pytest.raises(DataError) as caught:
        CausalLMDataset([(good, float("nan")), (short, -1.0)], 10, seed=0)
    assert [fault.split(": ")[1].split(";")[0] for fault in caught.value.faults] == [
        "has weight nan", "has weight -1.0", "has 10 tokens"]


@pytest.mark.parametrize(("tokens", "sequence_length", "windows", "remainder"), [
    (200, 199, 1, 0), (200, 198, 1, 1), (200, 100, 1, 99), (200, 99, 2, 1), (200, 1, 199, 0),
    (200, 7, 28, 3),
])
def test_tokens_in_are_tokens_used_and_remainder(tmp_path, tokens, sequence_length, windows, remainder):
    """At the edges: exactly one window, one id too few for two, windows of one id."""
    dataset = CausalLMDataset([(write(tmp_path / "a", tokens=tokens), 1.0)], sequence_length, seed=0)
    assert (dataset.samples_per_epoch, dataset.remainder_tokens) == ([windows], [remainder])
    assert dataset.used_tokens[0] + remainder == tokens
    with pytest.raises(DataError, match=f"has {tokens} tokens; one sample needs {tokens + 1}; tokenise more"):
        CausalLMDataset([(str(tmp_path / "a"), 1.0)], tokens, seed=0)


def test_every_label_once_per_epoch(tmp_path):
    """Over three epochs of two sources: each position of each stream is a label three times."""
    prefixes = [write(tmp_path / "a", 1, tokens=210), write(tmp_path / "b", 2, tokens=110)]
    dataset = CausalLMDataset([(prefixes[0], 0.6), (prefixes[1], 0.4)], 8, seed=5)
    labels = [[], []]
    number = 0
    while min(dataset.epochs(number)) < 3:
        source, epoch, window = dataset.locate(number)
        if epoch < 3:
            start = window * 8 + 1
            stream = dataset.datasets[source].tokens
            assert np.array_equal(dataset.sample(number)[1], stream[start : start + 8])
            labels[source] += range(start, start + 8)
        number += 1
    for source, found in enumerate(labels):
        positions, counts = np.unique(found, return_counts=True)
        assert np.array_equal(positions, np.arange(1, dataset.used_tokens[source])) and set(counts) == {3}
    assert sum(dataset.samples_drawn(number)) == number


def test_the_record_tells_orders_apart(tmp_path):
    """Equal for equal data; different for another seed, weight, length or content. JSON can hold it."""
    write(tmp_path / "a", 1), write(tmp_path / "b", 2), write(tmp_path / "foreign", 3, manifest=False)

    def record(name="a", weight=1.0, sequence_length=8, seed=0):
        return CausalLMDataset([(str(tmp_path / name), weight)], sequence_length, seed).record()

    records = [record(), record("b"), record(weight=2.0), record(sequence_length=9), record(seed=1),
               record("foreign")]
    assert record() == record() and len({json.dumps(one, sort_keys=True) for one in records}) == 6


def test_foreign_data_is_named_as_unchecked(tmp_path):
    """It can be read, and is listed, so that a trainer can refuse it."""
    ours, foreign = write(tmp_path / "a", 1), write(tmp_path / "foreign", 2, manifest=False)
    assert CausalLMDataset([(ours, 1.0), (foreign, 1.0)], 8, seed=0).unchecked_prefixes == [foreign]


def test_a_held_out_loss_needs_a_label(tmp_path):
    """An empty side of a split, and a limit that leaves nothing."""
    with IndexedDatasetWriter(tmp_path / "empty", "uint16", 500, EOS) as writer:
        writer.finish()
    with pytest.raises(DataError, match="empty: has 0 tokens to read; a label needs two"):
        HeldOutDataset(tmp_path / "empty", 8)
    with pytest.raises(DataError, match="a: has 1 tokens to read; a label needs two; .* raise max_tokens"):
        HeldOutDataset(write(tmp_path / "a"), 8, max_tokens=1)
