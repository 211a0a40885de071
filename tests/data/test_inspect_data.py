"""Accounting for a dataset: exact counts, planted filler, planted damage."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_folder import documents, write_dataset, write_tokenizer

from megatron_ttl.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from megatron_ttl.data.inspect import decoded_documents, inspect_dataset
from megatron_ttl.errors import ConfigError, DataError
from megatron_ttl.files import checksum


@pytest.fixture
def prefix(tmp_path):
    write_dataset(tmp_path / "a", write_tokenizer(tmp_path / "tokenizer"), documents(30, seed=4))
    return tmp_path / "a"


def test_counts_are_those_of_the_ids(prefix, monkeypatch):
    """Tokens, special tokens, entropy and the longest run, in blocks that cut runs in two."""
    monkeypatch.setattr("megatron_ttl.data.inspect._BLOCK_TOKENS", 7)
    result = inspect_dataset(prefix, verify=True)
    ids = np.asarray(IndexedDataset(prefix).tokens)
    shares = np.unique(ids, return_counts=True)[1] / len(ids)
    assert result["unigram_entropy_nats"] == pytest.approx(-(shares * np.log(shares)).sum())
    assert (result["tokens"], result["documents"], result["distinct_ids"]) == (len(ids), 30, len(shares))
    assert result["special_token_share"] == pytest.approx((ids < 4).mean())
    runs, length = [], 0
    for i, token in enumerate(ids):
        length = length + 1 if i and ids[i - 1] == token else 1
        runs.append((length, int(token), i - length + 1))
    assert result["longest_run"] == max(runs)[0]
    assert (result["longest_run"], result["longest_run_id"], result["longest_run_at"]) in runs


def test_documents_are_shown_as_they_were_written(prefix):
    """The first texts, without special tokens."""
    assert [text for _, _, text in decoded_documents(prefix, 3)] == documents(30, seed=4)[:3]
    assert [text for _, _, text in decoded_documents(prefix, 3, 28)] == documents(30, seed=4)[28:]
    with pytest.raises(ConfigError, match="--show: -1; must be 0 or more"):
        next(decoded_documents(prefix, -1))
    with pytest.raises(ConfigError, match="--first: 30; must be a number from 0 to 29; "):
        next(decoded_documents(prefix, 1, 30))


@pytest.mark.parametrize(("position", "value", "message"), [(5, 2, "checksum"), (0, 60_000, "checksum")])
def test_a_changed_id_is_found_by_verify_alone(prefix, position, value, message):
    """The size is right, so opening does not see it; --verify does."""
    ids = np.fromfile(f"{prefix}.bin", np.uint16)
    ids[position] = value
    ids.tofile(f"{prefix}.bin")
    inspect_dataset(prefix)
    with pytest.raises(DataError, match=message):
        inspect_dataset(prefix, verify=True)


def rewrite(prefix, change):
    """Change ids behind the writer's back, and the checksum with them: what a wrong writer would leave."""
    ids = np.fromfile(f"{prefix}.bin", np.uint16)
    change(ids)
    ids.tofile(f"{prefix}.bin")
    manifest = json.loads(Path(f"{prefix}.json").read_text())
    manifest["bin"]["checksum"] = checksum(f"{prefix}.bin")
    Path(f"{prefix}.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("block", [7, 1 << 20])
def test_wrong_ends_of_documents_are_named(prefix, monkeypatch, block):
    """An EOS in the middle, one that is missing, wherever blocks cut; both documents are named in one go."""
    monkeypatch.setattr("megatron_ttl.data.inspect._BLOCK_TOKENS", block)
    ends = IndexedDataset(prefix).document_ends()

    def change(ids):
        ids[ends[2] - 3] = 2
        ids[ends[20] - 1] = 7

    rewrite(prefix, change)
    with pytest.raises(DataError) as caught:
        inspect_dataset(prefix, verify=True)
    assert len(caught.value.faults) == 2
    assert "document 2 has 2 EOS (id 2) and ends with id 2; must have exactly one" in caught.value.faults[0]
    assert "document 20 has 0 EOS (id 2) and ends with id 7; must have exactly one" in caught.value.faults[1]


def test_ids_outside_of_the_vocabulary_are_named(prefix):
    """Below the type's limit, beyond the tokenizer's."""
    rewrite(prefix, lambda ids: ids.__setitem__(4, 400))
    with pytest.raises(DataError, match="a.bin: holds id 400; must be below the vocabulary's 350"):
        inspect_dataset(prefix, verify=True)


def test_filler_is_found(tmp_path, monkeypatch):
    """A tail of one id, as writers of fixed blocks leave it: with its length and place, over many blocks."""
    monkeypatch.setattr("megatron_ttl.data.inspect._BLOCK_TOKENS", 100)
    with IndexedDatasetWriter(tmp_path / "a", "uint16", 500, 2) as writer:
        writer.add_document([5, 6, 2])
        writer.add_document([7] + [9] * 5_000 + [2])
        writer.finish()
    result = inspect_dataset(tmp_path / "a")
    assert (result["longest_run"], result["longest_run_id"], result["longest_run_at"]) == (5_000, 9, 4)
    with pytest.raises(DataError, match="a.bin: holds id 9 5,000 times in a row from token 4; text has no"):
        inspect_dataset(tmp_path / "a", verify=True)


@pytest.mark.parametrize(("wrong", "place"), [(-1, 2), (2**31 - 1, 3)])
def test_ids_that_no_tokenizer_has_do_not_cost_memory(tmp_path, wrong, place):
    """In foreign int32 data, where anything may stand: a fault, not a table of two billion counts."""
    with IndexedDatasetWriter(tmp_path / "a", "int32", 100_000, 2) as writer:
        writer.add_document([70_000, 5, 6, 7, 8, 2])
        writer.finish()
    ids = np.fromfile(f"{tmp_path}/a.bin", np.int32)
    ids[place] = wrong
    ids.tofile(f"{tmp_path}/a.bin")
    with pytest.raises(DataError, match=f"a.bin: holds id {wrong} at token {place}; no tokenizer has it"):
        inspect_dataset(tmp_path / "a")


def test_foreign_and_empty_data_are_accounted_for(tmp_path):
    """Without a manifest there is nothing to decode with; without documents there is nothing to count."""
    with IndexedDatasetWriter(tmp_path / "a", "int32", 100_000, 2) as writer:
        writer.finish()
    result = inspect_dataset(tmp_path / "a", verify=True)
    assert (result["documents"], result["tokens"], result["longest_run"]) == (0, 0, 0)
    assert result["verified"] == "structure (has no manifest)" and "unknown" in result["manifest"]
    with pytest.raises(DataError, match="a: has no manifest, so its tokenizer is unknown"):
        next(decoded_documents(tmp_path / "a", 1))


def test_the_command(repository, prefix):
    """A table for people, JSON for programs, exit code 2 for a damaged file."""
    command = [sys.executable, str(repository / "tools/inspect_data.py"), "--prefix", str(prefix), "--show", "1"]
    table = subprocess.run([*command, "--verify"], capture_output=True, text=True)
    assert table.returncode == 0 and "longest_run" in table.stdout and documents(30, seed=4)[0] in table.stdout
    result = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True).stdout)
    assert result["documents"] == 30 and result["shown"] == documents(30, seed=4)[:1]
    with open(f"{prefix}.bin", "ab") as handle:
        handle.write(b"x")
    broken = subprocess.run(command, capture_output=True, text=True)
    assert broken.returncode == 2 and "1 bytes too many" in broken.stderr and "Traceback" not in broken.stderr
