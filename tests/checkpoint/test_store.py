from __future__ import annotations

import builtins
import errno
import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from store_states import FUTURE, assert_holds, flip, names, save, state

from megatron_ttl.checkpoint import store as store_module
from megatron_ttl.checkpoint.store import CheckpointStore
from megatron_ttl.errors import CheckpointError, DiskError, ExitCode
from megatron_ttl.files import checksum


def test_round_trip_is_exact_for_every_dtype(store: CheckpointStore) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    group = {"bf16": bits.view(torch.bfloat16), "fp16": bits.view(torch.float16),
             "int64": torch.tensor([2**63 - 1, -(2**63)]),
             "fp32": torch.tensor([float("nan"), -0.0, float("inf"), 1e-45, 1.1]),
             "scalar": torch.tensor(3.5),
             "uint8": torch.arange(256, dtype=torch.uint8).reshape(16, 16), "empty": torch.zeros(0, 3),
             "bool": torch.tensor([True])}
    store.save(1, {"weights": group, "empty_group": {}}, {})
    checkpoint = store.open(1)
    loaded = checkpoint.tensors("weights")
    for name, tensor in group.items():
        assert loaded[name].shape == tensor.shape and loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
    assert checkpoint.tensors("empty_group") == {} and checkpoint.groups == ["weights", "empty_group"]
    assert checkpoint.record == {}


def test_one_process_writes_what_it_always_wrote(store: CheckpointStore) -> None:
    """Version 1 to the byte, as before there were pieces: older releases go on reading it."""
    weights = {"b": torch.arange(6, dtype=torch.float32).reshape(2, 3), "a": torch.ones(2, dtype=torch.bfloat16)}
    groups = {"weights": weights, "empty": {}, "rng": {"torch": torch.arange(3, dtype=torch.uint8)}}
    folder = store.save(40, groups, {"note": "épocas", "x": [1, 2.5, None]}).directory
    assert {path.name: checksum(path).removeprefix("xxh3:") for path in folder.iterdir()} == {
        "weights.safetensors": "c49bab784bd659c15f8aeffc2789d78d",
        "empty.safetensors": "20e3ecbf30e42c5fb25df8cdce94a65a",
        "rng.safetensors": "e0efeebdb021e53cf35f97d883d2dc65", "record.json": "3b4d942393f5d01636544dc15b067416",
        "manifest.json": "22f9bb00c9eec2700feec0648f6e4e33"}


def test_newest_comes_first_and_any_can_be_opened(store: CheckpointStore, tmp_path: Path) -> None:
    save(store, 10, 20, 100_000_000)
    assert store.steps() == [10, 20, 100_000_000]
    assert_holds(store.latest_valid(), 100_000_000)
    assert_holds(store.open(10), 10)
    assert_holds(CheckpointStore(tmp_path).open(store.directory / "step-00000020"), 20)
    shutil.copytree(store.directory / "step-00000020", tmp_path / "a copy")
    assert_holds(store.open(tmp_path / "a copy"), 20)


def test_loaded_tensors_are_the_callers_own(store: CheckpointStore) -> None:
    save(store, 10)
    store.latest_valid().tensors("weights")["model.a.weight"].fill_(0)
    assert_holds(store.latest_valid(), 10)


def test_no_folder_is_none_and_reading_writes_nothing(store: CheckpointStore) -> None:
    assert store.latest_valid() is None and store.steps() == []
    assert not store.directory.exists()
    store.directory.mkdir(parents=True)
    assert store.latest_valid() is None
    (store.directory / f"step-00000040.tmp-{FUTURE}").mkdir()
    assert store.latest_valid() is None and len(names(store)) == 1


def test_what_is_no_step_folder_is_not_looked_at(store: CheckpointStore) -> None:
    save(store, 10)
    for name in (f"step-00000020.tmp-{os.getpid()}", "step-20", "step-000000020", "step-00000030 (copy)",
                 "latest"):
        shutil.copytree(store.directory / "step-00000010", store.directory / name)
    assert store.steps() == [10]
    assert_holds(store.latest_valid(), 10)
    assert store.warnings == []


def test_unknown_step_and_group_say_what_there_is(store: CheckpointStore) -> None:
    save(store, 10, 20)
    with pytest.raises(CheckpointError,
                       match=r"step-00000015: does not exist; step must be one of those kept \(10, 20\)"):
        store.open(15)
    with pytest.raises(CheckpointError, match="has no group 'moments'; it has weights, exp_avg, rng"):
        store.open(10).tensors("moments")


