"""Whatever happens to one file of a checkpoint is found before training begins, and the file is named.

Short: a sample of each kind on checkpoints made by hand. Long: a thousand bits, two hundred pages and hundreds of torn
files, on those and on real runs' of one and of two processes; and `pretrain_ttl.py` itself on what it finds.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
from damaged_runs import (
    NEWEST,
    OLDER,
    damaged,
    flips,
    remove,
    settings_damage,
    synthetic,
    torn,
    trained,
    zeroed_pages,
)
from store_peers import on_all
from tiny_session import write_data

from megatron_ttl.checkpoint import tensor_file
from megatron_ttl.checkpoint.store import CheckpointStore
from megatron_ttl.errors import CheckpointError, ConfigError, UserError

LONG = pytest.mark.long
SHORT_COUNTS = {"flips": 60, "pages": 20, "cuts": 3, "every": 4}
LONG_COUNTS = {"flips": 1000, "pages": 200, "cuts": 25, "every": 1}
PLACES = [pytest.param(("by hand", 1, SHORT_COUNTS), id="short-one"), pytest.param(("by hand", 2, SHORT_COUNTS), id="short-two"),
          *(pytest.param((how, processes, LONG_COUNTS), id=f"{how}-{processes}", marks=LONG)
            for how in ("by hand", "trained") for processes in (1, 2))]


@pytest.fixture(scope="module", params=PLACES)
def case(request, tmp_path_factory):
    """A run folder with two checkpoints, and how often it is damaged; megabytes in the long form."""
    how, processes, counts = request.param
    folder = tmp_path_factory.mktemp("damage") / "place"
    is_long = counts is LONG_COUNTS
    place = (synthetic(folder, processes, rows=8192 if is_long else 128) if how == "by hand" else
             trained(folder, processes, hidden_size=128))
    size = sum(path.stat().st_size for path in place.newest.iterdir())
    assert size > (5 << 20 if is_long else 90_000), size
    assert place.folder().starting_point()[0].step == NEWEST and not place.folder().starting_point()[1]
    return place, counts


def assert_passed_over(place, what, name):
    """The older checkpoint is taken, and every warning names a file and says what it is."""
    checkpoint, warnings = place.folder().starting_point()
    assert checkpoint.step == OLDER, (what, name)
    if "manifest.json of" in what:  # a whole one, which asks for files of another number of processes
        name = ""
    assert any(f"{place.newest}/{name}" in warning for warning in warnings), (what, name, warnings)
    for warning in warnings:
        assert re.fullmatch(rf"checkpoint of step {NEWEST} passed over: .+: .+; .+; .+", warning), warning


@pytest.mark.parametrize("kind", ["flips", "pages"])
def test_every_damaged_byte_is_found(case, kind):
    """Single bits and whole pages, in every file."""
    place, counts = case
    seen = []
    for what, name in (flips if kind == "flips" else zeroed_pages)(place, counts[kind], seed=1):
        assert_passed_over(place, what, name)
        seen.append(name)
    assert len(seen) == counts[kind] and set(seen) == set(place.files)
    assert place.folder().starting_point()[0].step == NEWEST, "the damage was not undone"


def test_every_torn_file_is_found(case):
    """Missing, cut, exchanged, a link, a folder; the last one also where two processes look together."""
    place, counts = case
    ways = torn(place, counts["cuts"])
    assert counts["every"] > 1 or len(ways) >= 200, len(ways)
    for what, name, way in ways[::counts["every"]]:
        with damaged(place, name, way):
            assert_passed_over(place, what, name)
    what, name, way = ways[-1]
    with damaged(place, name, way):
        for checkpoint, warnings in on_all(2, place.folder().starting_point):
            assert checkpoint.step == OLDER and any(name in warning for warning in warnings), (what, warnings)
    assert place.folder().starting_point()[0].step == NEWEST, "the damage was not undone"


def test_what_is_no_part_of_it_is_named_and_not_read(case):
    """A checkpoint with a file too many is whole; pieces of a rank that never was change nothing."""
    place, _ = case
    names = ["weights-00007.safetensors", "weights-00000.safetensors", "weights.safetensors", "weights.pt", ".nfs0001", "note"]
    foreign = [name for name in names if name not in place.files]
    for name in foreign:
        shutil.copy(place.newest / "record.json", place.newest / name)
    (place.newest / "folder").mkdir()
    try:
        checkpoint, warnings = place.folder().starting_point()
        assert checkpoint.step == NEWEST
        for name in (*foreign, "folder"):
            assert any(warning.startswith(f"{place.newest}/{name}: is not in the manifest; ") for warning in warnings)
        assert len(warnings) == len(foreign) + 1
    finally:
        for name in (*foreign, "folder"):
            remove(place.newest / name)


def test_two_files_that_change_places(case):
    """Both are whole, and neither is what it says."""
    place, _ = case
    name, other = next((a, b) for a in place.files for b in place.files if a.startswith("exp_avg-") or a == "exp_avg.safetensors"
                       if b == a.replace("exp_avg", "exp_avg_sq"))
    for _ in range(2):  # the second time undoes the first
        (place.newest / name).rename(place.newest / "third")
        (place.newest / other).rename(place.newest / name)
        (place.newest / "third").rename(place.newest / other)
        if (place.folder().starting_point()[0]).step == NEWEST:
            break
        assert_passed_over(place, "exchanged", name)
        assert_passed_over(place, "exchanged", other)
    else:
        pytest.fail("the exchange was not undone")


def test_nothing_whole_is_never_a_fresh_start(case):
    """Every file of both checkpoints, and the folders themselves: an error that names them."""
    place, _ = case
    older = (place.older / "record.json").read_bytes()
    (place.older / "record.json").write_bytes(older[:-3])
    try:
        for name in place.files:
            with damaged(place, name, os.unlink), pytest.raises(CheckpointError, match="no checkpoint is whole") as caught:
                place.folder().starting_point()
            for path in (place.newest / name, place.older / "record.json"):
                assert any(str(path) in fault for fault in caught.value.faults), caught.value.faults
    finally:
        (place.older / "record.json").write_bytes(older)


@pytest.mark.parametrize("what", ["a file", "a link to nothing", "a link to itself", "without permission"])
def test_a_folder_of_checkpoints_that_cannot_be_read_is_no_fresh_start(tmp_path, what):
    """A disk that is not mounted, a copy that went wrong."""
    place = synthetic(tmp_path / "place", 1, rows=4)
    folder = place.run / "checkpoints"
    folder.rename(place.run / "moved")
    if what == "a file":
        folder.write_text("")
    elif what == "without permission":
        if os.geteuid() == 0:
            return  # root may read everything
        folder.mkdir(mode=0)
    else:
        folder.symlink_to("gone" if what == "a link to nothing" else "checkpoints")
    with pytest.raises(CheckpointError, match="checkpoints: cannot be read .*; it must be the folder of the run's checkpoints"):
        place.folder().starting_point()


def test_settings_that_say_nothing_or_something_else(case):
    """Missing, cut, another run's: named, and never gone on with."""
    place, counts = case
    path = place.run / "settings.json"
    text = path.read_bytes()
    try:
        for what, content in settings_damage(path, counts["flips"] // 5, seed=3):
            path.write_bytes(content)
            with pytest.raises((CheckpointError, ConfigError)) as caught:
                place.folder().starting_point()
            for fault in caught.value.faults:
                assert str(path) in fault or "in the run so far, is now" in fault, (what, fault)
                assert re.fullmatch(r".+: .+; .+; .+", fault), (what, fault)
        for way in (os.unlink, lambda path: (path.unlink(), path.mkdir()), lambda path: (path.unlink(), os.mkfifo(path))):
            remove(path)
            path.write_bytes(text)
            way(path)
            with pytest.raises(CheckpointError, match=r"settings.json: the settings of the run cannot be read .*; restore"):
                place.folder().starting_point()
    finally:
        remove(path)
        path.write_bytes(text)


@pytest.mark.parametrize("position", [0.1, 0.4, 0.8])
def test_a_bit_of_the_settings(tmp_path, position):
    """Nobody vouches for them: a changed bit is refused, or says nothing about the curve."""
    place = synthetic(tmp_path / "place", 1, rows=4)
    path = place.run / "settings.json"
    text = bytearray(path.read_bytes())
    for bit in range(8):
        text[int(position * len(text))] ^= 1 << bit
        path.write_bytes(text)
        try:
            assert place.folder().starting_point()[0].step == NEWEST
        except UserError as error:
            assert all(re.fullmatch(r".+: .+; .+; .+", fault) for fault in error.faults)
        text[int(position * len(text))] ^= 1 << bit


def pretrain(repository, place):
    """Start the real command in the run folder."""
    return subprocess.run([sys.executable, str(repository / "pretrain_ttl.py"), *place.arguments], cwd=repository,
                          capture_output=True, text=True, timeout=300)


def contents(folder):
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.name != "run.lock"}


