"""Datasets that other programs wrote, with those programs as judges: read here, ours read there, the same bytes."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_folder import documents, write_dataset, write_tokenizer

from megatron_ttl.data.adopt import adopt_dataset
from megatron_ttl.data.causal_lm_dataset import CausalLMDataset
from megatron_ttl.data.indexed_dataset import IndexedDataset
from megatron_ttl.data.inspect import inspect_dataset
from megatron_ttl.errors import DataError
from megatron_ttl.tokenizer.tokenizer import Tokenizer

EOS = 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """A tokenizer of ours."""
    return write_tokenizer(tmp_path_factory.mktemp("foreign") / "tokenizer")


@pytest.fixture(scope="module")
def tokenizer_json(tokenizer, tmp_path_factory) -> Path:
    """The same as a tokenizer.json, which transformers makes of it."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("json")
    transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder / "tokenizer.json"


def write_with_datatrove(folder: Path, name: str, texts: list[str], tokenizer_json: Path, eos: str = "</s>") -> Path:
    """Let datatrove tokenise and write; return the prefix."""
    pytest.importorskip("datatrove", reason="datatrove is not installed")
    from datatrove.data import Document
    from datatrove.pipeline.tokens import MegatronDocumentTokenizer

    writer = MegatronDocumentTokenizer(str(folder), name, str(tokenizer_json), eos_token=eos)
    writer.run([Document(text=text, id=str(number)) for number, text in enumerate(texts)], 0, 1)
    return folder / f"{name}_00000_tokens"


def write_with_megatron(prefix: Path, texts: list[list[int]], dtype: type = np.uint16) -> Path:
    """Let megatron-core write, one sequence per document."""
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed")
    torch = pytest.importorskip("torch")
    builder = megatron.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for ids in texts:
        builder.add_item(torch.tensor(ids))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return prefix


def test_datatrove_writes_the_bytes_that_we_write(tokenizer, tokenizer_json, tmp_path):
    """The same text and tokenizer: the same .bin and .idx; megatron-core reads both."""
    texts = documents(80)
    theirs = write_with_datatrove(tmp_path, "pt", texts, tokenizer_json)
    ours = write_dataset(tmp_path / "ours", tokenizer, texts, bos=False)
    for suffix in (".bin", ".idx"):
        assert Path(f"{theirs}{suffix}").read_bytes() == Path(f"{ours}{suffix}").read_bytes()
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    read = IndexedDataset(ours)
    for prefix in (ours, theirs):
        dataset = megatron.IndexedDataset(str(prefix))
        assert len(dataset) == 80 and all(np.array_equal(dataset[n], read.document(n)) for n in range(80))


def test_what_datatrove_wrote_is_adopted_and_trained_on(tokenizer, tokenizer_json, tmp_path, repository):
    """The manifest is the one that tokenising here writes, the .bin and .idx are untouched, and the samples are equal."""
    texts = documents(80)
    theirs = write_with_datatrove(tmp_path, "pt", texts, tokenizer_json)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert CausalLMDataset([(str(theirs), 1.0)], 16, 0).unchecked_prefixes == [str(theirs)]
    tool = subprocess.run([sys.executable, repository / "tools" / "adopt_dataset.py", "--prefix", theirs, "--tokenizer",
                           tokenizer, "--json"], capture_output=True, text=True, timeout=60)
    assert (tool.returncode, tool.stderr) == (0, "")
    assert json.loads(tool.stdout)["documents"] == 80
    ours = write_dataset(tmp_path / "ours", tokenizer, texts, bos=False)
    found, wanted = IndexedDataset(theirs, verify=True).manifest, IndexedDataset(ours).manifest
    assert found.model_dump(exclude={"tokenizer", "sources", "held_out"}) == wanted.model_dump(
        exclude={"tokenizer", "sources", "held_out"})
    assert found.tokenizer.checksum == wanted.tokenizer.checksum and found.held_out is None
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert inspect_dataset(theirs, verify=True)["verified"] == "checksums, one EOS per document"
    here, there = (CausalLMDataset([(str(prefix), 1.0)], 16, 0) for prefix in (ours, theirs))
    assert there.unchecked_prefixes == []
    assert all(np.array_equal(*pair) for pair in zip(here.samples(range(40)), there.samples(range(40)), strict=True))
    with pytest.raises(DataError, match="pt_00000_tokens.json: exists already"):
        adopt_dataset(theirs, tokenizer)


