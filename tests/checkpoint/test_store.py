from __future__ import annotations

import builtins
import errno
import json
import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from megatron_ttl.checkpoint import store as store_module
from megatron_ttl.checkpoint.store import Checkpoint, CheckpointStore
from megatron_ttl.errors import CheckpointError, DiskError, ExitCode
from megatron_ttl.files import checksum_bytes

FILES = ["weights.safetensors", "exp_avg.safetensors", "rng.safetensors", "record.json", "manifest.json"]
FUTURE = 10**9  # no process has such a number


def state(step: int) -> dict[str, dict[str, Tensor]]:
    """A small training state, another one for every step."""
    generator = torch.Generator().manual_seed(step)
    weights = {"model.a.weight": torch.randn(7, 5, generator=generator),
               "model.b.weight": torch.randn(3, generator=generator)}
    return {"weights": weights, "exp_avg": {name: tensor * 0.1 for name, tensor in weights.items()},
            "rng": {"torch": generator.get_state()}}


def save(store: CheckpointStore, *steps: int) -> None:
    for step in steps:
        store.save(step, state(step), {"consumed_samples": step * 8, "note": "épocas"})


def assert_holds(checkpoint: Checkpoint, step: int) -> None:
    assert checkpoint.step == checkpoint.record["consumed_samples"] // 8 == step
    for group, tensors in state(step).items():
        loaded = checkpoint.tensors(group)
        assert list(loaded) == list(tensors)
        for name, tensor in tensors.items():
            assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)


def names(store: CheckpointStore) -> list[str]:
    return sorted(os.listdir(store.directory))


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "run" / "checkpoints", keep_last=3)


# --- round trip ---


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


def flip(position: float, bit: int = 0) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        payload = bytearray(path.read_bytes())
        payload[int(position * (len(payload) - 1))] ^= 1 << bit
        path.write_bytes(payload)
    return damage


def cut(position: float) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes()[: int(position * path.stat().st_size)])


def twin(path: Path) -> Path:
    """Return the same file of step 10."""
    return path.parent.with_name("step-00000010") / path.name


def replace_by(path: Path, make: Callable[[Path], None]) -> None:
    path.unlink()
    make(path)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "missing": lambda path: path.unlink(), "empty": cut(0), "cut at 1 %": cut(0.01), "half": cut(0.5),
    "cut at 99 %": cut(0.99),
    "a byte more": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "first byte": flip(0), "last byte": flip(1, 5), "middle": flip(0.5), "sign bit": flip(0.7, 7),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "of another step": lambda path: path.write_bytes(twin(path).read_bytes()),
    "a folder": lambda path: replace_by(path, Path.mkdir),
    "a symbolic link": lambda path: replace_by(path, lambda path: path.symlink_to(twin(path))),
    "a FIFO": lambda path: replace_by(path, os.mkfifo),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_the_former_checkpoint_used(store: CheckpointStore, name: str,
                                                        damage: str) -> None:
    save(store, 10, 20)
    DAMAGE[damage](store.directory / "step-00000020" / name)
    with pytest.raises(CheckpointError, match=f"step-00000020/{name}: .*; .*; "):
        store.open(20)
    assert_holds(store.latest_valid(), 10)
    assert len(store.warnings) == 1 and f"step-00000020/{name}" in store.warnings[0]
    shutil.rmtree(store.directory / "step-00000010")
    with pytest.raises(CheckpointError, match="no checkpoint is whole(?s:.*)step-00000020"):
        store.latest_valid()


def test_every_bit_of_a_small_checkpoint_counts(store: CheckpointStore) -> None:
    store.save(3, {"weights": {"a": torch.ones(2)}}, {"x": 1})
    folder = store.directory / "step-00000003"
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for position in range(len(whole)):
            flipped = bytes([whole[position] ^ 1 << position % 8])
            path.write_bytes(whole[:position] + flipped + whole[position + 1 :])
            with pytest.raises(CheckpointError, match=path.name):
                store.open(3)
        path.write_bytes(whole)
    store.open(3)


def test_all_damaged_files_are_named_at_once(store: CheckpointStore) -> None:
    save(store, 10)
    for name in FILES[:3]:
        flip(0.9)(store.directory / "step-00000010" / name)
    with pytest.raises(CheckpointError) as caught:
        store.open(10)
    assert [any(name in fault for fault in caught.value.faults) for name in FILES[:3]] == [True] * 3


def test_a_foreign_file_is_never_read(store: CheckpointStore) -> None:
    save(store, 10)
    (store.directory / "step-00000010" / "weights.pt").write_bytes(b"\x80\x04")
    assert_holds(store.latest_valid(), 10)


def test_a_step_folder_that_is_a_file_or_a_link(store: CheckpointStore, tmp_path: Path) -> None:
    save(store, 10)
    (store.directory / "step-00000020").write_text("")
    (store.directory / "step-00000030").symlink_to(store.directory / "step-00000010")
    assert_holds(store.latest_valid(), 10)
    assert ["is no folder" in warning for warning in store.warnings] == [True, True]