def test_the_command_with_nothing_whole(repository, tmp_path):
    """Exit code 2, every file named, nothing written or thrown away."""
    place = synthetic(tmp_path / "place", 1, rows=4)
    write_data(tmp_path / "place/data")
    (place.newest / "weights.safetensors").unlink()
    (place.older / "manifest.json").write_bytes(b"")
    before = contents(place.run)
    done = pretrain(repository, place)
    assert done.returncode == 2, done.stderr
    for text in ("no checkpoint is whole", f"{place.newest}/weights.safetensors: ", f"{place.older}/manifest.json: "):
        assert text in done.stderr
    assert "Traceback" not in done.stderr and "from seed" not in done.stderr
    assert contents(place.run) == before


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A real run of one process."""
    return trained(tmp_path_factory.mktemp("real") / "place", 1, hidden_size=32)


@pytest.mark.long
def test_the_command_with_settings_that_say_nothing(repository, real):
    """Exit code 2, the file named, nothing written."""
    path = real.run / "settings.json"
    text = path.read_bytes()
    path.write_bytes(text[:100])
    before = contents(real.run)
    done = pretrain(repository, real)
    assert done.returncode == 2 and f"{path}: the settings of the run cannot be read" in done.stderr
    assert "Traceback" not in done.stderr and contents(real.run) == before
    path.write_bytes(text)


@pytest.mark.long
def test_the_command_goes_on_from_the_older_one(repository, real):
    """Says what was passed over and where it goes on; the checkpoint it writes anew is whole."""
    (real.newest / "exp_avg.safetensors").write_bytes(b"")
    done = pretrain(repository, real)
    assert done.returncode == 0, done.stderr
    assert f"warning: checkpoint of step {NEWEST} passed over: {real.newest}/exp_avg.safetensors: " in done.stderr
    assert f"from {real.older}; steps {OLDER + 1} to {NEWEST}" in done.stderr
    assert real.folder().starting_point()[0].step == NEWEST


@pytest.mark.long
def test_what_the_checksums_cost(tmp_path, monkeypatch, capsys):
    """What hashing takes of a save of 500 MB: its share depends on the disk, its own speed does not."""
    spent = 0.0

    class Timed:
        """The digest, with a clock."""

        def __init__(self, *payload):
            self.digest = digest(*payload)
            self.hexdigest = self.digest.hexdigest

        def update(self, block):
            nonlocal spent
            begin = time.thread_time()
            self.digest.update(block)
            spent += time.thread_time() - begin

    digest = tensor_file.xxhash.xxh3_128
    monkeypatch.setattr(tensor_file.xxhash, "xxh3_128", Timed)
    tensors = {f"layer.{number}": torch.randn(1 << 20) for number in range(125)}
    begin = time.perf_counter()
    saved = CheckpointStore(tmp_path / "checkpoints").save(1, {"weights": tensors}, {})
    seconds = time.perf_counter() - begin
    with capsys.disabled():
        print(f"\n{saved.bytes / 1e6:.0f} MB saved in {seconds:.2f} s; checksums take {spent:.3f} s of it, "
              f"{spent / seconds:.1%}, at {saved.bytes / spent / 1e9:.0f} GB/s", file=sys.stderr)
    assert saved.bytes / spent > 2e9  # a disk that writes 200 MB/s then spends at most a tenth on it
