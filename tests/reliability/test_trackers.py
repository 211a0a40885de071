"""No tracker stops a run: missing, raising, leaving, blocking, without a network, without room for its files."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from reliability.fake_wandb import fake_wandb
from tiny_session import train_here, write_data, write_settings

from megatron_ttl.testing import run_distributed

TRACKERS = ("wandb", "tensorboard", "energy")
SWITCHED_ON = {"wandb": ["log.wandb=offline"], "tensorboard": ["log.tensorboard=true"],
               "energy": ["energy.enabled=true", "energy.country_iso_code=BRA", "energy.measure_power_s=0.05"]}
FAULTS = {
    "raises": RuntimeError("on fire"),
    "exits": SystemExit(3),
    "interrupts": KeyboardInterrupt(),
    "full": OSError(errno.ENOSPC, "No space left on device"),
    "read-only": OSError(errno.EROFS, "Read-only file system"),
    "no network": ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
    "blocks": None,
}
STEPS = 4


class Faulty:
    """What a mirror and the meter ask of their libraries; every call meets the fault."""

    def __init__(self, fault: BaseException | None) -> None:
        self._fault = fault

    def meet(self, *_: object, **__: object) -> None:
        if self._fault is not None:
            raise self._fault
        threading.Event().wait(60)

    log = finish = flush = stop = meet

    def start(self) -> None:
        """The meter's first call."""


def plant(fault: str, when: str) -> None:
    """Put the fault into the three libraries, in this process."""
    from megatron_ttl.train import energy, tracking

    if fault == "missing":
        sys.modules.update(dict.fromkeys(("wandb", "tensorboard", "codecarbon")))
        return
    faulty = Faulty(FAULTS[fault])
    opener = faulty.meet if when == "opened" else lambda *_: faulty
    tracking.WandbRun = tracking.TensorBoardFile = energy.open_codecarbon = opener
    tracking.tear_down_wandb = lambda: None


def train_with(mesh, deepspeed, run, overrides, fault, when, patience_s):
    """Train in this process with a fault planted; return the code, what was said and how long it took."""
    from megatron_ttl.train import energy, tracking

    if fault:
        plant(fault, when)
    if patience_s is not None:
        tracking._CLOSE_WAIT_S = energy._CLOSE_WAIT_S = patience_s
    started, said = time.monotonic(), io.StringIO()
    with contextlib.redirect_stderr(said):
        code = train_here(mesh, deepspeed, run, overrides)
    return code, said.getvalue(), time.monotonic() - started


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trackers")
    write_data(folder / "data")
    return folder


def train(place, run_dir, trackers, fault=None, when="called", patience_s=None):
    """Train a few steps with these trackers on; return what was said, the rows and how long it took."""
    deepspeed, run = write_settings(place, place / "data", run_dir)
    overrides = [f"train.steps={STEPS}", "checkpoint.every_steps=2", "evaluation.every_steps=4",
                 *(override for name in trackers for override in SWITCHED_ON[name])]
    arguments = (str(deepspeed), str(run), overrides, fault, when, patience_s)
    code, said, seconds = run_distributed(train_with, 1, *arguments)[0]
    assert code == 0, said
    return said, [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()], seconds


def is_complete(rows):
    """Return whether metrics.jsonl has what a run without trackers writes."""
    events = [(row["event"], row["step"]) for row in rows]
    kept = [event for event in events if event[0] == "checkpoint"]  # written behind the training: somewhere among the others
    return kept == [("checkpoint", 2), ("checkpoint", 4)] and [event for event in events if event not in kept] == [
        ("train", 1), ("train", 2), ("train", 3), ("train", 4), ("evaluation", 4)]


CASES = [("missing", "opened"), *((fault, when) for fault in FAULTS for when in ("opened", "called"))]
SHORT = [("missing", "opened"), ("raises", "opened"), ("full", "called"), ("exits", "called"), ("interrupts", "opened"),
         ("blocks", "called"), ("blocks", "opened")]


@pytest.mark.parametrize(("fault", "when"), SHORT)
def test_three_faulty_trackers_are_three_warnings(place, tmp_path, fault, when):
    """The run does all its steps, keeps all its rows, and ends soon."""
    said, rows, seconds = train(place, tmp_path / "run", TRACKERS, fault, when, patience_s=0.5)
    assert is_complete(rows)
    assert {name: said.count(f"warning: {name}: ") for name in TRACKERS} == dict.fromkeys(TRACKERS, 1), said
    assert said.count("warning") == 3 and "Traceback" not in said, said
    assert seconds < 20


@pytest.mark.long
@pytest.mark.parametrize("tracker", TRACKERS)
@pytest.mark.parametrize(("fault", "when"), CASES)
def test_one_faulty_tracker_is_one_warning(place, tmp_path, fault, when, tracker):
    """Each alone, with the patience that users get: 20 s for both mirrors, 5 s for the meter."""
    said, rows, seconds = train(place, tmp_path / "run", (tracker,), fault, when)
    assert is_complete(rows)
    assert said.count(f"warning: {tracker}: ") == said.count("warning") == 1, said
    assert seconds < 20 + 21 + 5


