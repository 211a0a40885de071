"""Who a process is, in the words of every launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_ttl.errors import ConfigError
from megatron_ttl.runtime import discover_ranks, find_meeting_place, output_is_forwarded

MASTER = {"MASTER_ADDR": "node1", "MASTER_PORT": "12345"}


@pytest.mark.parametrize(("environment", "expected"), [
    ({}, (0, 1, 0, "none")),
    ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", **MASTER}, (3, 8, 1, "torchrun or deepspeed")),
    ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1", **MASTER},
     (1, 2, 1, "Open MPI")),
    ({"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0", **MASTER},
     (5, 8, 1, "Slurm")),
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}, (0, 1, 0, "none")),  # sbatch without srun
    ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1, 0, "torchrun or deepspeed")),
])
def test_every_launcher_is_understood(environment, expected):
    """rank, world size, local rank and who said so."""
    ranks = discover_ranks(environment)
    assert (ranks.rank, ranks.world_size, ranks.local_rank, ranks.launcher) == expected
    if "MASTER_ADDR" in environment:
        assert (ranks.master_address, ranks.master_port) == ("node1", 12345)


@pytest.mark.parametrize(("environment", "message"), [
    ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "2 processes .* no MASTER_ADDR; .* export MASTER_ADDR"),
    ({"RANK": "zero", "WORLD_SIZE": "2"}, "RANK='zero'.* whole numbers"),
])
def test_contradictory_surroundings_are_named(environment, message):
    """One sentence instead of a hang."""
    with pytest.raises(ConfigError, match=message):
        find_meeting_place(discover_ranks(environment))


def test_a_dry_run_needs_no_meeting_place():
    """Who one is can be said without an address; where to meet is asked only by those that go there."""
    ranks = discover_ranks({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"})
    assert (ranks.rank, ranks.world_size, ranks.master_address) == (1, 2, None)
    assert find_meeting_place(discover_ranks({})).world_size == 1


def test_without_mpi4py_mpirun_needs_an_address(monkeypatch):
    """Also prterun, whose processes cannot know how many they are."""
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    started = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    with pytest.raises(ConfigError, match="several processes started by Open MPI, no MASTER_ADDR, and mpi4py cannot be "
                                          "used .*; they must know where to meet; pip install"):
        find_meeting_place(discover_ranks(started))
    with pytest.raises(ConfigError, match="several processes started by prterun"):
        discover_ranks({"PRTE_LAUNCHED": "1", "PMIX_RANK": "0"})


def test_the_terminal_of_mpirun_is_no_persons(monkeypatch):
    """It gives each process a pseudo terminal and writes what they print into a file."""
    monkeypatch.delenv("PRTE_LAUNCHED", raising=False)
    monkeypatch.delenv("OMPI_COMM_WORLD_RANK", raising=False)
    assert not output_is_forwarded()
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    assert output_is_forwarded()


# A launcher by its name alone; it starts the next name, and at the end a process of ours. All say who they are.
TREE = """
import os, subprocess, sys
print(os.getpid(), flush=True)
subprocess.Popen([sys.executable, *(sys.argv[1:] or ["-c", OURS])]).wait()
"""
OURS = """
import os, time
from megatron_ttl.runtime import siblings, stop_with_launcher
stop_with_launcher()
print(os.getpid(), *siblings(), flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(("names", "victim", "ends"), [
    (["torchrun"], 0, True), (["deepspeed", "shell"], 0, True), (["shell"], 0, False), (["torchrun-notes"], 0, False),
    (["shell", "mpirun"], 0, False), (["shell", "mpirun"], 1, True)])
def test_a_process_is_asked_to_stop_when_its_launcher_is_killed(tmp_path, repository, names, victim, ends):
    """Also by a grandparent, but not by a shell, nor by what stands above the launcher."""
    for name in names:
        (tmp_path / name).write_text(f"OURS = {OURS!r}\n{TREE}")
    top = subprocess.Popen([sys.executable, *(str(tmp_path / name) for name in names)], stdout=subprocess.PIPE, text=True,
                           cwd=repository, env={**os.environ, "PYTHONPATH": str(repository)}, start_new_session=True)
    try:
        above = [int(top.stdout.readline()) for _ in names]
        ours, *beside = map(int, top.stdout.readline().split())
        # The launcher's own child knows its siblings; nobody else has any.
        assert beside == ([ours] if names[-1] in ("torchrun", "mpirun") else [])
        os.kill(above[victim], signal.SIGKILL)
        deadline = time.monotonic() + (5 if ends else 1)
        while running(ours) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert running(ours) is not ends
    finally:
        os.killpg(top.pid, signal.SIGKILL)
        top.communicate()


def running(pid):
    """Return whether a process runs, be it nobody's child any more."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
