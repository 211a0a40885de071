"""A rank dies, in any way and anywhere: the job ends at once, says why, leaves nobody behind, and can go on."""

from __future__ import annotations

import re
import shutil
import sys
import time
from pathlib import Path

import pytest
from forked_job import TENSOR_DATA, TENSOR_PIPELINE, ForkedJob, shared_memory
from launcher_job import LauncherJob, launcher
from patience import patient
from planted_fault import DEATHS, SECTIONS
from tiny_session import write_data

from megatron_ttl.checkpoint.store import CheckpointStore

SAID = ("raise", "memory")  # a Python error; the others die without a word
SHORT = [("start", "exit", 1), ("met", "kill", 2), ("data", "raise", 3), ("step", "abort", 0), ("save", "exit", 2),
         ("evaluate", "kill", 1)]
FORKED = [(section, kind, rank) for section in SECTIONS for kind in ("kill", "raise", "exit", "abort")
          for rank in range(4) if kind != "abort" or rank == 0]
LAUNCHERS = [("deepspeed", "step", "kill", 0), ("deepspeed", "save", "raise", 1), ("deepspeed", "start", "exit", 1),
             ("deepspeed", "met", "segfault", 0), ("mpirun", "step", "kill", 1), ("mpirun", "save", "segfault", 0),
             ("mpirun", "start", "kill", 1), ("mpirun", "data", "memory", 0)]


def long(cases):
    return [pytest.param(*case, marks=pytest.mark.long, id="-".join(map(str, case))) for case in cases]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module", autouse=True)
def nothing_in_shared_memory():
    before = shared_memory()
    yield
    deadline = time.monotonic() + 10  # other programs of this machine come and go
    while (left := shared_memory() - before) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not left


def check(job, section, kind, victim, processes, root_cause, slack_s=0):
    """See that a job ended as it must."""
    code = job.wait()
    took = time.time() - float((job.folder / "fault-at").read_text())
    log = job.log
    assert code not in (0, 85), log
    assert took < patient(5 + slack_s), f"{took:.1f} s\n{log}"
    assert not job.wait_for_orphans(2), log
    if kind in SAID and not (kind == "memory" and "ABORT" in log):  # the C library may want memory first, and gives up
        assert log.count("failed:\nTraceback") == 1 == log.count(f"rank {victim} of {processes} (host"), log
        # Without memory torch may be the first to miss it.
        assert re.search("ZeroDivisionError: planted" if kind == "raise" else "MemoryError|Cannot allocate memory", log)
    else:
        assert "failed:\nTraceback" not in log, log
        told = log.count(" lost another process")
        assert told == 1 or (told == 0 and section == "start" and kind != "exit"), log
    if root_cause and kind != "exit":  # which looks like success: then it is whoever noticed
        assert f"rank      : {victim} " in log.split("Root Cause")[1], log
    newest = CheckpointStore(job.folder / "run/checkpoints").latest_valid()
    # Checkpoints are written behind the training: the last one that was begun may be lost with the process.
    kept = {"start": {0}, "met": {0}, "data": {0, 2}, "step": {0, 2}, "save": {2}, "evaluate": {2, 4, 6, 8}}[section]
    assert (newest.step if newest else 0) in kept, log
    shutil.rmtree(job.folder)


@pytest.mark.slow
@pytest.mark.parametrize(("section", "kind", "victim"), [*SHORT, *long(case for case in FORKED if case not in SHORT)])
def test_under_torchruns_agent(data, tmp_path, section, kind, victim):
    """Four ranks, tensor 2 x pipeline 2: some have no connection to the one that dies."""
    job = ForkedJob(tmp_path / "job", data, 4, TENSOR_PIPELINE, (section, str(victim), kind), agent=True)
    check(job, section, kind, victim, 4, root_cause=True)


@pytest.mark.parametrize(("section", "kind", "victim"),
                         long((section, kind, (place + number) % 2) for place, section in enumerate(SECTIONS)
                              for number, kind in enumerate(DEATHS)))
def test_under_torchrun(repository, data, tmp_path, section, kind, victim):
    job = LauncherJob(repository, tmp_path, data, launcher("torchrun"), TENSOR_DATA, (section, str(victim), kind))
    check(job, section, kind, victim, 2, root_cause=True)


@pytest.mark.parametrize(("name", "section", "kind", "victim"), long(LAUNCHERS))
def test_under_other_launchers(repository, data, tmp_path, name, section, kind, victim):
    if name == "mpirun" and not (Path(sys.executable).parent / "mpirun").exists() and not shutil.which("mpirun"):
        pytest.skip("mpirun is not installed")
    job = LauncherJob(repository, tmp_path, data, launcher(name), TENSOR_DATA, (section, str(victim), kind))
    check(job, section, kind, victim, 2, root_cause=False, slack_s=3)  # it looks once a second