def in_hostile_places(mesh, *arguments):
    """Train with a home that cannot be written and a lock file that a killed run of codecarbon's has left."""
    import tempfile

    temporary = Path(arguments[1]).parent / "temporary"
    temporary.mkdir(exist_ok=True)
    (temporary / ".codecarbon.lock").touch()
    os.environ.update(HOME="/dev/null", TMPDIR=str(temporary))
    tempfile.tempdir = None
    return train_with(mesh, *arguments, None, "", None)


@pytest.mark.parametrize("in_the_way", [True, pytest.param(False, marks=pytest.mark.long)])
def test_the_real_trackers_in_hostile_places(place, tmp_path, in_the_way):
    """Home read-only, codecarbon's lock stale; with a file where the mirrors want their folders, or without."""
    for name in ("wandb", "tensorboard", "codecarbon"):
        pytest.importorskip(name)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    if in_the_way:
        for name in ("wandb", "tensorboard"):
            (run_dir / name).write_text("")
    deepspeed, run = write_settings(place, place / "data", run_dir)
    overrides = [f"train.steps={STEPS}", "checkpoint.every_steps=2", "evaluation.every_steps=4",
                 *sum(SWITCHED_ON.values(), [])]
    code, said, _ = run_distributed(in_hostile_places, 1, str(deepspeed), str(run), overrides)[0]
    assert code == 0, said
    assert is_complete([json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()])
    if in_the_way:
        for name in ("wandb", "tensorboard"):
            assert said.count(f"warning: {name}: FileExistsError") == 1, said
    else:
        assert list((run_dir / "wandb").glob("offline-run-*/*.wandb")), "what `wandb sync` uploads"
        assert list((run_dir / "tensorboard").glob("events.out.tfevents.*"))
    assert said.count("warning") == 2 * in_the_way, said


CLIENT = """
import os, resource, signal, sys, time
from pathlib import Path
from megatron_ttl.config.schema import LogConfig
from megatron_ttl.train import tracking
fault, run_dir, rows = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
tracking._INIT_WAIT_S, tracking._CLOSE_WAIT_S = 2, 1.0 if fault == "hangs" else 20.0
if fault == "hangs":
    tracking._INIT_WAIT_S = 60
if fault == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
mirrors = tracking.Mirrors(LogConfig(wandb="offline" if fault in ("full", "killed") else "online", tensorboard=True),
                           run_dir, {"x": 1})
if fault == "killed":
    while not (found := [int(pid) for path in Path("/proc/self/task").glob("*/children")
                         for pid in path.read_text().split() if b"wandb" in Path(f"/proc/{pid}/cmdline").read_bytes()]):
        time.sleep(0.05)
    time.sleep(1)
    os.kill(found[0], signal.SIGKILL)
slowest = 0.0
for step in range(rows):
    began = time.perf_counter()
    mirrors.log({"event": "train", "loss": 1.0, "text": "x" * 100}, step)
    slowest = max(slowest, time.perf_counter() - began)
    time.sleep(0.002)
while fault == "hangs" and mirrors._mirrors[0].missing_rows:
    time.sleep(0.05)
mirrors.close()
print("slowest", slowest)
"""


@pytest.mark.parametrize(("fault", "warned"), [
    # takes connections and never answers
    pytest.param("black hole", {"wandb": 1, "tensorboard": 0}, marks=pytest.mark.long),
    # answers while the run begins, then no more
    pytest.param("lost", {"wandb": 1, "tensorboard": 0}, marks=pytest.mark.long),
    # the same, and wandb would wait longer than we do, and Python for wandb at its exit
    ("hangs", {"wandb": 1, "tensorboard": 0}),
    # wandb's own process, as by the kernel for want of memory
    pytest.param("killed", {"wandb": 1, "tensorboard": 0}, marks=pytest.mark.long),
    # files of at most 10 kB; what wandb's own process meets it says in its log alone
    ("full", {"tensorboard": 1}),
])
def test_a_process_ends_soon_whatever_its_mirrors_do(repository, tmp_path, fault, warned):
    """wandb makes Python wait at its exit for a process of its own, however long that takes."""
    for name in ("wandb", "tensorboard"):
        pytest.importorskip(name)
    with fake_wandb(answers=fault != "black hole") as address:
        environment = {**os.environ, "WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": address, "HOME": str(tmp_path)}
        said, started = tmp_path / "said", time.monotonic()
        with open(said, "w") as handle:
            done = subprocess.run([sys.executable, "-c", CLIENT, fault, str(tmp_path / "run"), "400"], cwd=repository,
                                  env=environment, stdout=handle, stderr=handle, timeout=120)
        seconds, text = time.monotonic() - started, said.read_text()
    assert done.returncode == 0, text
    assert "Traceback" not in text and "goroutine" not in text, text
    for name, times in warned.items():
        assert text.count(f"warning: {name}: ") == times, text
    assert text.count("warning: wandb: ") <= 1
    assert seconds < 20, text
    assert float(text.split("slowest")[1]) < 0.5
