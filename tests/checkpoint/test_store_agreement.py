"""Whatever one process meets alone, all of them come to the same decision, and none waits for another."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from store_peers import ThreadPeers, assert_state, assert_whole, on_all, pieces, save, save_as
from store_states import cut, flip

from megatron_ttl.checkpoint import manifest as manifest_module
from megatron_ttl.checkpoint import store as store_module
from megatron_ttl.checkpoint.peers import PeerFailedError, together
from megatron_ttl.checkpoint.store import CheckpointStore
from megatron_ttl.errors import CheckpointError, DiskError


def latest(folder: Path) -> Callable[[ThreadPeers], Any]:
    def action(peers: ThreadPeers) -> Any:
        store = CheckpointStore(folder)
        checkpoint = store.latest_valid(peers)
        return checkpoint and checkpoint.step, store.warnings
    return action


def only_on(rank: int, real: Callable, fault: Callable[..., BaseException | None]) -> Callable:
    """Return `real`, failing on one peer where `fault` says how."""
    def call(*arguments: Any, **options: Any) -> Any:
        error = fault(*arguments) if threading.current_thread().name == f"rank {rank}" else None
        if error is not None:
            raise error
        return real(*arguments, **options)
    return call


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_record_that_one_process_cannot_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: int) -> None:
    """It alone would go on from an older checkpoint, and the weights of one model would be of two steps."""
    save(tmp_path, 5, 3)
    save(tmp_path, 10, 3)
    monkeypatch.setattr(manifest_module, "read_json_object", only_on(
        victim, manifest_module.read_json_object,
        lambda path: CheckpointError(f"{path}: cannot be read") if "00000010" in str(path) else None))
    results = on_all(3, latest(tmp_path))
    assert [result[0] for result in results] == [5, 5, 5], results
    assert all(result == results[0] for result in results) and "record.json: cannot be read" in results[0][1][0]


@pytest.mark.parametrize("victim", [0, 1, 2])
@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_a_folder_that_one_process_cannot_look_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: int,
                                                  number: int) -> None:
    save(tmp_path, 5, 3)
    save(tmp_path, 10, 3)
    error = OSError(number, os.strerror(number))
    monkeypatch.setattr(Path, "is_dir", only_on(
        victim, Path.is_dir, lambda path: error if path.name == "step-00000010" else None))
    results = on_all(3, latest(tmp_path))
    assert [result[0] for result in results] == [5, 5, 5], results
    assert all(result == results[0] for result in results)
    assert f"step-00000010: cannot be read ({os.strerror(number)})" in results[0][1][0]


def test_other_bytes_under_the_same_name(tmp_path: Path) -> None:
    """Two machines with a disk each, and a checkpoint of the same step on both, of different runs."""
    for rank in (0, 1):
        tensors = {"weights": {"a": torch.full((3,), float(rank))}}
        CheckpointStore(tmp_path / f"{rank}").save(5, tensors, {})
    results = on_all(2, lambda peers: CheckpointStore(tmp_path / f"{peers.rank}").latest_valid(peers))
    assert all(isinstance(error, CheckpointError) for error in results), results
    assert all("the processes see different checkpoints there; it must be one, on a file system that all machines "
               "share" in str(error) for error in results)


def test_the_first_ones_listing_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a shared file system a new folder may be seen by one machine before the other."""
    for step in (5, 10, 15):
        save(tmp_path, step, 2)
    real = CheckpointStore.steps
    monkeypatch.setattr(CheckpointStore, "steps", lambda self: (
        real(self) if threading.current_thread().name == "rank 0" else [5]))
    assert [result[0] for result in on_all(2, latest(tmp_path))] == [15, 15]
    monkeypatch.setattr(CheckpointStore, "steps", lambda self: (
        [5, 10] if threading.current_thread().name == "rank 0" else real(self)))
    assert [result[0] for result in on_all(2, latest(tmp_path))] == [10, 10]


