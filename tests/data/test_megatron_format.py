"""MMIDIDX bit for bit with megatron-core, and every way in which a dataset can be damaged."""

from __future__ import annotations

import random
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from patience import patient
from tiny_folder import documents, write_dataset, write_tokenizer

from megatron_ttl.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from megatron_ttl.errors import DataError, UserError

EOS = 2


def some_documents(count=40, vocab_size=500, seed=0):
    draw = np.random.default_rng(seed)
    return [np.append(draw.integers(4, vocab_size, draw.integers(0, 30)), EOS) for _ in range(count)]


def write(prefix, texts, dtype="uint16", vocab_size=500):
    with IndexedDatasetWriter(prefix, dtype, vocab_size, EOS) as writer:
        for ids in texts:
            writer.add_document(ids)
        writer.finish()
    return prefix


@pytest.mark.parametrize(("dtype", "vocab_size"), [("uint16", 60_000), ("int32", 100_000)])
def test_bytes_equal_megatron_core(tmp_path, dtype, vocab_size):
    """The same documents: the same .bin and .idx; each side reads what the other wrote."""
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed")
    texts = some_documents(vocab_size=vocab_size)
    ours = write(tmp_path / "ours", texts, dtype, vocab_size)
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.dtype(dtype).type)
    for ids in texts:
        builder.add_item(__import__("torch").tensor(ids))
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert Path(f"{ours}{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()
    theirs = megatron.IndexedDataset(str(ours))
    read_here = IndexedDataset(tmp_path / "theirs")
    assert read_here.manifest is None and read_here.document_count == len(texts) == len(theirs)
    for number, ids in enumerate(texts):
        assert np.array_equal(theirs[number], ids) and np.array_equal(read_here.document(number), ids)


@pytest.mark.parametrize(("ids", "message"), [
    ([5, -1, EOS], "document 1 holds id -1"), ([5, 500, EOS], "document 1 holds id 500"), ([5, 6], "exactly once, last"),
    ([5, EOS, 6], "exactly once, last"), ([EOS, 5, EOS], "holds EOS .* 2 times"), ([0.5, EOS], "must be integers"),
])
def test_ids_are_checked_when_they_are_written(tmp_path, ids, message):
    """Out of range, no EOS, two, or one in the middle: refused with the document's number, and nothing is left."""
    with pytest.raises(DataError, match=message), IndexedDatasetWriter(tmp_path / "a", "uint16", 500, EOS) as writer:
        writer.add_document(np.array([7, EOS]))
        writer.add_document(np.array(ids))
    assert list(tmp_path.iterdir()) == []


def test_an_id_beyond_the_type_is_refused(tmp_path):
    """65,536 in uint16 would be stored as 0 by Megatron's builder."""
    with pytest.raises((DataError, AssertionError)), IndexedDatasetWriter(tmp_path / "a", "uint16", 70_000, EOS) as writer:
        writer.add_document(np.array([65_536, EOS]))


def test_tokens_outlive_the_dataset(tmp_path):
    """No view is left hanging over a mapping that is gone."""
    texts = some_documents()
    tokens = IndexedDataset(write(tmp_path / "a", texts)).tokens
    assert np.array_equal(tokens, np.concatenate(texts))


def test_an_empty_dataset_is_one(tmp_path):
    """No documents: it opens, and holds nothing."""
    dataset = IndexedDataset(write(tmp_path / "a", []))
    assert (dataset.document_count, dataset.token_count, len(dataset.tokens)) == (0, 0, 0)


@pytest.mark.parametrize(("name", "message"), [("text.bin", "a prefix has no suffix; write .*text$"), ("texd", "did you mean 'text'"),
                                               ("none/text", "text.idx: does not exist")])
def test_a_wrong_prefix_is_told_the_right_one(tmp_path, name, message):
    """A suffix too many, a letter wrong, a folder that is not there."""
    write(tmp_path / "text", some_documents(3))
    with pytest.raises(DataError, match=message):
        IndexedDataset(tmp_path / name)


def mutations(idx: bytes, bin_bytes: bytes, draw: random.Random):
    """Yield (name, .idx, .bin) of damaged pairs."""
    for cut in [0, 1, 9, 17, 33, 34, len(idx) - 1, *(draw.randrange(len(idx)) for _ in range(20))]:
        yield f"idx cut to {cut}", idx[:cut], bin_bytes
    for cut in [0, 1, len(bin_bytes) - 1, *(draw.randrange(len(bin_bytes)) for _ in range(20))]:
        yield f"bin cut to {cut}", idx, bin_bytes[:cut]
    yield "idx and a byte", idx + b"x", bin_bytes
    yield "bin and a byte", idx, bin_bytes + b"x"
    yield "swapped", bin_bytes, idx
    yield "no magic", b"NOTANIDX\0" + idx[9:], bin_bytes
    yield "version 2", idx[:9] + struct.pack("<Q", 2) + idx[17:], bin_bytes
    for code in (0, 6, 7, 9, 255):
        yield f"type {code}", idx[:17] + bytes([code]) + idx[18:], bin_bytes
    for offset in (18, 26):
        for count in (0, 1, 2**31, 2**62, 2**63, 2**64 - 1):
            yield f"count {count} at {offset}", idx[:offset] + struct.pack("<Q", count) + idx[offset + 8 :], bin_bytes
    for _ in range(90):
        place = draw.randrange(34, len(idx))
        yield (f"bit in byte {place}", idx[:place] + bytes([idx[place] ^ (1 << draw.randrange(8))]) + idx[place + 1 :],
               bin_bytes)


def test_every_damage_is_refused_at_once(tmp_path):
    """More than 150 mutations: a DataError that names a file, and nothing else, in under a second each."""
    write_dataset(tmp_path / "a", write_tokenizer(tmp_path / "tokenizer"), documents(30))
    idx, bin_bytes = Path(f"{tmp_path}/a.idx").read_bytes(), Path(f"{tmp_path}/a.bin").read_bytes()
    tried, limit_s = 0, patient(1)
    for name, bad_idx, bad_bin in mutations(idx, bin_bytes, random.Random(5)):
        Path(f"{tmp_path}/a.idx").write_bytes(bad_idx)
        Path(f"{tmp_path}/a.bin").write_bytes(bad_bin)
        began = time.perf_counter()
        try:
            IndexedDataset(tmp_path / "a")
        except DataError as error:
            assert "a.idx" in str(error) or "a.bin" in str(error), name
        else:
            raise AssertionError(f"{name} was not noticed")
        assert time.perf_counter() - began < limit_s, name
        tried += 1
    assert tried > 150


def test_structural_damage_is_refused_without_a_manifest(tmp_path):
    """Of a foreign dataset too; a flipped bit inside the index is seen where it breaks the structure."""
    write(tmp_path / "a", some_documents())
    idx, bin_bytes = Path(f"{tmp_path}/a.idx").read_bytes(), Path(f"{tmp_path}/a.bin").read_bytes()
    for name, bad_idx, bad_bin in mutations(idx, bin_bytes, random.Random(6)):
        Path(f"{tmp_path}/a.idx").write_bytes(bad_idx)
        Path(f"{tmp_path}/a.bin").write_bytes(bad_bin)
        try:
            IndexedDataset(tmp_path / "a")
        except UserError:
            continue
        assert name.startswith("bit"), name
