"""Being asked to stop at any moment, by any signal, any process, once or more: 85, a checkpoint, and the same end.

Ranks that were asked are started again until the run is done; its weights and its curve must be those of a run that
nobody disturbed. STOP and SAVE files likewise.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from itertools import count, cycle, islice

import pytest
from forked_job import TENSOR_DATA, ForkedJob, curve, digest, finished
from launcher_job import LauncherJob, launcher
from patience import patient
from planted_fault import SECTIONS, SLOW_S
from tiny_session import write_data

pytestmark = pytest.mark.slow
TARGETS = ("all", "last", "launcher", "first")
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
DATA = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}}
PROFILES = {"data": DATA, "tensor": TENSOR_DATA}
# A Python that has not got as far as installing its handlers ends as Python does; nothing is lost.
TOO_EARLY = {-signal.SIGTERM, -signal.SIGUSR1, -signal.SIGINT, 130}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module", params=PROFILES)
def undisturbed(request, data, tmp_path_factory):
    """A profile, and what a run under it comes to."""
    profile = PROFILES[request.param]
    return profile, finished(tmp_path_factory.mktemp("reference") / "job", data, 2, profile)


def steps_seen(folder):
    return max((step for step, _ in curve(folder)), default=0)


def send(job, target, number):
    """Send a signal to one rank, to all processes as a terminal does, or to the launcher."""
    with contextlib.suppress(ProcessLookupError):
        match target:
            case "first" | "last":
                os.kill(job.pids()[0 if target == "first" else -1], number)
            case "all":
                if number == signal.SIGUSR1:  # as Slurm gives it: to the ranks
                    for pid in job.pids():
                        os.kill(pid, number)
                else:
                    os.killpg(job.process.pid, number)
            case "launcher":
                os.kill(job.process.pid if number != signal.SIGUSR1 else job.pids()[0], number)


def disturb(folder, data, profile, draw, section, target):
    """Start once, ask to stop at a random moment, maybe more than once; return the ranks' exit codes."""
    fault = () if section == "any" else (section, str(draw.randrange(2)), "slow")
    job = ForkedJob(folder, data, 2, profile, fault)
    job.pids()
    if section == "any":
        time.sleep(draw.uniform(0, 1.2))
    elif not job.reached():
        section = "late"
    else:
        time.sleep(draw.uniform(0, SLOW_S))
    before = steps_seen(folder)
    sent = time.monotonic()
    send(job, target, draw.choice(SIGNALS))
    for _ in range(draw.choice((0, 0, 0, 1, 2))):
        time.sleep(draw.uniform(0, 0.3))
        send(job, target, draw.choice(SIGNALS))
    job.wait()
    assert time.monotonic() - sent < patient(12), job.log  # what is left of the start, a step and a save, on a busy machine
    assert not job.wait_for_orphans(1), job.log
    codes, after = job.codes(), steps_seen(folder)
    assert after <= before + 2, (before, after, job.log)  # also at the end of the run: it was about to be
    if codes != [0, 0] and set(codes) != {85}:
        assert set(codes) <= TOO_EARLY | {85} and section == "any" and after == before, (codes, section, job.log)
    return codes


@pytest.mark.parametrize(("seed", "signals"), [
    (0, 4), *(pytest.param(seed, 10, marks=pytest.mark.long) for seed in range(1, 6))])
def test_signals_at_random_moments(data, tmp_path, undisturbed, seed, signals):
    """Under both layouts; sections, which are slowed down, and targets take their turns, so that all are hit."""
    profile, expected = undisturbed
    draw, names, sent, folder = random.Random(seed), count(), 0, None
    turns = islice(zip(cycle((*SECTIONS, "any")), cycle(TARGETS)), 10 * seed, None)  # 7 and 4: every pair in 28
    while sent < signals or folder is not None:
        if folder is None:
            folder = tmp_path / str(next(names))
            folder.mkdir()
        if sent < signals:
            codes = disturb(folder, data, profile, draw, *next(turns))
            sent += codes != [0, 0]
        else:
            codes = finished(folder, data, 2, profile) and [0, 0]
        if codes == [0, 0]:
            assert (digest(folder), curve(folder)) == expected
            folder = None


