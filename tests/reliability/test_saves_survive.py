"""A checkpoint survives a kill at any call that changes the disk, a power cut after any, and a disk that fails at any.

The calls are those of libc: shim.c counts them. Whatever thread or process makes them, the trials see it.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cut_trials
import disk_trials
import fault_shim as shim
import pytest
import session_cuts
import session_trials
import store_trials
from fault_server import Server
from store_trials import is_state
from store_trials import save as save_state
from tiny_session import write_data, write_settings

from megatron_ttl.checkpoint.store import CheckpointStore
from megatron_ttl.errors import DiskError

SHORT_AND_LONG = pytest.mark.parametrize("long", [
    pytest.param(False, id="short"),
    pytest.param(True, id="long", marks=(pytest.mark.long, pytest.mark.timeout(1800)))])
PRELOAD = ["torch._dynamo", "torch._inductor.compile_fx", "megatron_ttl.parallel.door",
           "deepspeed.runtime.zero.muon.muon_optimizer", "session_cuts", "disk_trials", "cut_trials"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    server = Server(shim.build(folder), folder / "server.log", PRELOAD)
    yield server
    server.close()


@pytest.fixture
def ground(tmp_path: Path) -> Iterator[Path]:
    """A folder for the trials, in memory where there is such a place: they call fsync a hundred thousand times."""
    memory = Path("/dev/shm")
    if not (memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 1 << 28):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory, prefix="megatron_ttl-") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the data and the settings of a tiny run."""
    folder = tmp_path_factory.mktemp("place")
    write_settings(folder, write_data(folder / "data"), folder / "unused")
    return str(folder)


def run_all(server: Server, function: Any, ground: Path, cases: list[dict[str, Any]], most: int = 10) -> int:
    """Let the server go through all cases; return how many trials there were, none of which found a fault."""
    trials = 0
    for number, case in enumerate(cases):
        found = server.ask(function, folder=str(ground / str(number)), **case)
        print(f"{function.__module__}.{function.__name__} {case}: {found}")
        assert found["faults"][:most] == []
        trials += found["trials"]
    return trials


def test_the_shim_sees_every_call(server: Server, ground: Path) -> None:
    """Each once where it watches, none where it does not; and it can refuse each of them."""
    watched, elsewhere, refused = server.ask(shim.every_call, folder=str(ground))
    assert watched == refused == [1] * len(watched) and elsewhere == [0] * len(watched)


# --- kills ---

RUNS: list[dict[str, Any]] = [
    *({"mode": mode, "used": used, "background": used} for mode in (shim.KILL, shim.TORN) for used in (False, True)),
    *({"world_size": 2, "victim": victim, "used": used} for victim in (0, 1) for used in (False, True))]


@SHORT_AND_LONG
def test_a_kill_at_any_call_costs_at_most_the_save(server: Server, ground: Path, long: bool) -> None:
    """Three saves with deletions on one process and on two: what was saved is resumed bit for bit, and goes on."""
    counts = {"most": None, "again": 25} if long else {"most": 12, "again": 2}
    cases = [{**run, **counts, "seed": seed} for seed, run in enumerate(RUNS)]
    trials = run_all(server, store_trials.kill_points, ground, cases)
    assert trials >= (500 if long else 60)


@SHORT_AND_LONG
def test_a_kill_at_any_call_of_a_training_run(server: Server, ground: Path, place: str, long: bool) -> None:
    """Settings, rows and tokenizer are killed, too; final weights and losses are those of a run that nobody killed."""
    cases: list[dict[str, Any]] = [{"most": 150 if long else 6, "again": 20 if long else 1},
                                   {"most": 50 if long else 3, "mode": shim.TORN}]
    if long:
        cases += [{"most": 12, "world_size": 2, "victim": victim} for victim in (0, 1)]
    trials = run_all(server, session_trials.kill_points, ground, [{"place": place, **case} for case in cases])
    assert trials >= (240 if long else 10)


# --- power cuts ---


@SHORT_AND_LONG
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_power_cut_after_any_call(server: Server, ground: Path, world_size: int, long: bool) -> None:
    """Bytes and names that were not fsynced kept, lost, zeroed or any mixture: the last save or the one at work."""
    cases = [{"world_size": world_size, "steps": [10, 20, 30], "stride": 1 if long else 4, "draws": 14 if long else 2}]
    trials = run_all(server, cut_trials.cut_points, ground, cases)
    assert trials >= (1000 if long else 100)


def test_a_save_that_failed_and_is_there_is_safe_when_it_succeeds(server: Server, ground: Path) -> None:
    """The disk fails once, at any call, and the step is saved again: then a power cut must not take it away."""
    calls = server.ask(disk_trials.failing_disk, folder=str(ground / "count"), error=errno.EIO, width=1)["calls"]
    cases = [{"refused": n, "stride": 1000} for n in range(1, calls + 1)]
    assert run_all(server, cut_trials.cut_points, ground, cases) > calls


@SHORT_AND_LONG
def test_a_power_cut_after_any_call_of_a_training_run(server: Server, ground: Path, place: str, long: bool) -> None:
    """The next start finds the last save or the one at work, settings, rows and tokenizer; and ends as it should."""
    cases = [{"place": place, "stride": 1 if long else 11, "resumed": 60 if long else 3}]
    trials = run_all(server, session_cuts.cut_points, ground, cases)
    assert trials >= (2000 if long else 150)


