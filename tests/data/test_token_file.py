"""Ids come from the file that was opened, whatever becomes of it, or there is an error with its name; never a signal."""

from __future__ import annotations

import errno
import gc
import os
import time
from pathlib import Path

import numpy as np
import pytest
from patience import patient
from reliability.forked import in_fork

from megatron_ttl.data import background_check, indexed_dataset
from megatron_ttl.data.background_check import BackgroundCheck
from megatron_ttl.data.causal_lm_dataset import CausalLMDataset, HeldOutDataset
from megatron_ttl.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from megatron_ttl.data.manifest import Description, TokenizerRecord
from megatron_ttl.errors import ConfigError, DataError
from megatron_ttl.train import open_data

EOS = 2
DESCRIPTION = Description(text_bytes=1, tokenizer=TokenizerRecord(
    directory="a.tokenizer", checksum="sum", vocab_size=500, eos_id=EOS, bos_id=1))


def write(prefix: Path, documents: int = 3_000, seed: int = 0, dtype: str = "uint16") -> np.ndarray:
    """Write documents of a hundred ids and return all of them."""
    ids = np.random.default_rng(seed).integers(4, 500, (documents, 100)).astype(dtype)
    ids[:, -1] = EOS
    with IndexedDatasetWriter(prefix, dtype, 500, EOS, overwrite=True) as writer:
        writer.add_documents(ids.ravel(), [100] * documents)
        writer.finish(DESCRIPTION)
    return ids.ravel()


def test_arrays_outlive_dataset_and_files(tmp_path):
    """Megatron's reader unmaps beneath its arrays, and the process ends with a segmentation fault."""
    ids = write(tmp_path / "a")

    def child() -> None:
        dataset = IndexedDataset(tmp_path / "a")
        index = dataset._index
        views = [dataset.tokens, dataset.document(7), dataset.document_ends(), dataset.ids[5:14]]
        views += [index.lengths, index.pointers, index.boundaries, np.asarray(dataset.tokens)[1::3]]
        del dataset, index
        for path in tmp_path.glob("a.*"):
            path.unlink()
        gc.collect()
        wanted = [ids, ids[700:800], np.arange(100, 300_001, 100), ids[5:14], np.full(3_000, 100),
                  np.arange(0, 600_000, 200), np.arange(3_001), ids[1::3]]
        assert all(map(np.array_equal, views, wanted))
        assert not any(view.flags.writeable for view in (views[0], *views[4:7]))

    assert in_fork(child).kind == "returned"