def test_renamed_folder_is_another_steps(store: CheckpointStore) -> None:
    save(store, 10)
    (store.directory / "step-00000010").rename(store.directory / "step-00000011")
    with pytest.raises(CheckpointError, match="manifest.json: is of step 10; the folder's name must say the "
                                              "same"):
        store.open(11)


# --- hostile manifests: sealed with a right checksum, as an attacker would ---


def forge(folder: Path, change: Callable[[dict], None]) -> None:
    content = json.loads((folder / "manifest.json").read_bytes())
    change(content)
    del content["checksum"]
    body = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    sealed = json.dumps({"checksum": checksum_bytes(body), **content}, ensure_ascii=False,
                        separators=(",", ":"))
    (folder / "manifest.json").write_text(sealed + "\n", encoding="utf-8")


def test_forging_without_a_change_is_accepted(store: CheckpointStore) -> None:
    save(store, 10)
    forge(store.directory / "step-00000010", lambda content: None)
    assert_holds(store.open(10), 10)


@pytest.mark.parametrize("name",
                         ["../secret", "/etc/passwd", "a/../../x", "..", ".", "", "x\0y", "a" * 5000,
                          "Weights",
                                  "weights.", "weights/", "wéights", "-x", "weights\n"])
def test_names_cannot_leave_the_folder(store: CheckpointStore, name: str) -> None:
    save(store, 10)

    def as_group(content: dict) -> None:
        content["groups"][name] = content["groups"].pop("rng")
        content["files"][f"{name}.safetensors"] = content["files"].pop("rng.safetensors")

    def as_file(content: dict) -> None:
        content["files"][name] = content["files"]["record.json"]

    whole = (store.directory / "step-00000010" / "manifest.json").read_bytes()
    for change in (as_group, as_file):
        (store.directory / "step-00000010" / "manifest.json").write_bytes(whole)
        forge(store.directory / "step-00000010", change)
        with pytest.raises(CheckpointError, match="manifest.json: (group|file) .* must be"):
            store.open(10)


@pytest.mark.parametrize(("change", "message"), [
    (lambda c: c.update(version=2), "version 2; this release reads 'megatron_ttl checkpoint', version 1"),
    (lambda c: c.update(format="other"), "format 'other'"),
    (lambda c: c.update(extra=1), "extra: Extra inputs are not permitted"),
    (lambda c: c.update(step="10"), "step: Input should be a valid integer"),
    (lambda c: c.update(step=-1), "step: Input should be greater than or equal to 0"),
    (lambda c: c.pop("groups"), "groups: Field required"),
    (lambda c: c["files"]["record.json"].update(bytes=2**70), "record.json: has .* the manifest says"),
    (lambda c: c["files"].pop("rng.safetensors"), "file 'rng.safetensors'"),
    (lambda c: c["files"]["record.json"].update(checksum="md5:1"), "checksum: String should match pattern"),
    (lambda c: c["groups"]["weights"]["model.b.weight"].update(shape=[4]),
     r"weights.safetensors: holds other tensors .*model.b"),
    (lambda c: c["groups"]["weights"]["model.b.weight"].update(dtype="I32"), "holds other tensors"),
    (lambda c: c["groups"]["weights"].pop("model.b.weight"), "holds other tensors"),
])
def test_manifests_that_lie(store: CheckpointStore, change: Callable[[dict], None], message: str) -> None:
    save(store, 10)
    forge(store.directory / "step-00000010", change)
    with pytest.raises(CheckpointError, match=message):
        store.open(10)


@pytest.mark.parametrize("payload",
                         [b"[" * 100_000, b'{"a":' * 100_000, b"{", b"[]", b"null", b'"x"', b"\xff\xfe",
                          b"NaN",
                                     b'{"format": NaN}', b'{"a":1,"a":2}', b"{}" + b" " * (5 << 20),
                                     b'{"step":' + b"9" * 10_000 + b"}"])
def test_bombs_in_the_manifest(store: CheckpointStore, payload: bytes) -> None:
    save(store, 10)
    (store.directory / "step-00000010" / "manifest.json").write_bytes(payload)
    with pytest.raises(CheckpointError, match="manifest.json: .*; .*; "):
        store.open(10)


@pytest.mark.parametrize("header_bytes", [2**63, 2**64 - 1, 2**31, 10**8 + 1, 0])
def test_header_bombs_in_a_sealed_tensor_file(store: CheckpointStore, header_bytes: int) -> None:
    save(store, 10)
    payload = header_bytes.to_bytes(8, "little") + b"{}" * 100
    (store.directory / "step-00000010" / "rng.safetensors").write_bytes(payload)
    forge(store.directory / "step-00000010",
          lambda c: c["files"].update({"rng.safetensors": {"bytes": len(payload),
                                                           "checksum": checksum_bytes(payload)}}))
    with pytest.raises(CheckpointError, match="rng.safetensors: is no safetensors file"):
        store.open(10)


# --- saving again, retention, leftovers ---


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
