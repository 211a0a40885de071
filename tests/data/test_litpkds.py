"""TinyLlama's packed chunks: every document comes back, filler is found where it was planted, and no id is lost."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_folder import documents, write_dataset, write_tokenizer

from megatron_ttl.data import litpkds
from megatron_ttl.data.causal_lm_dataset import CausalLMDataset
from megatron_ttl.data.indexed_dataset import IndexedDataset
from megatron_ttl.data.inspect import inspect_dataset
from megatron_ttl.data.litpkds import import_litpkds
from megatron_ttl.errors import ConfigError, DataError
from megatron_ttl.tokenizer.tokenizer import Tokenizer

BOS, EOS = 1, 2


def write_chunks(folder: Path, chain: str, stream: np.ndarray, chunk: int, separator: int | None = BOS,
                 dtype: str = "<u2", code: int = 8) -> list[Path]:
    """Write a stream of ids in chunks; the last one is filled up with the separator, or, with none, left out."""
    filled = -len(stream) % chunk if separator is not None else 0
    stream = np.append(stream, np.full(filled, separator or 0))
    paths = [folder / f"{chain}_{number:010d}.bin" for number in range(len(stream) // chunk)]
    for number, path in enumerate(paths):
        ids = stream[number * chunk : (number + 1) * chunk]
        path.write_bytes(struct.pack("<7sQBQ", b"LITPKDS", 1, code, chunk) + ids.astype(dtype).tobytes())
    return paths


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("litpkds") / "tokenizer")


@pytest.mark.parametrize(("begin", "end", "separator"), [([BOS], [], BOS), ([], [EOS], EOS), ([BOS], [EOS], BOS),
                                                         ([BOS], [EOS], 3)])
@pytest.mark.parametrize("chunk", [17, 4096])
def test_documents_come_back_from_two_chains(tokenizer, tmp_path, begin, end, separator, chunk):
    """Whatever stood between them: the dataset has the bytes that tokenising the texts here gives."""
    texts, ours = documents(60), Tokenizer.load(tokenizer)
    inputs, filler = [], 0
    for chain, part in (("train_0", texts[:25]), ("train_1", texts[25:])):
        stream = np.concatenate([np.array([*begin, *ids, *end]) for ids in ours.encode_batch(part)])
        inputs += write_chunks(tmp_path, chain, stream, chunk, separator)
        padding = -len(stream) % chunk
        # The first BOS after a last document without one of its own, and the first EOS, could be honest separators.
        honest = separator in (BOS, EOS) and separator not in end and padding > 0
        filler += padding - honest
    report = import_litpkds(inputs[::-1], tmp_path / "imported", tokenizer, filler_id=3 if separator == 3 else None)
    assert report["documents"] == 60 and report["chains"] == 2 and report["filler"] == filler
    assert report["cut_documents"] == 0
    assert report["ids"] == report["text_ids"] + report["separators"] + report["filler"]
    write_dataset(tmp_path / "ours", tokenizer, texts)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"imported{suffix}").read_bytes() == (tmp_path / f"ours{suffix}").read_bytes()
    imported, written = IndexedDataset(tmp_path / "imported").manifest, IndexedDataset(tmp_path / "ours").manifest
    assert imported.text_bytes == written.text_bytes and imported.tokenizer.checksum == written.tokenizer.checksum
    assert [(source.file, source.documents) for source in imported.sources] == [("train_0", 25), ("train_1", 35)]
    assert CausalLMDataset([(str(tmp_path / "imported"), 1.0)], 16, 0).unchecked_prefixes == []


def test_planted_filler_is_found_with_its_place(tokenizer, tmp_path, repository, monkeypatch):
    """Five thousand BOS over the edge of two chunks: counted, named by file and place, and not in the dataset.

    In whatever blocks the chunks are read.
    """
    texts = Tokenizer.load(tokenizer).encode_batch(documents(200))
    first, second = (np.concatenate([np.array([BOS, *ids]) for ids in part]) for part in (texts[:100], texts[100:]))
    stream = np.concatenate([first, np.full(5000, BOS), second])
    inputs = write_chunks(tmp_path, "train_slim", stream[: len(stream) // 4 * 4], len(stream) // 4, None)
    command = [repository / "tools" / "import_litpkds.py", "--input", *inputs, "--tokenizer", tokenizer, "--output-prefix",
               tmp_path / "a", "--json"]
    tool = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=60)
    assert (tool.returncode, tool.stderr) == (0, "")
    report = json.loads(tool.stdout)
    place = len(first) % (len(stream) // 4)
    assert (report["filler"], report["filler_runs"], report["longest_filler"]) == (5000, 1, 5000)
    assert report["longest_filler_at"] == f"{inputs[len(first) // (len(stream) // 4)]}, id {place:,}"
    assert report["documents"] == 200 and report["cut_documents"] == 1
    assert inspect_dataset(tmp_path / "a", verify=True)["longest_run"] < 50
    monkeypatch.setattr(litpkds, "_BLOCK", 100)
    in_blocks = import_litpkds(inputs, tmp_path / "b", tokenizer)
    assert in_blocks == report | {"dataset": str(tmp_path / "b")}
    assert (tmp_path / "b.bin").read_bytes() == (tmp_path / "a.bin").read_bytes()


@pytest.mark.parametrize(("dtype", "code"), [("<i4", 4), ("<i8", 5), ("u1", 1)])
def test_a_vocabulary_alone_gives_a_dataset_without_manifest(tmp_path, dtype, code):
    """Llama's BOS and EOS; what is imported opens, and no other file is written."""
    inputs = write_chunks(tmp_path, "x", np.array([BOS, 7, 8, EOS, BOS, 9, EOS]), 7, dtype=dtype, code=code)
    report = import_litpkds(inputs, tmp_path / "out" / "a", vocab_size=32_000, bos=False)
    dataset = IndexedDataset(tmp_path / "out" / "a")
    assert dataset.manifest is None and dataset.tokens.tolist() == [7, 8, EOS, 9, EOS] and report["filler"] == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a.bin", "a.idx"}


