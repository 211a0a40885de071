"""Several processes write and read one checkpoint: slices, damage, full disks and deaths of single ones."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from store_peers import ThreadPeers, assert_whole, forge, on_all, pieces, save, save_as, tensors
from store_states import cut, flip, replace_by

from megatron_ttl.checkpoint import store as store_module
from megatron_ttl.checkpoint.pieces import cover_fault
from megatron_ttl.checkpoint.store import CheckpointStore
from megatron_ttl.errors import CheckpointError, DiskError
from megatron_ttl.testing import run_distributed


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_pieces_come_together(tmp_path: Path, world_size: int) -> None:
    """One process writes version 1, which knows no pieces; several write files of their own."""
    results = save(tmp_path, 5, world_size)
    assert all(result.written and result.bytes == results[0].bytes for result in results), results
    assert_whole(tmp_path, 5)
    names = sorted(os.listdir(tmp_path / "step-00000005"))
    expected = ["manifest.json", "record.json"]
    expected += ["rng.safetensors", "weights.safetensors"] if world_size == 1 else [
        "rng-00000.safetensors", *[f"weights-{rank:05d}.safetensors" for rank in range(world_size)]]
    assert names == sorted(expected)
    assert json.loads((tmp_path / "step-00000005/manifest.json").read_text())["version"] == min(world_size, 2)
    total = sum((tmp_path / "step-00000005" / name).stat().st_size for name in names)
    assert total == results[0].bytes, "what a save needs is known before and exact"


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_any_slice_can_be_read(tmp_path: Path, world_size: int) -> None:
    save(tmp_path, 5, world_size)
    checkpoint = CheckpointStore(tmp_path).latest_valid()
    assert checkpoint is not None
    for name, offset, shape in [("rows", (3, 1), (7, 2)), ("rows", (0, 0), (4, 5)), ("rows", (11, 4), (1, 1)),
                                ("columns", (1, 5), (2, 14)), ("norm", (2,), (3,)), ("rows", (5, 0), (0, 5))]:
        expected = tensors(5)[name][tuple(slice(a, a + n) for a, n in zip(offset, shape, strict=True))]
        assert torch.equal(checkpoint.read("weights", name, offset, shape), expected)
    assert torch.equal(checkpoint.read("weights", "scalar"), torch.tensor(5.0))
    assert set(checkpoint.names("weights")) == set(tensors(5))
    with pytest.raises(CheckpointError, match="weights has no tensor 'x'"):
        checkpoint.read("weights", "x")


def test_a_slice_reads_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only files that hold a part of it are opened."""
    from megatron_ttl.checkpoint import reading

    save(tmp_path, 5, 3)
    checkpoint = CheckpointStore(tmp_path).latest_valid()
    opened, real = [], reading.safe_open
    monkeypatch.setattr(reading, "safe_open",
                        lambda path, **options: (opened.append(path.name), real(path, **options))[1])
    checkpoint.read("weights", "rows", (5, 0), (2, 5))
    assert opened == ["weights-00001.safetensors"]


@pytest.mark.parametrize("name", ["weights-00000.safetensors", "weights-00002.safetensors", "rng-00000.safetensors",
                                  "record.json", "manifest.json"])
@pytest.mark.parametrize("damage", [flip(0.5), flip(0.99, 7), cut(0.7), lambda path: path.unlink(),
                                    lambda path: replace_by(path, lambda p: p.write_bytes(b""))],
                         ids=["flip", "last", "cut", "missing", "empty"])
def test_damage_to_any_file_is_found_by_all(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    """Every peer comes to the same older checkpoint, though each looked at a share of the files."""
    save(tmp_path, 5, 3)
    save(tmp_path, 10, 3)
    damage(tmp_path / "step-00000010" / name)

    def latest(peers: ThreadPeers) -> Any:
        store = CheckpointStore(tmp_path)
        checkpoint = store.latest_valid(peers)
        return checkpoint.step, store.warnings

    results = on_all(3, latest)
    assert [step for step, _ in results] == [5, 5, 5]
    assert all(warnings == results[0][1] and any(name in warning for warning in warnings) for _, warnings in results)


def test_nothing_whole_is_an_error_on_all(tmp_path: Path) -> None:
    save(tmp_path, 5, 2)
    flip(0.5)(tmp_path / "step-00000005/weights-00001.safetensors")
    results = on_all(2, lambda peers: CheckpointStore(tmp_path).latest_valid(peers))
    assert all(isinstance(error, CheckpointError) and "no checkpoint is whole" in str(error) for error in results)


def test_saving_again_keeps_the_valid_one(tmp_path: Path) -> None:
    save(tmp_path, 5, 2)
    before = (tmp_path / "step-00000005/manifest.json").stat().st_mtime_ns
    assert [result.written for result in save(tmp_path, 5, 2)] == [False, False]
    assert (tmp_path / "step-00000005/manifest.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("victim", [0, 1, 2])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_one_full_disk_fails_all_and_costs_only_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: int,
                                                         number: int) -> None:
    save(tmp_path, 5, 3)
    real = store_module.write_tensors

    def failing(path: Path, *arguments: Any) -> str:
        if path.name == f"weights-{victim:05d}.safetensors":
            real(path, *arguments)
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *arguments)

    monkeypatch.setattr(store_module, "write_tensors", failing)
    results = save(tmp_path, 10, 3)
    assert all(isinstance(error, DiskError) and f"rank {victim}: " in str(error) for error in results), results
    assert os.listdir(tmp_path) == ["step-00000005"]
    monkeypatch.undo()
    assert_whole(tmp_path, 5)
    save(tmp_path, 10, 3)
    assert_whole(tmp_path, 10)


