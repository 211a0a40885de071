"""The disk fails under one of several processes, or one of them is killed: it costs the save, and nothing else."""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from store_peers import SocketPeers, assert_whole, on_two_processes, save, save_as

from megatron_ttl.checkpoint import store as store_module
from megatron_ttl.checkpoint.store import CheckpointStore
from megatron_ttl.errors import DiskError
from megatron_ttl.files import checksum

CALLS: dict[str, tuple[object, str]] = {
    "fsync": (os, "fsync"), "rename": (os, "rename"), "open": (builtins, "open"), "mkdir": (Path, "mkdir"),
    "tensors": (store_module, "write_tensors"), "scandir": (os, "scandir"), "directory": (os, "open"),
    "free": (shutil, "disk_usage")}
# How often each process makes each call in a save of three; the first one makes the folder and ends it.
COUNTS = {"fsync": ([6, 2, 2]), "rename": ([1, 0, 0]), "open": ([4, 1, 1]), "mkdir": ([1, 0, 0]),
          "tensors": ([2, 1, 1]), "scandir": ([1, 0, 0]), "directory": ([2, 1, 1]), "free": ([1, 0, 0])}
FAILURES = [(call, rank, at) for call, counts in COUNTS.items() for rank, count in enumerate(counts)
            for at in range(1, count + 1)]


class OnOne:
    """Count the calls that one peer makes until its folder has its name; fail at the n-th."""

    def __init__(self, patch: pytest.MonkeyPatch, call: str, rank: int, at: int, error: OSError | None) -> None:
        self.calls, self.done = 0, False
        owner, name = CALLS[call]
        real, retention = getattr(owner, name), CheckpointStore._remove_old

        def counting(*arguments: Any, **options: Any) -> Any:
            if threading.current_thread().name == f"rank {rank}" and not self.done:
                self.calls += 1
                if self.calls == at:
                    raise error
            return real(*arguments, **options)

        def ended(store: CheckpointStore, step: int) -> None:
            self.done = True
            retention(store, step)

        patch.setattr(owner, name, counting)
        patch.setattr(CheckpointStore, "_remove_old", ended)


def bytes_of(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): checksum(path) for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_no_disk_call_is_left_out_below(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, rank: int) -> None:
    save(tmp_path, 5, 3)
    with monkeypatch.context() as patch:
        counted = OnOne(patch, call, rank, -1, None)
        assert all(result.written for result in save(tmp_path, 10, 3))
    assert counted.calls == COUNTS[call][rank]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize(("call", "rank", "at"), FAILURES)
def test_a_failing_disk_under_one_of_three(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, rank: int,
                                           at: int, number: int) -> None:
    save(tmp_path, 5, 3)
    former = bytes_of(tmp_path)
    with monkeypatch.context() as patch:
        OnOne(patch, call, rank, at, OSError(number, os.strerror(number)))
        results = save(tmp_path, 10, 3)
    assert all(type(error) is DiskError and str(error) == str(results[0]) for error in results), results
    assert str(results[0]).startswith(f"rank {rank}: ")
    assert f"step 10 could not be written ({os.strerror(number)}); it needs " in str(results[0])
    # The first one's last fsync comes after the rename: the new one is there, but not known to be safe.
    renamed = call in ("fsync", "directory") and rank == 0 and at == COUNTS[call][0]
    assert sorted(os.listdir(tmp_path)) == ["step-00000005", "step-00000010"][: 1 + renamed]
    assert {name: digest for name, digest in bytes_of(tmp_path).items() if "00000005" in name} == former
    assert_whole(tmp_path, 10 if renamed else 5)
    assert all(result.written != renamed for result in save(tmp_path, 10, 3))
    assert_whole(tmp_path, 10)