def test_damaged_chunks_are_refused_and_leave_nothing(tokenizer, tmp_path):
    """Cut, another magic, version or type, an id too large, a chunk missing, a name that orders nothing."""
    inputs = write_chunks(tmp_path, "x", np.tile([BOS, 7, 8, EOS], 30), 40)
    good = inputs[1].read_bytes()
    for payload, message in (
        (good[:-1], r"0000000001.bin: has 103 bytes; its header counts 40 ids, 104 bytes"),
        (b"NOTPKDS" + good[7:], "begins with b'NOTPKDS'"), (b"", "begins with b''"),
        (good[:7] + b"\2" + good[8:], "has version 2"), (good[:15] + b"\6" + good[16:], "type code 6 is no integer's"),
        (good[:16] + struct.pack("<Q", 2**63) + good[24:], "its header counts 9,223,372,036,854,775,808 ids"),
        (good[:-2] + b"\xff\xff", r"holds id 65535 \(id 39 of the chunk\); ids must be in \[0, 350\)"),
    ):
        inputs[1].write_bytes(payload)
        with pytest.raises(DataError, match=message):
            import_litpkds(inputs, tmp_path / "out" / "a", tokenizer)
        assert not list((tmp_path / "out").iterdir())
    with pytest.raises(DataError, match="x: has 2 chunks and not number 1; documents go on"):
        import_litpkds([inputs[0], inputs[2]], tmp_path / "out" / "a", tokenizer)
    with pytest.raises(DataError, match="is not named like a chunk(.|\n)*x_0000000000.bin: is given twice"):
        import_litpkds([inputs[0], inputs[0], tmp_path / "a.bin"], tmp_path / "out" / "a", tokenizer)
    with pytest.raises(DataError, match="0000000009.bin: cannot be read|and not number"):
        import_litpkds([tmp_path / "x_0000000009.bin"], tmp_path / "out" / "a", tokenizer)
    with pytest.raises(DataError, match="holds nothing but separators"):
        import_litpkds(write_chunks(tmp_path, "y", np.array([BOS]), 40), tmp_path / "out" / "a", tokenizer)
    for folder, size in ((None, None), (tokenizer, 350), (None, 2)):
        with pytest.raises(ConfigError, match="--tokenizer: must be given|--vocab-size: is 2"):
            import_litpkds(inputs, tmp_path / "out" / "a", folder, size)