# --- disks ---

DISKS: list[dict[str, Any]] = [{"mode": shim.FAIL}, {"mode": shim.FAIL, "width": 1}, {"mode": shim.SHORT},
                               {"mode": shim.FAIL, "world_size": 2}, {"mode": shim.FAIL, "width": 1, "world_size": 2}]


@SHORT_AND_LONG
@pytest.mark.parametrize("error", shim.ERRORS, ids=errno.errorcode.get)
def test_a_disk_that_fails_from_any_call_on(server: Server, ground: Path, error: int, long: bool) -> None:
    """For good, once, or after half a write: a DiskError, the last good one untouched, and the next save succeeds."""
    cases = [{**disk, "error": error, "most": None if long else 8} for disk in DISKS]
    assert run_all(server, disk_trials.failing_disk, ground, cases) >= (130 if long else 40)


@SHORT_AND_LONG
@pytest.mark.parametrize("error", shim.ERRORS, ids=errno.errorcode.get)
def test_a_disk_that_fails_under_a_training_run(server: Server, ground: Path, place: str, error: int,
                                                long: bool) -> None:
    """It ends with 75 (2 where it could not begin) and one sentence, or goes on; then its end is what it should be."""
    cases = [{"place": place, "error": error, "most": 20 if long else 2},
             {"place": place, "error": error, "most": 20 if long else 1, "width": 1, "mode": shim.SHORT}]
    assert run_all(server, session_trials.failing_disk, ground, cases) >= (40 if long else 3)


def test_a_run_goes_on_after_two_failed_saves_and_gives_up_after_three(server: Server, ground: Path,
                                                                       place: str) -> None:
    found = server.ask(session_trials.failing_saves, place=place, folder=str(ground / "two"), failures=2)
    assert found["code"] == 0 and found["kept"] == [f"step-{step:08d}" for step in (3, 4, 5, 6)]
    assert "(save 2 of 3 failed; training goes on)" in found["said"] and found["steps"] == [1, 2, 3, 4, 5, 6]
    found = server.ask(session_trials.failing_saves, place=place, folder=str(ground / "three"), failures=1000)
    assert found["code"] == 75 and found["kept"] == [] and found["steps"] == [1, 2, 3]
    assert "(No space left on device)" in found["said"] and "Traceback" not in found["said"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    done = subprocess.run(command, capture_output=True, text=True, check=False) if mount else None
    if done is None or done.returncode:
        pytest.skip(f"a file system cannot be mounted here ({done.stderr.strip() if done else 'there is no mount'})")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_disk_of_two_megabytes(server: Server, ground: Path, place: str, small_disk: Path) -> None:
    """The fourth checkpoint does not fit: three failures, 75; on a larger disk it goes on to the same end."""
    full = server.ask(session_trials.full_disk, place=place, folder=str(small_disk), whole="", grown=False)
    assert full["code"] == 75 and "free some space" in full["said"] and "Traceback" not in full["said"], full
    assert 0 < len(full["kept"]) < 6 and not any("tmp" in name for name in full["kept"])
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    grown = server.ask(session_trials.full_disk, place=place, folder=str(small_disk), whole=str(ground / "whole"),
                       grown=True)
    assert grown["code"] == 0 and grown["same"] and len(grown["kept"]) > len(full["kept"]), grown


def test_bytes_that_nearly_fit(small_disk: Path) -> None:
    """Blocks are larger than bytes: there is room before a save begins, and none before it ends."""
    store = CheckpointStore(small_disk / "run", keep_last=1)
    save_state(store, 5)
    outcomes = []
    needed = save_state(CheckpointStore(small_disk / "tried"), 5).bytes
    shutil.rmtree(small_disk / "tried")
    for spare in range(0, 10):
        filler = small_disk / "filler"
        filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - (-(-needed // 4096) + spare) * 4096))
        try:
            save_state(store, 10 + spare)
            outcomes.append("saved")
        except DiskError as error:
            assert "(No space left on device)" in str(error)
            outcomes.append("refused")
        assert is_state(store.latest_valid(), store.steps()[-1])
        assert len(os.listdir(store.directory)) == 1
        filler.unlink()
    assert set(outcomes) == {"saved", "refused"}, outcomes


# --- what these trials say of another protocol ---


def test_a_pointer_file_does_not_survive(server: Server, ground: Path) -> None:
    """Folder first, then `latest`: at least one kill, one full disk and many power cuts of every save cost the run."""
    killed = server.ask(store_trials.kill_points, folder=str(ground / "kills"), kind="naive")
    assert len(killed["faults"]) >= 3 and all("unresumable" in fault for fault in killed["faults"]), killed
    full = server.ask(disk_trials.failing_disk, folder=str(ground / "disk"), kind="naive", error=errno.ENOSPC)
    assert any("unresumable" in fault for fault in full["faults"]), full
    cut = server.ask(cut_trials.cut_points, folder=str(ground / "cuts"), kind="naive")
    assert sum("unresumable" in fault for fault in cut["faults"]) >= 10, cut
