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
    ({"pipeline": 2}, ["data.document_mask=true"], "parallel.pipeline: is 2, and .*data.document_mask is true; must be 1 "
     "there: stages behind the first receive no token ids.*; set it to 1, or data.document_mask to false"),
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
    ({"recompute": "fulll"}, 'recompute: is "fulll"; must be one of "none", "selective", "full"; did you mean .full.'),
    ({"recompute": True}, 'recompute: is true; must be one of "none"'),
    ({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "nvme"}}},
     'offload_optimizer.device: is "nvme"; must be one of "cpu"'),
    ({"zero_optimization": {"stage": 1, "offload_optimizer": {}}}, "offload_optimizer.device: is missing"),
    ({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu", "pin_memory": 1}}},
     "pin_memory: is 1; must be true or false"),
    ({"zero_optimization": {"stage": 2, "cpu_offload": True}},
     "it is called zero_optimization.offload_optimizer today"),
    ({"aio": {}}, "offloading to disks is not offered"),
    ({"parallel": {"pipeline": 2}, "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
     "stage: is 2 with parallel.pipeline 2"),
    ({"parallel": {"tensor": 2, "data": 2}}, "parallel.data: is not available here; .* leave are data parallel"),
    ({"parallel": {"tensor": "2"}}, "parallel.tensor: is .2.; must be a whole number > 0; write it without quotes"),
    ({"parallel": {"tensor": 2, "sequence": "true"}}, "parallel.sequence: .* write true, without quotes"),
    ({"parallel": 2}, "parallel: is 2; must be a table"),
    ({"tensor_parallel": {"autotp_size": 2}}, 'the degrees stand in "parallel": {"tensor": 2, "pipeline": 1}'),
    ({"pipeline": {"stages": 2}}, 'the degrees stand in "parallel": {"tensor": 1, "pipeline": 2}'),
    ({"sequence_parallel_size": 2}, '"parallel": {"tensor": 2, "sequence": true}'),
    ({"fp16": {"enabled": True, "loss_scale": 128}},
     "fp16.loss_scale: is not a key of the DeepSpeed JSON; .*min_loss_scale"),
    ({"fp16": {"enabled": True, "initial_scale_power": 33}},
     "initial_scale_power: is 33; must be a whole number >= 0 and <= 32"),
    ({"fp16": {"enabled": True, "loss_scale_window": 0}}, "loss_scale_window: is 0; must be a whole number > 0"),
    ({"fp16": {"enabled": True, "hysteresis": 0}}, "hysteresis: is 0; must be a whole number > 0"),
    ({"fp16": {"enabled": True, "min_loss_scale": 0}}, "min_loss_scale: is 0; must be a number > 0"),
    ({"fp16": {"initial_scale_power": 8}}, "fp16.enabled: is missing; must be true or false"),
    ({"communication_data_type": "fp16"}, 'is "fp16" in an fp32 run; must be "fp32" there'),
    ({"communication_data_type": "fp64"}, 'is "fp64"; must be one of "fp32", "bf16", "fp16"'),
])
def test_pairs_that_exclude_each_other(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, profile={**PROFILE, **change})


def test_precisions_by_what_is_enabled(tmp_path):
    """A section that is switched off says nothing; gradients may travel in fp32 or in the precision of the run."""
    for enabled, precision in ((True, "fp16"), (False, "fp32")):
        assert load(tmp_path, profile={**PROFILE, "fp16": {"enabled": enabled}}).profile.precision == precision
    both = {**PROFILE, "bf16": {"enabled": True}, "fp16": {"enabled": False}, "communication_data_type": "bf16"}
    assert load(tmp_path, profile=both).profile.precision == "bf16"
    half = {**PROFILE, "fp16": {"enabled": True}, "communication_data_type": "fp16"}
    assert resolve_deepspeed(load(tmp_path, profile=half), 1)["communication_data_type"] == "fp16"


def test_degrees_have_defaults_and_checking_can_be_switched_off(tmp_path):
    """No section, an empty one, and null."""
    for profile in (PROFILE, {**PROFILE, "parallel": {}}, {**PROFILE, "parallel": None}):
        cut = load(tmp_path, profile=profile).profile.cut
        assert (cut.tensor, cut.pipeline, cut.sequence, cut.replica_check_steps) == (1, 1, False, 1000)
    never = load(tmp_path, profile={**PROFILE, "parallel": {"replica_check_steps": None}})
    assert never.profile.cut.replica_check_steps is None


def test_absurd_degrees_are_refused_at_once(tmp_path):
    """Nothing is enumerated up to them."""
    profile = {**PROFILE, "parallel": {"tensor": 10**12, "pipeline": 10**12}}
    with pytest.raises(ConfigError, match="set it to 2\n.*set it to at most 3$"):
        load(tmp_path, profile=profile)
    faults = read_settings(tmp_path / "m.json", tmp_path / "r.toml", (), 2**18).faults
    assert len(faults) == 3 and "hold the model once, and there are 262,144" in faults[2]


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_optimizer_can_be_offloaded_at_every_stage(tmp_path, stage, precision):
    """DeepSpeed takes its ZeRO optimizer instead of the one it has for bf16 at stage 1; the sums stay fp32."""
    profile = {**PROFILE, "zero_optimization": {"stage": stage, "offload_optimizer": {"device": "cpu"}}}
    profile |= {} if precision == "fp32" else {precision: {"enabled": True}}
    resolved = resolve_deepspeed(load(tmp_path, profile=profile), 1)
    assert resolved["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert resolved.get("data_types") == (None if precision == "fp32" else {"grad_accum_dtype": "fp32"})


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
