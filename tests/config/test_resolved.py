"""What DeepSpeed is given, and what the tool shows."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from test_refusals import PROFILE, load

from megatron_ttl.config.deepspeed import resolve_deepspeed
from megatron_ttl.errors import ConfigError


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("bf16", [False, True])
def test_deepspeed_accepts_what_it_is_given(tmp_path, stage, bf16):
    """DeepSpeed's own parser takes the resolved dict; the accumulation is derived."""
    if bf16 and stage == 0:
        message = "stage: is 0 with bf16; must be 1, 2 or 3: .* counts its first step twice"
        with pytest.raises(ConfigError, match=message):
            load(tmp_path, profile={**PROFILE, "bf16": {"enabled": True}, "zero_optimization": {"stage": 0}})
        return
    from megatron_ttl.parallel.door import deepspeed

    profile = {**PROFILE, "zero_optimization": {"stage": stage}, **({"bf16": {"enabled": True}} if bf16 else {})}
    settings = load(tmp_path, profile=profile, overrides=["train.gradient_clipping=0.5"])
    resolved = resolve_deepspeed(settings, 2)
    assert (resolved["train_micro_batch_size_per_gpu"], resolved["gradient_accumulation_steps"]) == (2, 2)
    assert resolved["gradient_clipping"] == 0.5
    parsed = deepspeed.runtime.config.DeepSpeedConfig(resolve_deepspeed(settings, 1))
    assert parsed.zero_optimization_stage == stage
    assert parsed.bfloat16_config.enabled is bf16
    if bf16:
        assert parsed.grad_accum_dtype == "fp32"


def test_a_world_that_does_not_divide_names_the_nearest(tmp_path):
    """512 tokens are 8 sequences; three processes with two each make 384 or 768."""
    with pytest.raises(ConfigError, match="384.*768"):
        resolve_deepspeed(load(tmp_path), 3)


def test_the_tool_shows_values_and_origins(repository):
    """A table, its documentation, and JSON."""
    command = [sys.executable, "tools/show_config.py", "--deepspeed_config", "configs/cpu.json", "--config",
               "configs/debug.toml", "optimizer.lr=4e-3"]
    shown = subprocess.run([*command, "--docs"], cwd=repository, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    line = next(line for line in shown.stdout.splitlines() if "optimizer.lr " in line)
    assert "0.004" in line and "command line" in line and "Peak learning rate" in line
    rows = json.loads(subprocess.run([*command, "--json"], cwd=repository, capture_output=True, text=True).stdout)
    assert rows["zero_optimization.stage"]["origin"] == "configs/cpu.json"
    assert rows["optimizer.eps"]["origin"] == "default"
