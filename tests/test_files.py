"""Atomic files."""

from __future__ import annotations

import os

import pytest
import xxhash

from megatron_ttl.errors import DiskError
from megatron_ttl.files import atomic_write, checksum, checksum_bytes, human_bytes, require_free_space, write_json


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