def test_a_folder_that_cannot_be_read_is_no_fresh_start(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match="checkpoints: cannot be read"):
        CheckpointStore(tmp_path / "checkpoints").latest_valid()


# --- damage ---


def test_saving_a_step_again_keeps_a_valid_one_and_replaces_a_damaged_one(store: CheckpointStore) -> None:
    save(store, 10, 20)
    before = (store.directory / "step-00000020" / "manifest.json").stat().st_ino
    saved = store.save(20, state(99), {})
    assert not saved.written and store.warnings == ["step 20: a valid checkpoint is there already; it stays "
                                                    "as it is"]
    assert (store.directory / "step-00000020" / "manifest.json").stat().st_ino == before
    flip(0.8)(store.directory / "step-00000020" / "weights.safetensors")
    assert store.save(20, state(20), {"consumed_samples": 160}).written
    assert_holds(store.latest_valid(), 20)
    assert names(store) == ["step-00000010", "step-00000020"]


@pytest.mark.parametrize(("keep_last", "keep_every", "left"), [
    (1, None, [70]), (2, None, [60, 70]), (9, None, [10, 20, 30, 40, 50, 60, 70]), (1, 30, [30, 60, 70]),
    (2, 20, [20, 40, 60, 70])])
def test_retention(tmp_path: Path, keep_last: int, keep_every: int | None, left: list[int]) -> None:
    store = CheckpointStore(tmp_path, keep_last, keep_every)
    save(store, 10, 20, 30, 40, 50, 60, 70)
    assert store.steps() == left and names(store) == [f"step-{step:08d}" for step in left]
    assert_holds(store.latest_valid(), 70)


def test_damaged_checkpoints_never_push_out_the_last_whole_ones(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    save(store, 10, 20, 30)
    (tmp_path / "step-00000030" / "weights.safetensors").unlink()
    save(store, 40)
    assert store.steps() == [20, 30, 40]
    save(store, 50)
    assert store.steps() == [40, 50]


def test_what_was_just_saved_stays_whatever_else_is_there(tmp_path: Path) -> None:
    save(CheckpointStore(tmp_path, keep_last=9), 60, 70)
    store = CheckpointStore(tmp_path, keep_last=1)
    save(store, 50)
    assert store.steps() == [50, 60, 70]


def test_trouble_with_deleting_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path, keep_last=1)
    save(store, 10)

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))
    monkeypatch.setattr(store_module, "_delete", refuse)
    save(store, 20)
    assert len(store.warnings) == 1
    assert "step-00000010: could not be deleted (Permission denied)" in store.warnings[0]
    assert_holds(store.latest_valid(), 20)


def test_leftovers_of_dead_processes_go_and_those_of_living_ones_stay(store: CheckpointStore) -> None:
    save(store, 10)
    alive = os.getppid()
    for name in (f"step-00000020.tmp-{FUTURE}", f"step-00000020.tmp-{os.getpid()}",
                 f"step-00000020.old-{FUTURE}",
                 f"step-00000020.tmp-{alive}", "notes.tmp-1"):
        shutil.copytree(store.directory / "step-00000010", store.directory / name)
    save(store, 20)
    assert names(store) == sorted(["notes.tmp-1", "step-00000010", "step-00000020",
                                   f"step-00000020.tmp-{alive}"])


# --- the record ---


@pytest.mark.parametrize("record",
                         [{"loss": float("nan")}, {"loss": [float("inf")]}, {"x": {1, 2}},
                          {"x": torch.ones(1)},
                                    {"x": "\ud800"}, {"x": "a" * (5 << 20)}])
def test_a_record_that_is_not_json_is_refused(store: CheckpointStore, record: dict) -> None:
    with pytest.raises(CheckpointError, match="record.json: cannot be written .* must be plain and small "
                                              "JSON without NaN"):
        store.save(1, state(1), record)
    assert not store.directory.exists()


# --- the disk ---


def test_the_need_is_known_before_and_exact(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = store.save(10, state(10), {"x": 1})
    assert saved.bytes == sum(path.stat().st_size for path in saved.directory.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=saved.bytes - 1))
    with pytest.raises(DiskError,
                       match=r"the checkpoint of step 20 needs 2?\d\.\d KiB, \d+\.\d KiB are free") as caught:
        store.save(20, state(20), {"x": 1})
    assert caught.value.exit_code == ExitCode.DISK and names(store) == ["step-00000010"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=saved.bytes))
    store.save(20, state(20), {"x": 1})


