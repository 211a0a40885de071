"""Accounting for a dataset: exact counts, planted filler, planted damage."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from tiny_folder import documents, write_dataset, write_tokenizer

from megatron_ttl.data.indexed_dataset import IndexedDataset
from megatron_ttl.data.inspect import decoded_documents, inspect_dataset
from megatron_ttl.errors import ConfigError, DataError


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
    with pytest.raises(ConfigError, match="--show: -1; must be 0 or more"):
        next(decoded_documents(prefix, -1))


@pytest.mark.parametrize(("position", "value", "message"), [(5, 2, "checksum"), (0, 60_000, "checksum")])
def test_a_changed_id_is_found_by_verify_alone(prefix, position, value, message):
    """The size is right, so opening does not see it; --verify does."""
    ids = np.fromfile(f"{prefix}.bin", np.uint16)
    ids[position] = value
    ids.tofile(f"{prefix}.bin")
    inspect_dataset(prefix)
    with pytest.raises(DataError, match=message):
        inspect_dataset(prefix, verify=True)


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
