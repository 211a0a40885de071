"""A rank hangs, in any way and anywhere: the watchdog ends the job and keeps the stacks of all ranks."""

from __future__ import annotations

import re
import time

import pytest
from forked_job import TENSOR_PIPELINE, ForkedJob
from patience import patient
from planted_fault import HANGS
from tiny_session import write_data

from megatron_ttl.checkpoint.store import CheckpointStore

pytestmark = pytest.mark.slow
LIMITS = {"set_up_s": 12, "step_s": 4, "save_s": 4, "evaluate_s": 4}
LIMIT_OF = {"start": "set_up_s", "met": "set_up_s", "data": "step_s", "step": "step_s", "save": "save_s",
            "evaluate": "evaluate_s"}
SHORT = [("data", "fifo", 1), ("step", "stopped", 0)]
ALL = [(section, kind, rank) for section in ("met", "step", "save", "evaluate") for kind in HANGS for rank in range(4)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize(("section", "kind", "victim"), [
    *SHORT, *(pytest.param(*case, marks=pytest.mark.long) for case in [*ALL, ("start", "stopped", 2)] if case not in SHORT)])
def test_a_hung_rank_ends_the_job(data, tmp_path, section, kind, victim):
    """Four ranks, tensor 2 x pipeline 2, under torchrun's agent; within the section's limit and ten seconds."""
    job = ForkedJob(tmp_path / "job", data, 4, TENSOR_PIPELINE | {"watchdog": LIMITS}, (section, str(victim), kind),
                    agent=True)
    code = job.wait()
    took = time.time() - float((job.folder / "fault-at").read_text())
    log, stacks = job.log, sorted((job.folder / "run/stacks").iterdir())
    assert code not in (0, 85), log
    assert took < LIMITS[LIMIT_OF[section]] + patient(10), f"{took:.1f} s\n{log}"
    assert not job.wait_for_orphans(2), log
    assert [path.name for path in stacks] == [f"rank-{rank:05d}.txt" for rank in range(4)], log
    assert all("most recent call first" in path.read_text() for path in stacks)
    if (section, kind) != ("save", "stopped"):  # whose thread is further when the main one writes the stacks
        assert "fail" in stacks[victim].read_text(), "where it hangs: planted_fault.fail"
    assert re.search(r"exitcode  : (70|-9) ", log.split("Root Cause")[1]), log
    newest = CheckpointStore(job.folder / "run/checkpoints").latest_valid()
    assert section not in ("save", "evaluate") or newest.step >= 2, log
