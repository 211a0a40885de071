"""Checkpoints of an earlier day: every later release must open them and go on from them.

`tests/golden/version1` was written by one process after three steps, `version2` by four (tensor 2 with sequence
parallelism x pipeline 2) that had loaded it. They are never written anew; a new format gets a folder of its own.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from layout_runs import Case, deepspeed_settings, steps_of_data

from megatron_ttl.checkpoint.state import restore
from megatron_ttl.checkpoint.store import CheckpointStore
from megatron_ttl.config.schema import RunFile
from megatron_ttl.testing import run_distributed
from megatron_ttl.train.engine import Engine

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
SUMS = {"weights": 69.35459157981677, "exp_avg": 0.48153737618628506, "exp_avg_sq": 0.003977060641321255,
        "rng": 318629.0}
"""Sum of all absolute values of each group."""
NEXT_LOSSES = [3.494650213211929, 3.4968287413602046, 3.501187800537531]
"""Of steps 4 to 6, by a loop in plain torch that was never interrupted."""


@pytest.mark.parametrize("version", [1, 2])
def test_an_old_checkpoint_opens(version):
    checkpoint = CheckpointStore(GOLDEN / f"version{version}").latest_valid()
    assert (checkpoint.manifest.version, checkpoint.step, checkpoint.record["consumed_samples"]) == (version, 3, 72)
    for group, expected in SUMS.items():
        found = sum(float(tensor.double().abs().sum()) for tensor in checkpoint.tensors(group).values())
        assert found == pytest.approx(expected, rel=1e-12)


def test_pieces_hold_what_the_whole_held():
    one, pieces = (CheckpointStore(GOLDEN / f"version{version}").latest_valid() for version in (1, 2))
    for group in SUMS:
        ours, theirs = pieces.tensors(group), one.tensors(group)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def go_on(mesh, version, case):
    """Restore under a layout; return the next three losses."""
    checkpoint = CheckpointStore(GOLDEN / f"version{version}").latest_valid(mesh)
    run = RunFile.model_validate_json(json.dumps(checkpoint.record["run"]))
    mesh = mesh.cut(case.tensor, case.pipeline, case.sequence)
    engine = Engine(run, deepspeed_settings(case), mesh)
    restore(engine.state, run.model, mesh, checkpoint, checkpoint.step)
    data = list(steps_of_data(run.model.vocab_size, 6, mesh.data_parallel_rank, mesh.data_parallel_size, steps=6))
    return [float(engine.train_step(micro_batches, 1e-3).loss) for micro_batches in data[3:]]


@pytest.mark.parametrize(("version", "case"), [(1, Case()), (2, Case()), (1, Case(tensor=2, stage=3)),
                                               (2, Case(pipeline=2))], ids=str)
def test_a_run_goes_on_from_it(version, case):
    for losses in run_distributed(go_on, case.world_size, version, case):
        assert losses == pytest.approx(NEXT_LOSSES, abs=1e-5)
