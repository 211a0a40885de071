"""Whatever happened to the files of a dataset is known when it is opened, in no time and no memory."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
from dataset_mutations import COUNT, mutations, open_all, originals
from patience import processor
from reliability.forked import in_fork

from megatron_ttl.data.index_file import index_blocks
from megatron_ttl.data.indexed_dataset import CHECKED_AT_OPEN, IndexedDataset
from megatron_ttl.data.manifest import DatasetManifest, FileRecord, TokenizerRecord, dump_manifest
from megatron_ttl.files import checksum


def campaign(folder: Path, seed: int) -> None:
    faults = open_all(folder, seed)
    assert not faults, f"{len(faults)} of {COUNT}: {faults[:20]}"


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 21))])
def test_every_mutation_is_refused_when_opened(tmp_path, seed):
    """With a manifest all five hundred; without one those that contradict the format or each other."""
    outcome = in_fork(lambda: campaign(tmp_path, seed))
    assert (outcome.kind, outcome.text) == ("returned", "")
    assert outcome.extra_bytes < 64 << 20


def test_the_mutations_are_many_of_each_kind(tmp_path):
    """So that a campaign that finds nothing has looked everywhere."""
    files, others = originals(tmp_path)
    every = mutations(files, others, 0)
    assert sum(mutation.structural for mutation in every) > 380
    for kind, least in ((".bin cut", 30), (".idx cut", 50), ("header:", 30), ("lengths:", 30), ("pointers:", 30),
                        ("boundaries:", 30), ("ids:", 60), ("counts", 25), ("leads to", 6), ("is a pipe", 2)):
        assert sum(kind in mutation.name for mutation in every) >= least, kind


def one_document(prefix: Path, count: int) -> str:
    """Write a dataset of one document of zeros, sparse, and its manifest."""
    Path(f"{prefix}.idx").write_bytes(b"".join(index_blocks(np.array([count], np.int32), np.dtype("uint16"))))
    Path(f"{prefix}.bin").touch()
    os.truncate(f"{prefix}.bin", 2 * count)
    records = {suffix: FileRecord(bytes=os.path.getsize(f"{prefix}.{suffix}"), checksum=checksum(f"{prefix}.{suffix}"))
               for suffix in ("bin", "idx")}
    tokenizer = TokenizerRecord(directory="t", checksum="sum", vocab_size=500, eos_id=2, bos_id=1)
    manifest = DatasetManifest(dtype="uint16", documents=1, tokens=count, text_bytes=1, tokenizer=tokenizer, **records)
    Path(f"{prefix}.json").write_text(dump_manifest(manifest))
    return str(prefix)


def test_one_flipped_bit_of_a_quarter_of_a_gigabyte_is_seen_within_a_second(tmp_path):
    """The largest data that are compared with their checksum whenever they are opened."""
    prefix = one_document(tmp_path / "a", CHECKED_AT_OPEN // 2)
    assert in_fork(lambda: IndexedDataset(prefix)).kind == "returned"
    with open(f"{prefix}.bin", "r+b") as handle:
        handle.seek(random.Random(3).randrange(CHECKED_AT_OPEN))
        handle.write(b"\x10")
    outcome = in_fork(lambda: IndexedDataset(prefix))
    assert outcome.kind == "refused" and "a.bin: its checksum is xxh3:" in outcome.text
    assert outcome.cpu_s < processor(1) and outcome.extra_bytes < 64 << 20


def test_larger_data_open_unread_and_are_compared_when_asked(tmp_path):
    """A quarter of a gigabyte and one id."""
    prefix = one_document(tmp_path / "a", CHECKED_AT_OPEN // 2 + 1)
    assert not IndexedDataset(prefix).verified and IndexedDataset(prefix, verify=True).verified
