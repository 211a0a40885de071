"""What a layout costs, by hand for one case, and against the collectives and weights of real steps for many."""

from __future__ import annotations

import json

import pytest
from counted_traffic import count_steps

from megatron_ttl.config.load import load_settings
from megatron_ttl.model.flops import count_parameters
from megatron_ttl.parallel.plan import Layout
from megatron_ttl.plan.layout_costs import bubble, layout_for, stage_costs, state_bytes
from megatron_ttl.testing import run_distributed

# 2 blocks, h 32, f 80, 4 heads, 2 key/value heads, 96 pieces; 8 sequences of 16 tokens a step, two at a time
RUN = """
run = {dir = "runs/x"}
model = {hidden_size = 32, intermediate_size = 80, num_hidden_layers = 2, num_attention_heads = 4, \
num_key_value_heads = 2, vocab_size = 96, max_position_embeddings = 32}
data = {sources = [{prefix = "data/x"}]}
train = {sequence_length = 16, tokens_per_step = 128, steps = 10, gradient_clipping = 1.0}
optimizer = {lr = 1e-3}
schedule = {kind = "constant"}
checkpoint = {every_steps = 5}
energy = {enabled = false}
"""


def profile(tensor=1, pipeline=1, sequence=False, stage=1, **keys):
    return {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage, **keys.pop("zero", {})},
            "parallel": {"tensor": tensor, "pipeline": pipeline, "sequence": sequence}, **keys}


def write(folder, content, name="m"):
    (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "r.toml").write_text(RUN)
    return str(folder / f"{name}.json"), str(folder / "r.toml")


def costs(folder, content, world_size):
    settings = load_settings(*write(folder, content))
    return stage_costs(settings, layout_for(settings, world_size))