@pytest.mark.parametrize("kept", [0, 1_000, 300_001])
def test_a_file_cut_short_while_it_is_read_is_an_error(tmp_path, kept):
    """Under a memory map it is SIGBUS, the end of the process."""
    write(tmp_path / "a")

    def child() -> None:
        dataset, held_out = CausalLMDataset([(str(tmp_path / "a"), 1.0)], 64, 0), HeldOutDataset(tmp_path / "a", 64)
        dataset.samples(range(50))
        os.truncate(tmp_path / "a.bin", kept)
        for read in (lambda: dataset.samples(range(500)), lambda: held_out.samples(range(len(held_out)))):
            with pytest.raises(DataError, match=rf"a.bin: cannot be read at byte [\d,]+ \(it has {kept:,} bytes\); it had "
                                                "300,000 ids, 600,000 bytes, when it was opened"):
                read()
        os.truncate(tmp_path / "a.idx", kept // 10)
        with pytest.raises(DataError, match=rf"a.idx: has {kept // 10:,} bytes; it had 60,042 when it was opened"):
            dataset.documents(range(4))

    outcome = in_fork(child)
    assert (outcome.kind, outcome.text) == ("returned", "")


def test_a_file_replaced_while_it_is_read_stays_the_one_that_was_opened(tmp_path):
    """By another one under its name, as preprocessing and `rsync` do it."""
    write(tmp_path / "a")
    dataset = CausalLMDataset([(str(tmp_path / "a"), 1.0)], 64, 0)
    before = dataset.samples(range(100))
    write(tmp_path / "a", seed=1)
    assert np.array_equal(dataset.samples(range(100)), before)
    assert not np.array_equal(CausalLMDataset([(str(tmp_path / "a"), 1.0)], 64, 0).samples(range(100)), before)


def test_a_disk_that_fails_is_an_error_and_short_reads_are_not(tmp_path, monkeypatch):
    """Network file systems may give fewer bytes than asked for."""
    ids = write(tmp_path / "a")
    dataset, read = IndexedDataset(tmp_path / "a"), os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, blocks, offset: read(file, [blocks[0][:7]], offset))
    for place in (slice(3, 67), slice(299_936, 300_064), slice(300_000, None), slice(7), slice(9, 3)):
        assert np.array_equal(dataset.ids[place], ids[place]) and dataset.ids[place].dtype == np.uint16
    assert len(dataset.ids) == 300_000

    def broken(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(DataError, match=r"a.bin: cannot be read at byte 6 \(Input/output error\); .*; check the disk"):
        dataset.ids[3:67]


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_preloaded_data_are_the_same_samples(tmp_path, dtype):
    """Bit for bit over three epochs of two sources; afterwards no file is needed."""
    write(tmp_path / "a", dtype=dtype), write(tmp_path / "b", 500, seed=1, dtype=dtype)
    sources = [(str(tmp_path / "a"), 0.6), (str(tmp_path / "b"), 0.4)]
    from_disk, preloaded = CausalLMDataset(sources, 64, 5), CausalLMDataset(sources, 64, 5)
    open_data.preload(preloaded, 1)
    numbers = np.arange(int(3 * sum(from_disk.samples_per_epoch)))
    wanted, record = from_disk.samples(numbers), from_disk.record()
    for path in tmp_path.iterdir():
        if path.is_file():
            os.truncate(path, 0)
    found = preloaded.samples(numbers)
    assert all(map(np.array_equal, found, wanted)) and preloaded.record() == record
    assert all(part.flags.c_contiguous and part.flags.writeable and part.dtype == np.int64 for part in found)


def test_preloading_refuses_damage_and_more_than_the_memory(tmp_path, monkeypatch):
    """What is read anyway is compared; on a machine with eight processes each has its own copy."""
    write(tmp_path / "a")
    dataset = CausalLMDataset([(str(tmp_path / "a"), 1.0)], 64, 0)
    monkeypatch.setattr(open_data, "available_memory_bytes", lambda: 4_000_000)
    open_data.preload(dataset, 6)
    with pytest.raises(ConfigError, match="data_loader.preload: takes 4.6 MiB for 8 processes on this machine; 3.8 MiB of "
                                          "memory are available; set it to false"):
        open_data.preload(dataset, 8)
    flip(tmp_path / "a.bin", 1_000)
    with pytest.raises(DataError, match="a.bin: its checksum is xxh3:"):
        open_data.preload(dataset, 1)


def flip(path: Path, place: int) -> None:
    with open(path, "r+b") as handle:
        handle.seek(place)
        before = handle.read(1)
        handle.seek(place)
        handle.write(bytes([before[0] ^ 1]))


def finished(check: BackgroundCheck) -> BackgroundCheck:
    check._thread.join(timeout=20)
    assert not check._thread.is_alive()
    return check


def test_large_data_are_compared_in_the_background(tmp_path, monkeypatch):
    """Whole ones pass; of damaged ones the file is named, each time one asks, and what to do about the run."""
    monkeypatch.setattr(indexed_dataset, "CHECKED_AT_OPEN", 300_000)
    for name in ("a", "b", "small"):
        write(tmp_path / name, 1_000 if name == "small" else 3_000)
    datasets = [IndexedDataset(tmp_path / name) for name in ("a", "b", "small")]
    assert [dataset.verified for dataset in datasets] == [False, False, True]
    check = finished(BackgroundCheck(datasets))
    check.require_whole()
    assert check.unfinished == []
    flip(tmp_path / "b.bin", 599_999)
    check = finished(BackgroundCheck(datasets))
    for _ in range(2):
        with pytest.raises(DataError, match=r"b.bin: its checksum is .*; what was learnt since this start may be wrong: go "
                                            "on from a checkpoint before it"):
            check.require_whole()
    os.truncate(tmp_path / "a.bin", 5)
    with pytest.raises(DataError, match=r"a.bin: cannot be read at byte 5 \(it has 5 bytes\)"):
        finished(BackgroundCheck(datasets)).require_whole()


def test_a_check_can_be_left_early(tmp_path, monkeypatch):
    """At the end of a run: at once, and what was not compared is named."""
    monkeypatch.setattr(indexed_dataset, "CHECKED_AT_OPEN", 0)
    write(tmp_path / "a")
    dataset = IndexedDataset(tmp_path / "a")
    read = dataset.checksum_faults
    monkeypatch.setattr(dataset, "checksum_faults", lambda stop: (stop.wait(10), read(stop))[1])
    check, begun = BackgroundCheck([dataset]), time.monotonic()
    check.close()
    check.close()
    assert time.monotonic() - begun < patient(5) and check.unfinished == [str(tmp_path / "a")]
    check.require_whole()
    assert background_check.BackgroundCheck([]).unfinished == []
