"""The dry run: every fault at once, and numbers that hold."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from tiny_session import write_data, write_settings

from megatron_ttl.config.load import load_settings
from megatron_ttl.errors import ConfigError
from megatron_ttl.plan.forecast import dry_run, forecast


def test_ttl_160m_forecast(repository):
    """Parameters, tokens, FLOPs, hours and checkpoint bytes of the published run."""
    settings = load_settings(repository / "configs/a100_single.json", repository / "configs/ttl_160m.toml")
    result = forecast(settings, 1)
    assert result["parameters"] == 162_417_408
    assert result["non_embedding_parameters"] == 113_265_408
    assert (result["steps"], result["tokens"], result["accumulation"]) == (458_000, 3_751_936_000, 1)
    assert result["checkpoint_bytes"] == 12 * 162_417_408
    assert result["flops"] == pytest.approx(3_751_936_000 * 940.18e6, rel=1e-4)
    assert result["hours_at_40_percent_mfu"] == pytest.approx(7.85, abs=0.01)


def test_the_checkpoint_forecast_is_within_two_percent(tmp_path):
    """Predicted and real bytes of a run's checkpoint on disk."""
    from tiny_session import train_here

    from megatron_ttl.testing import run_distributed

    data = write_data(tmp_path / "data")
    deepspeed, run = write_settings(tmp_path, data, tmp_path / "run")
    # wide enough that the names in the files' headers do not count
    overrides = ["model.hidden_size=256", "model.intermediate_size=512", "train.steps=1", "schedule.warmup_steps=0"]
    predicted = dry_run(deepspeed, run, overrides, 1)["checkpoint_bytes"]
    run_distributed(train_here, 1, str(deepspeed), str(run), overrides)
    folder = tmp_path / "run/checkpoints/step-00000001"
    assert sum(path.stat().st_size for path in folder.iterdir()) == pytest.approx(predicted, rel=0.02)


def test_every_fault_is_reported_at_once(tmp_path):
    """A wrong value, a typo in each file, an impossible world and missing data, in one message."""
    deepspeed, run = write_settings(tmp_path, tmp_path, tmp_path / "run",
                                    {"train_micro_batch_size_per_gpu": 2, "zero_optimisation": {"stage": 1}})
    with pytest.raises(ConfigError) as error:
        dry_run(deepspeed, run, ["optimizer.lrr=1", "schedule.min_lr=0.5"], 3)
    text = str(error.value)
    for part in ("zero_optimization", "optimizer.lr", "schedule.min_lr", "train.bin: does not exist",
                 "held.bin: does not exist"):
        assert part in text, part
    assert len(error.value.faults) >= 5


def test_a_world_that_does_not_divide_is_refused_with_the_nearest(tmp_path):
    """256 tokens per step are 8 sequences: micro batches of 2 on 3 processes cannot share them."""
    deepspeed, run = write_settings(tmp_path, write_data(tmp_path / "data"), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"256.*192.*384"):
        dry_run(deepspeed, run, [], 3)


def test_the_command_touches_no_torch(repository, tmp_path):
    """JSON for programs, in a process that never imported torch."""
    deepspeed, run = write_settings(tmp_path, write_data(tmp_path / "data"), tmp_path / "run")
    script = ("import sys, runpy; sys.argv = sys.argv[1:]\n"
              "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
              "finally: assert 'torch' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", script, str(repository / "pretrain_ttl.py"), "--deepspeed_config",
                           str(deepspeed), "--config", str(run), "--dry-run", "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 12
    assert not (tmp_path / "run").exists()


def test_energy_is_reported_once_and_hides_nothing(tmp_path):
    """A missing country and missing data: both, and the country once."""
    deepspeed, run = write_settings(tmp_path, tmp_path, tmp_path / "run")
    for override in ("energy.enabled=true", "energy.enabled=perhaps"):
        with pytest.raises(ConfigError) as error:
            dry_run(deepspeed, run, [override, "energy.country_iso_code=none"], 1)
        assert sum("energy." in fault for fault in error.value.faults) == 1, error.value.faults
        assert any("train.bin: does not exist" in fault for fault in error.value.faults)


@pytest.mark.parametrize(("device", "has_hours", "has_power"), [
    ("A100", True, True), ("NVIDIA A100-SXM4-40GB", True, True), ("NVIDIA L4", True, False),
    ("Abacus", False, False)])
def test_the_device_of_a_profile_may_have_any_name(tmp_path, device, has_hours, has_power):
    """Driver names, devices of unknown power, unknown devices."""
    profile = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}, "_device": device}
    files = write_settings(tmp_path, write_data(tmp_path / "data"), tmp_path / "run", profile)
    result = dry_run(*files, [], 1)
    assert ("hours_at_40_percent_mfu" in result, "kwh_of_the_boards" in result) == (has_hours, has_power)


@pytest.mark.parametrize("world_size", [0, -1, 2**40])
def test_no_process_is_no_world(tmp_path, world_size):
    """Nor is less than none, nor more than there are anywhere."""
    deepspeed, run = write_settings(tmp_path, write_data(tmp_path / "data"), tmp_path / "run")
    with pytest.raises(ConfigError, match=f"--world-size: is {world_size:,}; must be a whole number > 0"):
        dry_run(deepspeed, run, [], world_size)