def test_a_small_case_by_hand(tmp_path):
    """Tensor 2, pipeline 2, two copies, fp32, ZeRO 1: two micro batches of 2 x 16 tokens, 32 channels, 4 bytes."""
    first, last = costs(tmp_path, profile(2, 2), 8)
    activations = 2 * 16 * 32 * 4
    assert (first.layers, last.layers) == (range(0, 2), range(2, 4))
    # a block: 4 all-reduces, embedding or head one, each 2 (t - 1) / t = 1 times; the loss 12 bytes a token
    assert first.sent_bytes["tensor"] == 2 * 5 * activations
    assert last.sent_bytes["tensor"] == 2 * (5 * activations + 12 * 2 * 16)
    assert first.sent_bytes["pipeline"] == last.sent_bytes["pipeline"] == 2 * activations
    # half of q, k, v, o, gate, up, down, and two norms; half of 96 rows; the last norm
    block = 16 * 32 + 2 * 8 * 32 + 32 * 16 + 2 * 40 * 32 + 32 * 40 + 2 * 32
    assert (first.parameters, last.parameters) == (48 * 32 + block, block + 32 + 48 * 32)
    # ZeRO 1: all-reduce of fp32 gradients (2 c / 2), gather of fp32 weights (w / 2)
    assert first.sent_bytes["data"] == first.parameters * (4 + 2)
    assert first.device_bytes == first.parameters * (4 + 4 + 12 // 2) and first.host_bytes == 0
    head = 2 * 96 * 32
    matrices = 2 * (32 * (32 + 2 * 16) + 32 * 32 + 3 * 32 * 80) + 2 * 32 * 16
    assert first.share_of_operations == pytest.approx(matrices / (2 * matrices + head))
    assert bubble(2, 2) == pytest.approx(1 / 3) and bubble(1, 5) == 0


def test_sequence_parallelism_sends_the_same_and_a_little_for_norms(tmp_path):
    """Half the activations between stages; 32 gradients of each norm per micro batch."""
    plain, sequence = (costs(tmp_path, profile(2, 2, sequence), 4) for sequence in (False, True))
    for a, b, norms in zip(plain, sequence, (2, 3), strict=True):
        assert b.sent_bytes["tensor"] - a.sent_bytes["tensor"] == 4 * norms * 32 * 4
        assert b.sent_bytes["pipeline"] * 2 == a.sent_bytes["pipeline"]


TWO = [profile(2), profile(2, sequence=True), profile(2, recompute="selective"), profile(2, recompute="full"),
       profile(2, sequence=True, recompute="selective"), profile(2, sequence=True, recompute="full", stage=0),
       profile(1, 2), profile(1, 2, stage=0, recompute="full"), profile(2, sequence=True, bf16={"enabled": True}),
       *[profile(stage=stage) for stage in (0, 1, 2, 3)],
       *[profile(stage=stage, bf16={"enabled": True}, communication_data_type=travel)
         for stage, travel in ((1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "fp32"))],
       profile(stage=3, zero={"reduce_scatter": False}),
       profile(stage=1, zero={"offload_optimizer": {"device": "cpu"}}, bf16={"enabled": True})]
FOUR = [profile(2, 2, True), profile(2, 2, stage=0), profile(1, 2, bf16={"enabled": True}),
        profile(2, 1, True, stage=2), profile(2, stage=3), profile(2, 2, recompute="full"), profile(stage=2)]


@pytest.mark.parametrize(("world_size", "profiles"), [(2, TWO), (4, FOUR)])
def test_real_steps_send_what_is_forecast(tmp_path, world_size, profiles):
    """Every collective of a step, counted; ZeRO 3 may send less, for tiny weights are gathered once."""
    pairs = [write(tmp_path, content, f"m{i}") for i, content in enumerate(profiles)]
    counted = run_distributed(count_steps, world_size, pairs, timeout_s=300)
    for i, (pair, content) in enumerate(zip(pairs, profiles, strict=True)):
        settings = load_settings(*pair)
        layout = layout_for(settings, world_size)
        forecast = stage_costs(settings, layout)
        for rank in range(world_size):
            sent, weights = counted[rank][i]
            expected = forecast[layout.place(rank).pipeline]
            assert weights == expected.parameters, (content, rank)
            assert sent["tensor"] == expected.sent_bytes["tensor"], (content, rank)
            assert sent["pipeline"] == expected.sent_bytes["pipeline"], (content, rank)
            if content["zero_optimization"]["stage"] == 3:
                assert 0.4 * expected.sent_bytes["data"] < sent["data"] <= expected.sent_bytes["data"], (content, rank)
            else:  # flat buffers are padded by a few elements
                assert sent["data"] == pytest.approx(expected.sent_bytes["data"], rel=2e-3), (content, rank)


@pytest.mark.parametrize(("name", "gigabytes"), [("ttl_160m", 2.9), ("ttl_460m", 8.4), ("tinyllama_1b1", 19.8)])
def test_the_published_models_keep_18_bytes_per_parameter(repository, name, gigabytes):
    """bf16 on one GPU; spread over eight copies the masters and moments are an eighth."""
    settings = load_settings(repository / "configs/a100_single.json", repository / f"configs/{name}.toml")
    parameters = count_parameters(settings.run.model)
    assert stage_costs(settings, Layout())[0].device_bytes / 1e9 == pytest.approx(gigabytes, abs=0.05)
    assert state_bytes(settings, parameters, 8) == (6 * parameters + 12 * parameters // 8, 0)


@pytest.mark.parametrize(("content", "device", "host"), [
    (profile(stage=0), 16, 0), (profile(stage=1), 4 + 4 + 3, 0), (profile(stage=2), 4 + 4, 0), (profile(stage=3), 5, 0),
    (profile(stage=2, bf16={"enabled": True}), 2 + 4, 0), (profile(stage=3, fp16={"enabled": True}), 4.5, 0),
    (profile(stage=1, zero={"offload_optimizer": {"device": "cpu"}}), 8, 3),
    (profile(stage=2, zero={"offload_optimizer": {"device": "cpu"}}, bf16={"enabled": True}), 2, 4),
    (profile(stage=3, zero={"offload_optimizer": {"device": "cpu"}}, fp16={"enabled": True}), 0.5, 4),
])
def test_states_by_stage_precision_and_offloading(tmp_path, content, device, host):
    """Bytes per parameter with four copies."""
    settings = load_settings(*write(tmp_path, content))
    assert state_bytes(settings, 1000, 4) == (1000 * device, 1000 * host)


def test_padding_of_the_vocabulary_counts(tmp_path):
    """97 pieces on two ranks are 56 rows each."""
    settings = load_settings(*write(tmp_path, profile(2)), ["model.vocab_size=97"])
    padded = stage_costs(settings, layout_for(settings, 2))[0].parameters
    even = load_settings(*write(tmp_path, profile(2)), ["model.vocab_size=112"])
    assert padded == stage_costs(even, layout_for(even, 2))[0].parameters