@pytest.mark.parametrize("call", ["_begin", "_commit"])
def test_a_fault_of_the_first_process_reaches_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def failing(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(CheckpointStore, call, failing)
    results = save(tmp_path, 5, 3)
    assert all(isinstance(error, DiskError) and "rank 0: " in str(error) for error in results), results
    assert not list(tmp_path.glob("step-*"))


def test_a_folder_that_is_not_shared_is_named(tmp_path: Path) -> None:
    """Two machines with a disk each: the second does not see what the first made."""
    def action(peers: ThreadPeers) -> Any:
        return CheckpointStore(tmp_path / f"disk{peers.rank}").save(5, pieces(5, peers.rank, 2), {}, peers)

    for error in on_all(2, action):
        assert isinstance(error, DiskError) and "must be on a file system that all machines share" in str(error)
    assert not list(tmp_path.glob("disk*/step-*"))


def killed_while_writing(mesh: Any, folder: str, victim: int) -> None:
    real = store_module.write_tensors

    def dying(path: Path, *arguments: Any) -> str:
        if mesh.rank == victim:
            path.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return real(path, *arguments)

    save_as(mesh, Path(folder), 5)
    store_module.write_tensors = dying
    save_as(mesh, Path(folder), 10)


def saved(mesh: Any, folder: str, step: int) -> bool:
    return save_as(mesh, Path(folder), step).written


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_writer_costs_only_the_save(tmp_path: Path, victim: int) -> None:
    """Real processes: the last checkpoint is used, and the next save clears away what is left."""
    with pytest.raises(RuntimeError, match="died with exit code -9|closed by peer|reset by peer"):
        run_distributed(killed_while_writing, 2, str(tmp_path), victim)
    assert any(".tmp-" in name for name in os.listdir(tmp_path)) == (victim == 0), "the first process clears up"
    assert_whole(tmp_path, 5)
    assert run_distributed(saved, 2, str(tmp_path), 10) == [True, True]
    assert_whole(tmp_path, 10)
    assert sorted(os.listdir(tmp_path)) == ["step-00000005", "step-00000010"]


def piece(content: dict[str, Any], name: str, index: int) -> dict[str, Any]:
    return content["groups"]["weights"][name]["pieces"][index]


@pytest.mark.parametrize(("change", "message"), [
    (lambda c: piece(c, "rows", 1).update(offset=[0, 0]), "weights rows: has pieces that overlap"),
    (lambda c: c["groups"]["weights"]["rows"]["pieces"].pop(), "weights rows: lacks 20 of its 60 elements"),
    (lambda c: piece(c, "rows", 2).update(offset=[9, 0]), "weights rows: has a piece of .* which does not lie in its"),
    (lambda c: piece(c, "rows", 0).update(offset=[0]), "which does not lie in its"),
    (lambda c: piece(c, "rows", 0).update(file="../../x.safetensors"),
     "has a piece in '../../x.safetensors', which is no file of weights"),
    (lambda c: piece(c, "rows", 0).update(file="weights-00001.safetensors"), "has two pieces in one file"),
    (lambda c: c["groups"]["weights"]["norm"].pop("pieces"), "pieces belong to version 2"),
    (lambda c: c["groups"]["weights"]["norm"].update(shape=[7]), "weights norm: lacks 1 of its 7 elements"),
])
def test_manifests_that_lie_about_pieces(tmp_path: Path, change: Callable[[dict[str, Any]], None],
                                         message: str) -> None:
    save(tmp_path, 5, 3)
    forge(tmp_path / "step-00000005", change)
    with pytest.raises(CheckpointError, match=message):
        CheckpointStore(tmp_path).open(5)


@pytest.mark.parametrize(("shape", "blocks", "message"), [
    ((4, 4), [((0, 0), (2, 4)), ((2, 0), (2, 4))], ""),
    ((4, 4), [((0, 0), (2, 4)), ((2, 0), (2, 3))], "lacks 2 of its 16"),
    ((4, 4), [((0, 0), (4, 2)), ((0, 1), (4, 2))], "overlap"), ((4,), [((-1,), (4,))], "does not lie"),
    ((4,), [((0,), (0,))], "does not lie"), ((), [((), ())], ""), ((4,), [], "lacks 4 of its 4"),
])
def test_blocks_cover_a_tensor_once(shape: tuple[int, ...], blocks: list[Any], message: str) -> None:
    fault = cover_fault(shape, blocks)
    assert (message in fault) if message else not fault


def test_a_record_that_is_not_json_is_refused_on_all(tmp_path: Path) -> None:
    """Only the first process knows the record; the others must not wait for it."""
    results = on_all(2, lambda peers: CheckpointStore(tmp_path).save(
        5, pieces(5, peers.rank, 2), {"x": float("nan")}, peers))
    assert all(isinstance(error, CheckpointError) and "NaN" in str(error) for error in results), results
