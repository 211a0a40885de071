"""The order of the data: a pure function of seed, epoch and index, whatever the number of processes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from tiny_folder import documents, write_dataset, write_tokenizer

from megatron_ttl.data.causal_lm_dataset import CausalLMDataset, HeldOutDataset
from megatron_ttl.data.indexed_dataset import IndexedDataset
from megatron_ttl.data.order import EpochOrder, permute, permute_many
from megatron_ttl.data.sampler import StepBatches
from megatron_ttl.errors import DataError

PINNED_PERMUTATION = [72, 40, 55, 83, 12, 97, 59, 3]
PINNED_EPOCHS = [(0, 3), (0, 5), (0, 9), (0, 0), (0, 6), (0, 7), (0, 2), (0, 4), (0, 8), (0, 1), (1, 4), (1, 8)]


def test_a_permutation_is_one():
    """Every size from 1 to 200 and some beyond: each index once; the vectorised form agrees."""
    for size in [*range(1, 201), 1_000, 4_097, 65_536]:
        images = permute_many(np.arange(size), size, key=size * 7 + 1)
        assert np.array_equal(np.sort(images), np.arange(size)), size
        assert [permute(i, size, size * 7 + 1) for i in range(min(size, 20))] == images[:20].tolist()
    huge = 10**12
    assert len({permute(i, huge, 3) for i in range(1_000)}) == 1_000


def test_a_permutation_looks_random():
    """Chi-square of where indices land, over keys; and neighbours do not stay neighbours."""
    size, keys, cells = 1_000, 400, 20
    landed = Counter(permute(137, size, key) * cells // size for key in range(keys))
    chi_square = sum((landed[cell] - keys / cells) ** 2 / (keys / cells) for cell in range(cells))
    assert chi_square < 43.8  # 0.1 % of truly random ones exceed this with 19 degrees of freedom
    images = permute_many(np.arange(size), size, key=11)
    assert (np.abs(np.diff(images)) == 1).sum() < 12
    assert abs(np.corrcoef(np.arange(size), images)[0, 1]) < 0.15


def test_the_order_is_pinned():
    """These numbers are a promise: another order would break the resume of every run there is."""
    assert [permute(i, 100, 1) for i in range(8)] == PINNED_PERMUTATION
    assert [EpochOrder(10, seed=42).locate(i) for i in range(12)] == PINNED_EPOCHS


def test_every_sample_once_per_epoch_and_a_prefix_that_stays():
    """Three epochs: complete, different from each other, different for another seed or source."""
    order = EpochOrder(57, seed=3)
    located = [order.locate(i) for i in range(3 * 57)]
    epochs = [[element for epoch, element in located if epoch == e] for e in range(3)]
    assert all(sorted(epoch) == list(range(57)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    numbers = np.arange(3 * 57)
    assert np.array_equal(np.stack(order.locate_many(numbers), 1), np.array(located))
    assert located != [EpochOrder(57, seed=4).locate(i) for i in range(3 * 57)]
    assert located != [EpochOrder(57, seed=3, source=1).locate(i) for i in range(3 * 57)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("order")
    tokenizer = write_tokenizer(folder / "tokenizer")
    write_dataset(folder / "a", tokenizer, documents(60, seed=1))
    write_dataset(folder / "b", tokenizer, documents(25, seed=2))
    write_dataset(folder / "no_bos", tokenizer, documents(25, seed=3), bos=False)
    write_dataset(folder / "other", write_tokenizer(folder / "tokenizer2", seed=5), documents(25))
    write_dataset(folder / "short", tokenizer, ["a"])
    return folder


def test_windows_and_their_remainder(data):
    """Each window is s + 1 neighbours of the stream; an epoch reads each once; tokens in = used + remainder."""
    dataset = CausalLMDataset([(data / "a", 1.0)], 16, seed=1)
    tokens = np.asarray(IndexedDataset(data / "a").tokens)
    windows = (len(tokens) - 1) // 16
    assert dataset.samples_per_epoch == [windows]
    assert dataset.used_tokens[0] + dataset.remainder_tokens[0] == len(tokens)
    seen = Counter()
    for number in range(windows):
        _, epoch, window = dataset.locate(number)
        ids, labels = dataset.sample(number)
        assert epoch == 0
        assert np.array_equal(ids, tokens[16 * window : 16 * window + 16])
        assert np.array_equal(labels, tokens[16 * window + 1 : 16 * window + 17])
        seen[window] += 1
    assert seen == Counter(range(windows))
    assert dataset.epochs(windows) == [1.0]


def test_held_out_windows_keep_their_ragged_end(data):
    """In file order, the last one padded with ignored labels; every token but the first is predicted once."""
    tokens = np.asarray(IndexedDataset(data / "a").tokens)
    held_out = HeldOutDataset(data / "a", 16)
    labels = np.concatenate([held_out.sample(i)[1] for i in range(len(held_out))])
    assert np.array_equal(labels[labels != -100], tokens[1:])
    assert (labels == -100).sum() == -(len(tokens) - 1) % 16
    assert HeldOutDataset(data / "a", 16, max_tokens=33).label_count == 32


@pytest.mark.parametrize(("sources", "message"), [
    (["short"], "one sample needs 17"), (["a", "other"], "other"), (["a", "no_bos"], "no_bos"),
    (["a", "a"], "is the same data"), (["nothing"], "does not exist"),
])
def test_sources_that_do_not_fit_are_refused(data, sources, message):
    """Too short, another tokenizer, another BOS policy, twice the same, missing."""
    with pytest.raises(DataError, match=message):
        CausalLMDataset([(data / name, 1.0) for name in sources], 16, seed=1)


class Numbers:
    """A dataset whose samples are their own numbers."""

    def samples(self, numbers):
        column = np.asarray(numbers, np.int64)[:, None]
        return np.repeat(column, 2, 1), np.repeat(column, 2, 1)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_the_layout_does_not_change_what_a_step_reads(world_size, micro_batch):
    """Ten resume points: the union over ranks is the next 48 samples, none twice."""
    for consumed in range(0, 480, 48):
        seen = []
        for rank in range(world_size):
            with StepBatches(Numbers(), 48, micro_batch, rank, world_size, consumed) as batches:
                step = next(batches)
                assert len(step) == 48 // world_size // micro_batch
                assert batches.consumed_samples == consumed + 48
                seen += [int(row[0]) for ids, _ in step for row in ids]
        assert sorted(seen) == list(range(consumed, consumed + 48))


def test_a_resumed_reader_goes_on_where_the_first_one_was(data):
    """Over three epochs: five steps and then five more are the ten steps of one reader; no sample is missed."""
    dataset = CausalLMDataset([(data / "a", 0.6), (data / "b", 0.4)], 16, seed=1)
    with StepBatches(dataset, 8, 4, 0, 1, 0) as reader:
        whole = [next(reader) for _ in range(10)]
    with StepBatches(dataset, 8, 4, 0, 1, 40) as reader:
        rest = [next(reader) for _ in range(5)]
        assert reader.wait_s >= 0
    for ours, theirs in zip(rest, whole[5:], strict=True):
        assert all((a == b).all() for pair, twin in zip(ours, theirs, strict=True)
                   for a, b in zip(pair, twin, strict=True))
    size = dataset.samples_per_epoch[0]
    drawn = [n for n in range(4 * size) if dataset.locate(n)[0] == 0 and dataset.locate(n)[1] < 2]
    assert Counter(dataset.locate(n)[1:] for n in drawn) == Counter((e, w) for e in range(2) for w in range(size))


def test_what_goes_wrong_in_the_reader_is_raised_in_the_loop():
    """With its own message, and again on the next call."""

    class Broken:
        def samples(self, numbers):
            raise OSError("the disk has gone")

    with StepBatches(Broken(), 4, 2, 0, 1, 0) as reader, pytest.raises(OSError, match="the disk has gone"):
        next(reader)
