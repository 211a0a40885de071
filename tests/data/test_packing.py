"""Best-fit packing: nothing lost, nothing twice, nothing cut that fits; and concatenation as it always was."""

from __future__ import annotations

import bisect
import gzip
import json
from collections import Counter
from itertools import chain

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_causal_lm_dataset import EOS, write

from megatron_ttl.data.causal_lm_dataset import CausalLMDataset, HeldOutDataset
from megatron_ttl.data.indexed_dataset import IndexedDatasetWriter
from megatron_ttl.data.manifest import Description, TokenizerRecord
from megatron_ttl.data.packing import IGNORED_LABEL, BestFit, Concatenated, best_fit_decreasing
from megatron_ttl.errors import DataError

FILLER = 999_999


def one_by_one(lengths, capacity):
    """Pack as the definition says; return what the rows have left. Which of two equal rows is taken does not matter."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        place = bisect.bisect_left(rooms, length)
        bisect.insort(rooms, (rooms.pop(place) if place < len(rooms) else capacity) - length)
    return rooms


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 40).flatmap(lambda capacity: st.tuples(
    st.just(capacity), st.lists(st.integers(1, capacity), max_size=60))))
@example((10, [6, 5, 4, 4, 1]))
def test_best_fit_is_the_textbook_one(drawn):
    """As many rows, filled as far, as by placing pieces one by one; none over its capacity."""
    capacity, lengths = drawn
    row_of, rows = best_fit_decreasing(np.array(lengths, np.int32), capacity)
    filled = np.bincount(row_of, weights=lengths, minlength=rows)
    assert sorted((capacity - filled).tolist()) == one_by_one(lengths, capacity)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 70), min_size=1, max_size=40), st.integers(2, 32))
@example([33, 34, 32, 31, 1, 2, 64, 65, 66], 32)
def test_every_id_once(lengths, s):
    """Over random documents: each id but the first of a document is a label once, from its own document and place."""
    ends = np.cumsum(lengths)
    tokens = np.arange(ends[-1])  # an id is its place in the stream
    packed = BestFit(ends, s, FILLER)
    assert packed.used_tokens + packed.remainder_tokens == ends[-1]
    assert packed.remainder_tokens == lengths.count(1)
    asked, inputs, rows_of = Counter(), Counter(), {}
    for row in range(packed.rows):
        input_ids, labels = np.empty(s, np.int64), np.empty(s, np.int64)
        packed.fill(tokens, row, input_ids, labels)
        counted = labels != IGNORED_LABEL
        assert counted.any(), "a row without a label teaches nothing"
        assert np.array_equal(labels[counted], input_ids[counted] + 1)
        asked.update(labels[counted].tolist())
        real = input_ids[input_ids != FILLER]
        assert np.array_equal(input_ids, np.append(real, np.full(s - len(real), FILLER))), "padding stands last"
        inputs.update(real.tolist())
        for document in np.unique(np.searchsorted(ends, real, side="right")).tolist():
            rows_of.setdefault(document, []).append(row)
        begins, lasts = packed.stretches(np.array([row]))
        read = set(real.tolist()) | set(labels[counted].tolist())
        assert {place for a, b in zip(begins.tolist(), lasts.tolist(), strict=True) for place in range(a, b + 1)} == read
    firsts = set((ends - lengths).tolist())
    assert asked == Counter(place for place in range(ends[-1]) if place not in firsts)
    assert set(inputs.values()) <= {1} and packed.padding == packed.rows * s - sum(inputs.values())
    # An EOS that is the label of a whole row is no input; all else of documents of two ids and more is.
    assert len(inputs) == sum(n - (n % s == 1 and n > 1) for n in lengths if n > 1)
    for document, length in enumerate(lengths):
        assert len(rows_of.get(document, [])) == (-(-(length - 1) // s)), "cut only where it is longer than a row"


def test_concatenation_is_what_it_was():
    """Against the formula of every release so far, and over many windows at once."""
    tokens = np.random.default_rng(0).integers(0, 500, 1000)
    packed = Concatenated(len(tokens), 48)
    assert (packed.rows, packed.used_tokens, packed.remainder_tokens, packed.padding) == (20, 961, 39, 0)
    for row in range(packed.rows):
        input_ids, labels = np.empty(48, np.int64), np.empty(48, np.int64)
        packed.fill(tokens, row, input_ids, labels)
        assert np.array_equal(np.append(input_ids, labels[-1]), tokens[row * 48 : row * 48 + 49])
        assert np.array_equal(labels[:-1], input_ids[1:])


def test_real_documents_are_hardly_ever_cut(shared_data):
    """Real Portuguese texts, four characters a token: what concatenation cuts and best fit does not, and its padding."""
    texts = chain.from_iterable(map(json.loads, gzip.open(path, "rt", encoding="utf-8"))
                                for path in sorted((shared_data / "text").glob("*.jsonl.gz")))
    lengths = np.array([len(line["text"]) // 4 + 2 for line in texts])
    ends, s = np.cumsum(lengths), 2048
    packed, stream = BestFit(ends, s, EOS), Concatenated(int(ends[-1]), s)
    assert packed.used_tokens + packed.remainder_tokens == stream.used_tokens + stream.remainder_tokens == ends[-1]
    cut = (ends - lengths) // s < (ends - 2) // s  # the first and the last label of a document in two rows
    longer = lengths - 1 > s
    assert cut[~longer].mean() > 0.1
    pieces = np.append(packed._begins, packed._alone)
    assert len(pieces) == len(lengths) + int(((lengths[longer] - 2) // s).sum()), "only longer ones are in pieces"
    assert packed.padding / (packed.rows * s) < 2e-3 and packed.rows <= 1.003 * stream.rows


GOLDEN = {  # rows of sample 0 and 12,345 of the dataset below, as the release before packing gave them
    0: [175, 447, 399, 213, 289, 296, 445, 16, 246], 12345: [419, 270, 409, 167, 228, 2, 395, 65, 154]}


def test_the_default_is_golden(tmp_path):
    """Samples of the default are those of the release that had no packing."""
    dataset = CausalLMDataset([(write(tmp_path / "a", 1, tokens=210), 1.0)], 8, seed=5)
    assert dataset.all_labelled and dataset.eos_id is None
    for number, row in GOLDEN.items():
        input_ids, labels = dataset.sample(number)
        assert np.append(input_ids, labels[-1]).tolist() == row and np.array_equal(labels[:-1], input_ids[1:])


def write_lengths(prefix, lengths, seed=0):
    """Write documents of so many ids, BOS first and EOS last."""
    draw = np.random.default_rng(seed)
    record = TokenizerRecord(directory="t", checksum="sum", vocab_size=500, eos_id=EOS, bos_id=1)
    with IndexedDatasetWriter(prefix, "uint16", 500, EOS) as writer:
        for length in lengths:
            writer.add_document(np.concatenate(([1], draw.integers(4, 500, length), [EOS]))[-length:])
        writer.finish(Description(text_bytes=1, bos=True, tokenizer=record))
    return str(prefix)


LENGTHS = [3, 40, 9, 17, 1, 5, 16, 2, 8, 33, 12, 6]


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_labels_stop_where_documents_do(tmp_path, packing):
    """Under the mask no label follows an EOS; every other label of an epoch is there. Best fit has the same with none."""
    prefix = write_lengths(tmp_path / "a", LENGTHS)
    for mask in (False, True):
        dataset = CausalLMDataset([(prefix, 1.0)], 16, 3, packing=packing, document_mask=mask)
        assert dataset.all_labelled is (packing == "concatenate" and not mask)
        assert dataset.eos_id == (EOS if mask else None)
        input_ids, labels = dataset.samples(range(dataset.samples_per_epoch[0]))
        if mask or packing == "best_fit":
            assert (labels[input_ids == EOS] == IGNORED_LABEL).all()
        wanted = {"concatenate": dataset.used_tokens[0] - 1 - (int((input_ids == EOS).sum()) if mask else 0),
                  "best_fit": sum(length - 1 for length in LENGTHS)}[packing]
        assert int((labels != IGNORED_LABEL).sum()) == wanted
        tokens = dataset.datasets[0].token_count
        assert dataset.used_tokens[0] + dataset.remainder_tokens[0] == tokens == sum(LENGTHS)
        report = dataset.packing_report()
        assert report["packing"] == packing and report["document_mask"] is mask
        assert report["padding_share"] == dataset.padding[0] / input_ids.size
    assert dataset.documents(range(dataset.samples_per_epoch[0]))[prefix] == (
        [[0, 10]] if packing == "concatenate" else [[0, 3], [5, 11]])


def test_samples_are_told_apart_and_the_same_each_time(tmp_path):
    """A function of the index: opened twice it is one; the record of a checkpoint says which packing it counts."""
    prefix = write_lengths(tmp_path / "a", LENGTHS * 5)
    first, second = (CausalLMDataset([(prefix, 1.0)], 16, 3, packing="best_fit") for _ in range(2))
    for ours, theirs in zip(first.samples(range(100)), second.samples(range(100)), strict=True):
        assert np.array_equal(ours, theirs)
    records = [CausalLMDataset([(prefix, 1.0)], 16, 3, packing=packing, document_mask=mask).record()
               for packing in ("concatenate", "best_fit") for mask in (False, True)]
    assert len({json.dumps(record, sort_keys=True) for record in records}) == 4


def test_what_cannot_be_packed_or_masked_is_refused(tmp_path):
    """Documents of one id; data whose EOS nobody knows."""
    ones = write_lengths(tmp_path / "ones", [1] * 40)
    with pytest.raises(DataError, match="ones: has 40 tokens in 40 documents; one sample needs a document of two"):
        CausalLMDataset([(ones, 1.0)], 8, 0, packing="best_fit")
    with pytest.raises(DataError, match="ones: no document of what is read has two tokens; a label needs two"):
        HeldOutDataset(ones, 8, document_mask=True)
    foreign = write(tmp_path / "foreign", manifest=False)
    for opened in (lambda: CausalLMDataset([(foreign, 1.0)], 8, 0, packing="best_fit", document_mask=True),
                   lambda: HeldOutDataset(foreign, 8, document_mask=True)):
        with pytest.raises(DataError, match="foreign: has no manifest .* needs the id that ends a document; .*false"):
            opened()
    assert CausalLMDataset([(foreign, 1.0)], 8, 0, packing="best_fit").samples_per_epoch == [25]
