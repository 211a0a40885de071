"""Atomic files."""

from __future__ import annotations

import os
import shutil

import pytest
import xxhash

from megatron_ttl.errors import DiskError
from megatron_ttl.files import (
    atomic_write,
    checksum,
    checksum_bytes,
    human_bytes,
    make_directory,
    or_disk_error,
    remove_leftovers,
    require_free_space,
    write_json,
)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    """The old content, and no temporary file, after an exception or a failing rename."""
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(RuntimeError), atomic_write(path, "w") as handle:
        handle.write("half")
        raise RuntimeError
    with pytest.raises(ValueError):
        write_json(path, {"not a number": float("nan")})
    assert path.read_text() == '{\n  "old": 1\n}\n'
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_folder_is_made_with_those_above_it(tmp_path, monkeypatch):
    """Each name is on the disk before the next one is made; a folder that is there costs nothing."""
    monkeypatch.chdir(tmp_path)
    synced = []
    monkeypatch.setattr("megatron_ttl.files.fsync_directory",
                        lambda folder: synced.append((str(folder), os.listdir(folder))))
    for _ in range(2):
        make_directory("a/b/c")
    assert synced == [(".", ["a"]), ("a", ["b"]), ("a/b", ["c"])]
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match="File exists|Not a directory"):
            make_directory(path)


def test_leftovers_of_some_names_go_and_nothing_else(tmp_path):
    """Of any process; what other names have left is somebody else's."""
    for name in (".a.json.tmp-7", ".tokens.former-8", ".b.json.tmp-7", ".aXjson.tmp-7", "a.json", ".a.json.tmp-7x"):
        (tmp_path / name).write_text("")
    (tmp_path / ".tokens.tmp-9" / "sub").mkdir(parents=True)
    (tmp_path / ".a.json.tmp-1").symlink_to(tmp_path / "a.json")
    remove_leftovers(tmp_path, ["a.json", "tokens"])
    assert sorted(os.listdir(tmp_path)) == [".a.json.tmp-7x", ".aXjson.tmp-7", ".b.json.tmp-7", "a.json"]


def test_what_the_disk_refuses_is_one_sentence(tmp_path):
    """Also of a folder that is copied, whose error is a list."""
    with pytest.raises(DiskError, match=r"^/dev/full/a: could not be written \(Not a directory\); it must be, "):
        with or_disk_error(tmp_path):
            open("/dev/full/a", "wb")
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "gone").symlink_to("nowhere")
    with pytest.raises(DiskError, match=r"to: could not be written \(.*No such file or directory: .*\); it must be"):
        with or_disk_error(tmp_path / "to"):
            shutil.copytree(tmp_path / "from", tmp_path / "to")


def test_checksums_equal_xxhash(tmp_path):
    """The same digest for a file, for its bytes and by the library alone."""
    payload = os.urandom(3_000_001)
    (tmp_path / "x").write_bytes(payload)
    assert checksum(tmp_path / "x") == checksum_bytes(payload) == "xxh3:" + xxhash.xxh3_128_hexdigest(payload)


def test_what_the_disk_cannot_hold_is_refused(tmp_path):
    """Even for a folder that does not exist yet."""
    require_free_space(tmp_path / "new" / "run", 1, "a run")
    with pytest.raises(DiskError, match=r"run: a checkpoint needs .* TiB, .* are free; .*; free some space"):
        require_free_space(tmp_path / "new" / "run", 1 << 60, "a checkpoint")


def test_bytes_have_binary_units():
    """1536 is one and a half KiB."""
    assert [human_bytes(n) for n in (7, 1536, 5 << 30, 3 << 40)] == ["7 B", "1.5 KiB", "5.0 GiB", "3.0 TiB"]