def test_a_listing_that_fails_is_no_fresh_start(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    for error in on_all(2, latest(tmp_path / "checkpoints")):
        assert isinstance(error, CheckpointError) and "rank 0: " in str(error) and "cannot be read" in str(error)
    assert on_all(2, latest(tmp_path / "none")) == [(None, []), (None, [])]


@pytest.mark.parametrize(("writers", "readers"), [(1, 2), (1, 4), (2, 3), (3, 1), (3, 2), (3, 4), (4, 2)])
def test_other_numbers_of_processes(tmp_path: Path, writers: int, readers: int) -> None:
    """What some wrote, others read and go on from; version 1, of one process, too."""
    save(tmp_path, 5, writers)

    def go_on(peers: ThreadPeers) -> None:
        assert_state(CheckpointStore(tmp_path).latest_valid(peers), 5)
        assert_state(CheckpointStore(tmp_path).open(5, peers), 5)
        save_as(peers, tmp_path, 10)
        assert_state(CheckpointStore(tmp_path).latest_valid(peers), 10)

    assert on_all(readers, go_on) == [None] * readers
    assert_whole(tmp_path, 10)


def test_the_work_of_verifying_is_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file of tensors is read by one process, and by one alone."""
    save(tmp_path, 5, 3)
    read, real = [], manifest_module.checksum
    monkeypatch.setattr(manifest_module, "checksum", lambda path: (read.append(path.name), real(path))[1])
    assert [result[0] for result in on_all(2, latest(tmp_path))] == [5, 5]
    assert sorted(name for name in read if name != "record.json") == [
        "rng-00000.safetensors", *[f"weights-{rank:05d}.safetensors" for rank in range(3)]]


def test_all_damaged_files_are_named_by_all(tmp_path: Path) -> None:
    save(tmp_path, 5, 4)
    damaged = ["weights-00000.safetensors", "weights-00002.safetensors", "weights-00003.safetensors"]
    for name in damaged:
        flip(0.9)(tmp_path / "step-00000005" / name)
    results = on_all(3, lambda peers: CheckpointStore(tmp_path).open(5, peers))
    assert all(isinstance(error, CheckpointError) and error.faults == results[0].faults for error in results), results
    assert [[name in fault for name in damaged].count(True) for fault in results[0].faults] == [1, 1, 1]
    cut(0.5)(tmp_path / "step-00000005" / damaged[0])
    results = on_all(3, lambda peers: CheckpointStore(tmp_path).open(5, peers))
    assert len({str(error) for error in results}) == 1 and f"{damaged[0]}: has " in str(results[0])


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_an_error_of_ours_on_one_process_reaches_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                     victim: int) -> None:
    """No disk, no user: the process that has it raises it, and the others quote it instead of waiting."""
    save(tmp_path, 5, 3)
    mine = KeyError("a weight that is not there")
    monkeypatch.setattr(store_module, "write_tensors", only_on(victim, store_module.write_tensors, lambda *_: mine))
    results = save(tmp_path, 10, 3)
    assert results[victim] is mine
    for error in results[:victim] + results[victim + 1 :]:
        assert type(error) is PeerFailedError and f"rank {victim} failed:\n" in str(error)
        assert "KeyError: 'a weight that is not there'" in str(error)
    assert os.listdir(tmp_path) == ["step-00000005"]
    assert_whole(tmp_path, 5)


def test_an_error_of_ours_outweighs_the_disks(tmp_path: Path) -> None:
    """A run survives a full disk, so nobody may take this for one."""
    def action(peers: ThreadPeers) -> Any:
        def fail() -> None:
            raise DiskError("full") if peers.rank == 0 else ZeroDivisionError("ours")
        return together(peers, fail) if peers.rank < 2 else together(peers, lambda: 1)

    kinds = [type(error) for error in on_all(3, action)]
    assert kinds == [PeerFailedError, ZeroDivisionError, PeerFailedError]


def test_the_first_faulty_process_speaks_for_all(tmp_path: Path) -> None:
    def action(peers: ThreadPeers) -> Any:
        def fail() -> int:
            if peers.rank:
                raise DiskError(f"disk {peers.rank} is full", "and broken")
            return 7
        return together(peers, fail)

    results = on_all(3, action)
    assert all(type(error) is DiskError for error in results), results
    assert {tuple(error.faults) for error in results} == {("rank 1: disk 1 is full", "rank 1: and broken")}
    assert on_all(3, lambda peers: together(peers, lambda: peers.rank)) == [[0, 1, 2]] * 3


def test_replicated_tensors_written_twice_are_our_error_on_all(tmp_path: Path) -> None:
    def action(peers: ThreadPeers) -> Any:
        return CheckpointStore(tmp_path).save(5, pieces(5, 0, 2), {}, peers)

    assert [type(error) for error in on_all(2, action)] == [AssertionError, AssertionError]
    assert os.listdir(tmp_path) == []