@pytest.mark.parametrize("bos", [True, False])
def test_megatrons_documents_with_and_without_bos_are_adopted(tokenizer, tmp_path, bos):
    """The text is counted from the ids alone, to the byte."""
    texts = documents(50)
    ids = [[*([1] if bos else []), *document, EOS] for document in Tokenizer.load(tokenizer).encode_batch(texts)]
    report = adopt_dataset(write_with_megatron(tmp_path / "a", ids, np.int32), tokenizer)
    assert report["bos"] is bos and report["text_bytes"] == sum(len(text.encode()) for text in texts)
    assert IndexedDataset(tmp_path / "a").manifest.dtype == "int32"


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda ids: [document[:-1] for document in ids], r"holds no EOS \(id 2\); .* --append-eod"),
    (lambda ids: [*ids[:3], ids[3][:-1], *ids[4:]], "document 3 has 0 EOS"),
    (lambda ids: [*ids[:3], [EOS, *ids[3]], *ids[4:]], "document 3 has 2 EOS"),
    (lambda ids: [[1, *ids[0]], *ids[1:]], r"1 of its 50 documents begin with BOS \(id 1\); all or none must"),
    (lambda ids: [[5, 1, *ids[0]], *ids[1:]], "holds BOS .* 1 times inside of documents"),
    (lambda ids: [*ids, [350, EOS]], "holds id 350; must be below the vocabulary's 350"),
    (lambda ids: [*ids, [*[7] * 3000, EOS]], "holds id 7 3,0.. times in a row"),
    (lambda ids: [[610 - number if number > 260 else number for number in document] for document in ids],
     r"of 50 documents come back when they are decoded and encoded again"),
    (lambda ids: [], "holds no ids"),
])
def test_what_is_not_of_the_tokenizer_is_not_adopted(tokenizer, tmp_path, spoil, message):
    """No manifest and no copy of the tokenizer appear beside ids that contradict it."""
    ids = [[*document, EOS] for document in Tokenizer.load(tokenizer).encode_batch(documents(50))]
    prefix = write_with_megatron(tmp_path / "a", spoil(ids))
    with pytest.raises(DataError, match=message):
        adopt_dataset(prefix, tokenizer)
    assert {path.name for path in tmp_path.iterdir()} == {"a.bin", "a.idx"}


def test_sentences_and_odd_types_are_not_adopted(tokenizer, tmp_path):
    """Several sequences in a document, and ids of eight bytes: they open, and are refused for training."""
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed")
    torch = pytest.importorskip("torch")
    builder = megatron.IndexedDatasetBuilder(f"{tmp_path}/a.bin", dtype=np.int64)
    for ids in ([5, 6], [7, EOS]):
        builder.add_item(torch.tensor(ids))
    builder.end_document()
    builder.finalize(f"{tmp_path}/a.idx")
    assert IndexedDataset(tmp_path / "a").document(0).tolist() == [5, 6, 7, EOS]
    with pytest.raises(DataError, match="its ids are int64(.|\n)*has 2 sequences in 1 documents"):
        adopt_dataset(tmp_path / "a", tokenizer)


def test_another_tokenizer_beside_the_data_is_not_replaced(tokenizer, tmp_path):
    """What stands in the way is named, and stays."""
    ids = [[*document, EOS] for document in Tokenizer.load(tokenizer).encode_batch(documents(5))]
    prefix = write_with_megatron(tmp_path / "a", ids)
    os.makedirs(tmp_path / "a.tokenizer")
    with pytest.raises(DataError, match="a.tokenizer: exists already"):
        adopt_dataset(prefix, tokenizer)
    assert not os.listdir(tmp_path / "a.tokenizer")


@pytest.mark.parametrize(("code", "size", "said"), [
    (6, 8, "is float64, written by Megatron-LM;"), (6, 4, "is float32, written by GPT-NeoX;"),
    (7, 4, "is float32, written by Megatron-LM;"), (7, 8, "is float64, written by GPT-NeoX;"),
    (6, 2, r"is floating point \(float64 as Megatron-LM writes it, float32 as GPT-NeoX does\);"), (9, 4, "is unknown;"),
])
def test_floats_are_refused_by_the_name_of_who_wrote_them(tmp_path, code, size, said):
    """GPT-NeoX and Megatron-LM write the codes 6 and 7 the other way round: the pointers tell which it was."""
    lengths = np.array([3, 5, 2], "<i4")
    pointers = (np.cumsum(lengths, dtype="<i8") - lengths) * size
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, 3, 4)
    (tmp_path / "a.idx").write_bytes(header + lengths.tobytes() + pointers.tobytes() + np.arange(4, dtype="<i8").tobytes())
    (tmp_path / "a.bin").write_bytes(bytes(size * 10))
    with pytest.raises(DataError, match=f"a.idx: its type code {code} {said} .*must be integers"):
        IndexedDataset(tmp_path / "a")


def test_an_index_of_the_older_kind_is_named(tmp_path):
    """What fairseq, and Megatron without mmap, have written."""
    (tmp_path / "a.idx").write_bytes(b"TNTIDX\0\0" + struct.pack("<QQQQQ", 1, 4, 4, 1, 1) + bytes(40))
    (tmp_path / "a.bin").write_bytes(bytes(40))
    with pytest.raises(DataError, match="a.idx: is an index of the older kind .*TNTIDX.*--dataset-impl mmap"):
        IndexedDataset(tmp_path / "a")
