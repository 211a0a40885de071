from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from store_states import FILES, assert_holds, cut, flip, replace_by, save, twin

from megatron_ttl.checkpoint.store import CheckpointStore
from megatron_ttl.errors import CheckpointError
from megatron_ttl.files import checksum_bytes

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
    (lambda c: c.update(version=3), "version 3; this release reads 'megatron_ttl checkpoint', versions 1 and 2"),
    (lambda c: c.update(version=2), "file 'weights.safetensors'; the files must be those of the groups"),
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
