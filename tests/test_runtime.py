"""Who a process is, in the words of every launcher."""

from __future__ import annotations

import sys

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