@pytest.mark.parametrize("rounds", [1, pytest.param(5, marks=pytest.mark.long)])
def test_switch_files_at_random_moments(data, tmp_path, rounds):
    """Three times SAVE and once STOP a round: honoured within two steps, and removed."""
    draw = random.Random("switches")
    overrides = {"train.steps": 400, "evaluation.every_steps": 400, "checkpoint.every_steps": 400}
    for number in range(rounds):
        folder = tmp_path / str(number)
        job = ForkedJob(folder, data, 2, DATA, overrides=overrides)
        while not steps_seen(folder):
            assert job.process.is_alive(), job.log
            time.sleep(0.01)
        asked = []
        for name in ("SAVE", "SAVE", "SAVE", "STOP"):
            time.sleep(draw.uniform(0, 0.3))
            asked.append(steps_seen(folder))
            (folder / "run" / name).touch()
            deadline = time.monotonic() + patient(10)
            while (folder / "run" / name).exists():
                assert time.monotonic() < deadline, f"{name} is still there\n{job.log}"
                time.sleep(0.001)
        job.wait()
        assert job.codes() == [85, 85], job.log
        rows = map(json.loads, (folder / "run/metrics.jsonl").read_text().splitlines())
        saved = [row["step"] for row in rows if row["event"] == "checkpoint"]
        assert len(saved) == 4 and all(0 < at - before <= 2 for before, at in zip(asked, saved, strict=True)), (asked, saved)


@pytest.mark.long
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_one_process_leaves_with_85(repository, data, tmp_path, number):
    """A plain `python pretrain_ttl.py`, asked while it imports, prepares, trains; in the end the same weights."""
    draw = random.Random(number)
    reference = LauncherJob(repository, tmp_path / "reference", data, launcher("none"), DATA)
    began = time.monotonic()
    assert reference.wait() == 0, reference.log
    whole = time.monotonic() - began
    for moment in range(5):
        job = LauncherJob(repository, tmp_path / "job", data, launcher("none"), DATA)
        time.sleep(0.6 + draw.uniform(0, whole - 0.6) * (moment + 1) / 5)  # after Python's own start
        job.process.send_signal(number)
        code = job.wait()
        assert code in (0, 85), job.log
    assert LauncherJob(repository, tmp_path / "job", data, launcher("none"), DATA).wait() == 0
    assert digest(tmp_path / "job") == digest(tmp_path / "reference")


@pytest.mark.long
@pytest.mark.parametrize(("name", "number", "whole_group"), [
    ("torchrun", signal.SIGTERM, False), ("torchrun", signal.SIGINT, True), ("torchrun", signal.SIGTERM, True),
    ("deepspeed", signal.SIGTERM, False), ("deepspeed", signal.SIGINT, True),
    ("mpirun", signal.SIGUSR1, False)])
def test_launchers_pass_it_on(repository, data, tmp_path, name, number, whole_group):
    """To the launcher, as `kill` does, or to all in the foreground, as a terminal does. Their own codes: not 0."""
    reference = LauncherJob(repository, tmp_path / "reference", data, launcher(name), DATA)
    assert reference.wait() == 0, reference.log
    job = LauncherJob(repository, tmp_path / "job", data, launcher(name), DATA, ("step", "1", "slow"))
    deadline = time.monotonic() + 240
    while not (job.folder / "fault-at").exists():
        assert time.monotonic() < deadline, job.log
        time.sleep(0.01)
    for pid in job.members() if whole_group else [job.process.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    code = job.wait()
    # SIGTERM ends `deepspeed` itself and nothing else; the ranks see that it is gone.
    assert not job.wait_for_orphans(10), job.log
    assert code not in (0, 2) and "stopped at step" in job.log, (code, job.log)
    print(f"{name} {number.name}: {code}")
    assert LauncherJob(repository, tmp_path / "job", data, launcher(name), DATA).wait() == 0
    assert digest(tmp_path / "job") == digest(tmp_path / "reference")
