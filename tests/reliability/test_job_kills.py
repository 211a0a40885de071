"""SIGKILL at any moment to a rank, to all ranks or to the launcher: nobody is left, and the run goes on bit for bit.

A run is killed, started again, killed again, until it is done; its weights, its moments and its curve must be those of a
run that nobody killed.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import time
from itertools import count

import pytest
from forked_job import TENSOR_DATA, TENSOR_PIPELINE, ForkedJob, curve, digest, shared_memory
from launcher_job import LauncherJob, launcher
from patience import patient
from tiny_session import write_data

pytestmark = pytest.mark.slow
PROFILES = {"tensor x data": TENSOR_DATA, "tensor x pipeline": TENSOR_PIPELINE}
OFTEN = {"checkpoint.every_steps": 1, "checkpoint.keep_last": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module", params=PROFILES)
def unkilled(request, data, tmp_path_factory):
    """A profile, what a run under it comes to, and how long that takes."""
    folder, profile = tmp_path_factory.mktemp("reference") / "job", PROFILES[request.param]
    ForkedJob(folder, data, 4, profile, overrides=OFTEN).wait()  # the first one also starts the fork server
    shutil.rmtree(folder)
    job = ForkedJob(folder, data, 4, profile, overrides=OFTEN)
    job.pids()
    began = time.monotonic()
    assert job.wait() == 0, job.log
    return profile, (digest(folder), curve(folder)), time.monotonic() - began


def kill(job, draw, moment):
    """Kill at that moment; return whether there was anything left to kill."""
    ranks = job.pids()
    time.sleep(moment)
    victims = {"rank": [draw.choice(ranks)], "all": ranks, "launcher": [job.process.pid],
               "everybody": [job.process.pid, *ranks]}[draw.choice(("rank", "rank", "all", "launcher", "everybody"))]
    alive = job.process.is_alive()
    for pid in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    job.wait()
    left = job.wait_for_orphans(10)
    assert not left, f"{victims} killed, {left} left\n{job.log}"
    assert time.monotonic() - began < patient(12), job.log
    return alive


@pytest.mark.parametrize(("seed", "kills"), [
    (0, 3), *(pytest.param(seed, 20, marks=pytest.mark.long) for seed in range(1, 6))])
def test_kills_at_random_moments(data, tmp_path, unkilled, seed, kills):
    """Under both layouts."""
    profile, expected, whole_s = unkilled
    draw, names, before, done, folder = random.Random(seed), count(), shared_memory(), 0, None
    while done < kills or folder is not None:
        folder = folder or tmp_path / str(next(names))
        job = ForkedJob(folder, data, 4, profile, overrides=OFTEN)
        if done < kills:
            done += kill(job, draw, draw.uniform(0, whole_s))
        else:
            assert job.wait() == 0, job.log
        if "done: 8 steps" in job.log:
            assert (digest(folder), curve(folder)) == expected
            # A temporary folder may stay whose process number another program has by now; at most that one.
            assert len(list((folder / "run/checkpoints").glob("*.tmp-*"))) <= 1
            folder = None
    deadline = time.monotonic() + 10  # other programs of this machine come and go
    while (left := shared_memory() - before) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not left


@pytest.mark.long
@pytest.mark.parametrize("name", ["torchrun", "deepspeed", "mpirun"])
def test_processes_end_with_their_launcher(repository, data, tmp_path, name):
    """The real ones, killed while a step runs; under deepspeed the ranks are grandchildren."""
    job = LauncherJob(repository, tmp_path / "job", data, launcher(name), TENSOR_DATA, ("step", "1", "slow"))
    deadline = time.monotonic() + 240
    while not (job.folder / "fault-at").exists():
        assert time.monotonic() < deadline and job.process.poll() is None, job.log
        time.sleep(0.01)
    job.process.kill()
    job.wait()
    assert not job.wait_for_orphans(5), job.log
    again = LauncherJob(repository, tmp_path / "job", data, launcher(name), TENSOR_DATA)
    assert again.wait() == 0, again.log
    assert digest(tmp_path / "job")[0] == "step-00000008"