class Count:
    """Fail at the n-th call of a set of functions."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, targets: list[tuple[object, str]], at: int,
                 error: BaseException) -> None:
        self.calls = 0
        for owner, name in targets:
            monkeypatch.setattr(owner, name, self._wrap(getattr(owner, name), at, error))

    def _wrap(self, function: Callable, at: int, error: BaseException) -> Callable:
        def call(*args: object, **kwargs: object) -> object:
            self.calls += 1
            if self.calls == at:
                raise error
            return function(*args, **kwargs)
        return call


def disk_calls() -> Iterator[tuple[list[tuple[object, str]], int]]:
    operations = [([(os, "fsync")], 7), ([(os, "rename")], 1), ([(builtins, "open")], 5),
                  ([(Path, "mkdir")], 1),
                  ([(store_module, "write_tensors")], 3)]
    for targets, count in operations:
        for at in range(1, count + 1):
            yield targets, at


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS])
@pytest.mark.parametrize(("targets", "at"), list(disk_calls()),
                         ids=lambda value: str(value) if isinstance(value, int) else value[0][1])
def test_a_failing_disk_costs_nothing_but_the_save(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch,
                                                   number: int,
                                                   targets: list[tuple[object, str]], at: int) -> None:
    save(store, 10)
    with monkeypatch.context() as patch:
        Count(patch, targets, at, OSError(number, os.strerror(number)))
        with pytest.raises(DiskError) as caught:
            save(store, 20)
    assert caught.value.exit_code == ExitCode.DISK
    assert f"step 20 could not be written ({os.strerror(number)}); it needs 6.4 KiB, " in str(caught.value)
    assert " are free; free some space or repair the disk" in str(caught.value)
    # The last fsync comes after the rename: the new one is there, but not known to be safe.
    assert names(store) in (["step-00000010"], ["step-00000010", "step-00000020"])
    assert_holds(store.latest_valid(), store.steps()[-1])
    save(store, 20)
    assert_holds(store.latest_valid(), 20)


@pytest.mark.parametrize("limit", [0, 1, 100, 499, 1000, 5000])
def test_a_file_that_ends_too_early(store: CheckpointStore, limit: int) -> None:
    """The operating system itself refuses the write that passes the limit."""
    save(store, 10)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(DiskError, match=r"step 20 could not be written \(File too large\)"):
            save(store, 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(store) == ["step-00000010"]
    assert_holds(store.latest_valid(), 10)


class Interrupt(BaseException):
    """Stands for Ctrl-C at a bad moment."""


@pytest.mark.parametrize("at", range(1, 8))
def test_an_interrupt_leaves_no_temporary_folder(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch,
                                                 at: int) -> None:
    save(store, 10)
    with monkeypatch.context() as patch, pytest.raises(Interrupt):
        Count(patch, [(os, "fsync")], at, Interrupt())
        save(store, 20)
    assert not any("tmp" in name for name in names(store))
    assert_holds(store.latest_valid(), store.steps()[-1])


# --- kills ---


def dies_at(n: int, action: Callable[[], None], folder: Path) -> bool:
    """Run `action` in a child that vanishes before its n-th change of `folder`; False: it lived on."""
    child = os.fork()
    if child == 0:
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

        fsync = os.fsync
        os.fsync = lambda descriptor: (tick(), fsync(descriptor))[1]
        try:
            sys.addaudithook(watch)
            action()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 77), status
    return status == 77


def test_a_kill_at_any_moment_costs_at_most_the_save(tmp_path: Path) -> None:
    """Two saves with deletions and a damaged folder in the way, killed before every change of the disk."""
    n = 0
    alive = True
    while alive:
        n += 1
        store = CheckpointStore(tmp_path / str(n), keep_last=1)
        save(store, 10)
        (store.directory / "step-00000030").mkdir()
        alive = dies_at(n, lambda: save(store, 20, 30), store.directory)
        found = store.latest_valid()
        assert_holds(found, found.step)
        assert alive or found.step == 30
        # Going on from there, everything comes right, and nothing is left over.
        save(store, found.step + 10)
        assert_holds(store.latest_valid(), found.step + 10)
        assert not any("tmp" in name or "old" in name for name in names(store))
        shutil.rmtree(store.directory)
    assert n > 40, f"only {n} kills"


# --- memory ---


def test_saving_makes_no_second_copy(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    group = {f"t{i}": torch.zeros(5_000_000) for i in range(10)}  # 200 MB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    store.save(1, {"weights": group}, {})
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # in KiB
