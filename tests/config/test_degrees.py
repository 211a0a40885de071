"""Degrees that fit neither model nor machine, and precisions that exclude each other: refused with what fits."""

from __future__ import annotations

import pytest
from test_refusals import PROFILE, RUN, load

from megatron_ttl.config.deepspeed import resolve_deepspeed
from megatron_ttl.config.degrees import data_parallel_size_of, device_faults
from megatron_ttl.config.load import read_settings
from megatron_ttl.errors import ConfigError

BLOCKS = int(RUN.split("num_hidden_layers = ")[1].split()[0])


@pytest.mark.parametrize(("parallel", "overrides", "message"), [
    ({"tensor": 3}, [],
     "parallel.tensor: is 3, and the model has .* query heads.*; must divide them.*set it to 2 or 4"),
    ({"tensor": 4}, ["model.num_key_value_heads=2"], "has 2 key/value heads; .*set it to 2$"),
    ({"tensor": 4}, ["model.intermediate_size=86"], "86 channels of the SwiGLU; .*set it to 2$"),
    ({"pipeline": BLOCKS + 2}, [], f"the model has {BLOCKS} blocks; .*set it to at most {BLOCKS + 1}"),
    ({"sequence": True}, [], "sequence: is true with tensor 1; must be false"),
    ({"tensor": 4, "sequence": True}, ["train.sequence_length=30", "train.tokens_per_step=240"],
     "sequence: is true, and train.sequence_length 30 over 4 ranks leaves 2 tokens; must divide; .*tensor to 2, or "),
    ({"replica_check_steps": 0}, [], "parallel.replica_check_steps: is 0; must be"),
])
def test_degrees_that_do_not_fit_the_model(tmp_path, parallel, overrides, message):
    base = ["model.num_attention_heads=4", "model.num_key_value_heads=4", "model.intermediate_size=88"]
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, profile={**PROFILE, "parallel": parallel},
             overrides=list({key.split("=")[0]: key for key in (*base, *overrides)}.values()))


@pytest.mark.parametrize(("change", "message"), [
    ({"parallel": {"pipeline": 2}, "zero_optimization": {"stage": 3}},
     "stage: is 3 with parallel.pipeline 2; must be 0 or 1"),
    ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "fp16.enabled: is true, and so is bf16.enabled"),
    ({"fp16": {"enabled": True}, "zero_optimization": {"stage": 0}}, "stage: is 0 with fp16; must be 1, 2 or 3"),
    ({"fp16": {"enabled": True}, "communication_data_type": "bf16"},
     'is "bf16" in an fp16 run; must be "fp32" or "fp16"'),
    ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
     "given with stage 0; needs stage 1, 2"),
    ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, "only the optimizer is offloaded"),
    ({"activation_checkpointing": {}}, '"recompute": "selective" or "full"'),
    ({"recompute": "fulll"}, "recompute: is 'fulll'; must be|recompute: is \"fulll\"; must be"),
])
def test_pairs_that_exclude_each_other(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, profile={**PROFILE, **change})


def test_fp16_needs_a_gpu(tmp_path):
    """Found where the device is known, before anything is built."""
    settings = load(tmp_path, profile={**PROFILE, "fp16": {"enabled": True}})
    assert device_faults(settings, cuda=True) == []
    fault, = device_faults(settings, cuda=False)
    assert "fp16.enabled: is true, and there is no GPU; must be false on a CPU" in fault


@pytest.mark.parametrize(("world_size", "message"), [
    (6, "tensor 2 x pipeline 2 = 4 processes hold the model once, and there are 6; .*start 4 or 8 processes, or set "
        "tensor to 2 and pipeline to 1"),
    (1, "there are 1; .*start 4 processes, or set tensor to 1 and pipeline to 1"),
])
def test_a_world_that_the_degrees_do_not_divide(tmp_path, world_size, message):
    settings = load(tmp_path, profile={**PROFILE, "parallel": {"tensor": 2, "pipeline": 2}})
    with pytest.raises(ConfigError, match=message):
        data_parallel_size_of(settings, world_size)
    reading = read_settings(settings.deepspeed_path, settings.run_path, (), world_size)
    assert len(reading.faults) == 1 and "hold the model once" in reading.faults[0]
    assert data_parallel_size_of(settings, 8) == 2


def test_deepspeed_is_told_what_it_knows(tmp_path):
    """Loss scaling, offloading without a compiler, fp32 sums; the degrees are ours alone."""
    profile = {**PROFILE, "fp16": {"enabled": True}, "parallel": {"tensor": 2}, "recompute": "full",
               "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}}}
    resolved = resolve_deepspeed(load(tmp_path, profile=profile), 1)
    assert not {"parallel", "recompute"} & resolved.keys()
    assert resolved["fp16"] == {"enabled": True, "loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 1000,
                                "hysteresis": 2, "min_loss_scale": 1.0}
    assert resolved["bf16"] == {"enabled": False} and resolved["data_types"] == {"grad_accum_dtype": "fp32"}
    assert resolved["zero_force_ds_cpu_optimizer"] is False
    assert resolved["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    from megatron_ttl.parallel.door import deepspeed

    parsed = deepspeed.runtime.config.DeepSpeedConfig(resolved)
    assert parsed.float16_config.enabled and parsed.zero_config.offload_optimizer.device == "cpu"