class Full(io.FileIO):
    """A file on a disk that takes half of the first write."""

    def write(self, payload: Any) -> int:
        super().write(payload[: len(payload) // 2])
        raise OSError(errno.ENOSPC, "No space left on device", self.name)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_bytes_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    save(tmp_path, 5, 3)
    real = builtins.open

    def opening(path: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if str(path).endswith(f"weights-{rank:05d}.safetensors") and "x" in mode:
            return Full(path, mode)
        return real(path, mode, *arguments, **options)

    monkeypatch.setattr(builtins, "open", opening)
    for error in save(tmp_path, 10, 3):
        assert type(error) is DiskError and str(error).startswith(f"rank {rank}: "), error
        assert f"weights-{rank:05d}.safetensors: " in str(error) and "(No space left on device)" in str(error)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["step-00000005"]
    assert_whole(tmp_path, 5)


def test_all_processes_bytes_must_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = save(tmp_path / "tried", 5, 3)[0].bytes
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    for error in save(tmp_path / "run", 5, 3):
        assert type(error) is DiskError and str(error).startswith("rank 0: ")
        assert "the checkpoint of step 5 needs " in str(error)
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed))
    assert [result.bytes for result in save(tmp_path / "run", 5, 3)] == [needed] * 3


def test_a_disk_that_does_not_say_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(shutil, "disk_usage", broken)
    for error in save(tmp_path, 5, 3):
        assert type(error) is DiskError and "(Input/output error); it needs " in str(error)
        assert "an unknown number of bytes are free" in str(error)
    assert os.listdir(tmp_path) == []


def test_trouble_after_the_save_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the first one's alone, and the others have gone on: it must not raise what they do not."""
    real = CheckpointStore._remove_old

    def blind(store: CheckpointStore, step: int) -> None:
        def refuse(*_: Any) -> None:
            raise OSError(errno.EIO, "Input/output error")
        with monkeypatch.context() as patch:
            patch.setattr(os, "scandir", refuse)
            real(store, step)

    monkeypatch.setattr(CheckpointStore, "_remove_old", blind)
    store = CheckpointStore(tmp_path)
    store.save(5, {"weights": {}}, {"step": 5})
    assert len(store.warnings) == 1 and "cannot be read (Input/output error)" in store.warnings[0]
    assert [result.written for result in save(tmp_path, 10, 3)] == [True] * 3


def test_old_checkpoints_go_whoever_wrote_them(tmp_path: Path) -> None:
    for step, world_size in ((5, 3), (10, 1), (15, 2), (20, 4)):
        save(tmp_path, step, world_size, keep_last=2)
    assert sorted(os.listdir(tmp_path)) == ["step-00000015", "step-00000020"]
    (tmp_path / "step-00000020/weights-00003.safetensors").unlink()
    save(tmp_path, 25, 2, keep_last=2)
    assert sorted(os.listdir(tmp_path)) == ["step-00000015", "step-00000020", "step-00000025"]


# --- kills ---


def dying_at(n: int, victim: int, folder: Path) -> Callable[[SocketPeers], None]:
    """Save steps 10 and 15 as one of two processes; the victim vanishes before its n-th change of `folder`."""
    def action(peers: SocketPeers) -> None:
        count = 0

        def tick() -> None:
            nonlocal count
            count += 1
            if count == n:
                os._exit(77)

        def watch(event: str, arguments: tuple) -> None:
            changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
            if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR):
                changes = str(folder) in str(arguments[0])
            if changes:
                tick()

        if peers.rank == victim:
            fsync = os.fsync
            os.fsync = lambda descriptor: (tick(), fsync(descriptor))[1]
            sys.addaudithook(watch)
        for step in (10, 15):
            save_as(peers, folder, step, keep_last=1)

    return action


@pytest.mark.parametrize("victim", [0, 1])
def test_a_kill_of_one_at_any_moment(tmp_path: Path, victim: int) -> None:
    """Two saves with deletions, one process killed before every change that it makes of the disk."""
    n, statuses = 0, [77, 77]
    while statuses[victim] == 77:
        n += 1
        folder = tmp_path / str(n)
        save(folder, 5, 2, keep_last=1)
        statuses = on_two_processes(dying_at(n, victim, folder))
        assert statuses[victim] in (0, 77) and statuses[1 - victim] in (0, 1), statuses
        found = CheckpointStore(folder).latest_valid()
        assert found is not None
        assert_whole(folder, found.step)
        assert statuses[victim] == 77 or found.step == 15
        if victim == 1 and n == 1:
            assert os.listdir(folder) == ["step-00000005"], "the first process lives, and clears up"
        # Going on from there, with other processes, everything comes right, and nothing is left over.
        save(folder, found.step + 5, 3, keep_last=1)
        assert_whole(folder, found.step + 5)
        assert os.listdir(folder) == [f"step-{found.step + 5:08d}"]
    assert n > (30, 5)[victim], f"only {n} kills"
