"""The real loop under layouts: the rows of one process, stopped under one layout and continued under others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_loop import GENTLE, losses, rows
from tiny_session import train_here, write_data, write_settings

from megatron_ttl.errors import ConfigError
from megatron_ttl.testing import run_distributed
from megatron_ttl.train import loop
from megatron_ttl.train.anomalies import DivergedError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def one(data, tmp_path_factory):
    """An uninterrupted run on one process."""
    folder = tmp_path_factory.mktemp("one")
    deepspeed, run = write_settings(folder, data, folder / "run")
    assert run_distributed(train_here, 1, str(deepspeed), str(run), [GENTLE]) == [0]
    return folder / "run"


def profile(stage=1, micro_batch=2, **changes):
    return {"train_micro_batch_size_per_gpu": micro_batch, "zero_optimization": {"stage": stage}, **changes}


CUT = profile(parallel={"tensor": 2, "pipeline": 2, "sequence": True, "replica_check_steps": 3}, recompute="selective")
STAGES = profile(parallel={"pipeline": 2}, stage=0)
SHARDED = profile(parallel={"tensor": 2}, stage=3, recompute="full")


def train_under(folder, data, run_dir, profile, processes, stop_after=None):
    deepspeed, run = write_settings(folder, data, run_dir, profile)
    return run_distributed(train_here, processes, str(deepspeed), str(run), [GENTLE], stop_after)


def equal_rows(ours, theirs):
    for found, expected in zip(losses(ours), losses(theirs), strict=True):
        assert found == pytest.approx(expected, abs=1e-5)
    for found, expected in zip(rows(ours, "evaluation"), rows(theirs, "evaluation"), strict=True):
        assert found.keys() == expected.keys()
        assert all(found[key] == pytest.approx(expected[key], rel=1e-5) for key in found if "/" in key)


@pytest.mark.parametrize(("cut", "processes"), [(CUT, 4), (STAGES, 4), (SHARDED, 4)], ids=["3d", "pipeline", "tensor"])
def test_a_layout_writes_the_rows_of_one_process(data, tmp_path, one, cut, processes):
    """Losses, norms, learning rates, held-out losses."""
    assert train_under(tmp_path, data, tmp_path / "run", cut, processes) == [0] * processes
    equal_rows(tmp_path / "run", one)


def test_a_run_moves_from_layout_to_layout(data, tmp_path, one):
    """Four processes in three dimensions, then two stages, then ZeRO 3, then one process: one curve."""
    run = tmp_path / "run"
    for cut, processes, stop in ((CUT, 4, 3), (STAGES, 2, 5), (SHARDED, 4, 9), (profile(micro_batch=4), 1, None)):
        assert train_under(tmp_path, data, run, cut, processes, stop) == [85 if stop else 0] * processes
    equal_rows(run, one)
    assert [row["step"] for row in rows(run, "resume")] == [3, 5, 9]
    manifest = json.loads((run / "checkpoints/step-00000003/manifest.json").read_text())
    assert manifest["version"] == 2 and len(manifest["files"]) > 4
    assert json.loads((run / "checkpoints/step-00000012/manifest.json").read_text())["version"] == 1


def test_an_export_does_not_see_the_layout(data, tmp_path, one):
    """A model folder made from pieces holds the vocabulary without padding, verified against transformers."""
    from megatron_ttl.checkpoint.hf import export_run

    assert train_under(tmp_path, data, tmp_path / "run", SHARDED, 2) == [0, 0]
    for run in (tmp_path / "run", one):
        export_run(run, tmp_path / f"model-{run.parent.name}")
    from safetensors.torch import load_file

    ours, theirs = (load_file(next(Path(tmp_path / f"model-{name}").glob("*.safetensors")))
                    for name in (tmp_path.name, one.parent.name))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].shape == theirs[name].shape and (ours[name] - theirs[name]).abs().max() < 1e-4, name


def refused(mesh, deepspeed, run):
    try:
        train_here(mesh, deepspeed, run, [])
    except ConfigError as error:
        return error.faults
    return []


def test_a_number_of_processes_that_does_not_fit(data, tmp_path):
    """Refused on every process, before anything is built, with what would fit."""
    deepspeed, run = write_settings(tmp_path, data, tmp_path / "run", CUT)
    for faults in run_distributed(refused, 2, str(deepspeed), str(run)):
        assert len(faults) == 1 and "and there are 2; the product must divide their number; start 4" in faults[0]


def drifting(mesh, deepspeed, run):
    """Flip a bit of one copy on the last rank after the second step."""
    real, calls = loop.replica_faults, []

    def flip(module, mesh):
        calls.append(None)
        if len(calls) == 2 and mesh.rank == mesh.world_size - 1:
            weight = module.get_parameter("1.post_attention_layernorm.weight").data
            weight.view(torch.int32)[0] ^= 1
        return real(module, mesh)

    loop.replica_faults = flip
    try:
        train_here(mesh, deepspeed, run, [])
    except DivergedError as error:
        return error.faults, len(calls)
    finally:
        loop.replica_faults = real
    return [], len(calls)


def test_a_drifting_copy_ends_the_run_before_it_is_kept(data, tmp_path):
    """At the cadence, not at the next save; nothing of the drifted state is saved."""
    cut = profile(parallel={"tensor": 2, "replica_check_steps": 2})
    deepspeed, run = write_settings(tmp_path, data, tmp_path / "run", cut)
    for faults, calls in run_distributed(drifting, 2, str(deepspeed), str(run)):
        assert calls == 2 and faults[0].startswith("step 4: copies of a weight differ")
        assert any("1.post_attention_layernorm.weight differs" in fault for fault in faults[1:])
    assert not (tmp_path / "run/checkpoints").exists()
