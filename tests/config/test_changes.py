"""What a resumed run may change: every key of both files, and what a user does with --allow-change."""

from __future__ import annotations

import copy
import json
import re

import pytest
from test_refusals import PROFILE, RUN, load

from megatron_ttl.config.changes import _TABLE, CONTENT_KEYS, InForce, compare, refusals, rule_of
from megatron_ttl.config.deepspeed import DeepSpeedProfile
from megatron_ttl.config.describe import walk
from megatron_ttl.config.schema import RunFile
from megatron_ttl.errors import ConfigError

CONTENT = {"data.sources[0].content": "xxh3:a", "data.tokenizer": "xxh3:t"}
BF16, FP16 = {"bf16": {"enabled": True}}, {"fp16": {"enabled": True}}


def values(model):
    """Return the keys of a schema that hold a value; those of tables in lists too."""
    return {key for key, _, leaf in walk(model) if leaf}


def test_every_key_has_a_verdict():
    """A new key without one makes this red, and the run would not go on: none is allowed by oversight."""
    missing = {key for model in (RunFile, DeepSpeedProfile) for key in values(model) if rule_of(key) is None}
    assert missing == set(), f"say in config/changes.py what a change of {sorted(missing)} does"


def test_the_table_names_keys_that_are_there_and_each_once():
    named = [key for _, _, keys in _TABLE for key in keys.split()]
    sections = {key.removesuffix(".*") for key in named if key.endswith(".*")}
    assert len(named) == len(set(named))
    keys = set(named) - {f"{name}.*" for name in sections} - set(CONTENT_KEYS)
    assert keys <= values(RunFile) | values(DeepSpeedProfile)
    # A section is free as a whole only where no key of it can ever touch the curve.
    assert sections == {"evaluation", "log", "energy", "checkpoint", "watchdog", "data_loader", "kernels"}


def in_force(settings, content=CONTENT):
    return InForce(settings.run.model_dump(mode="json"), settings.profile.model_dump(mode="json"), content)


def changes(folder, overrides=(), profile=None, allow=(), start=(), start_profile=None, content=CONTENT):
    """Compare a run begun with `start` with one of `overrides`."""
    before = in_force(load(folder, overrides=start, profile={**PROFILE, **(start_profile or {})}))
    now = load(folder, overrides=overrides, profile={**PROFILE, **(profile or {})})
    return compare(before, in_force(now, content), allow), now


RUN_CHANGES = {
    "allowed": ["run.dir=moved", "log.every_steps=3", "log.wandb=offline", "log.wandb_project=p",
                "energy.enabled=false",
                "energy.country_iso_code=PRT", "energy.measure_power_s=5.0", "checkpoint.every_steps=7",
                "checkpoint.keep_last=9", "checkpoint.keep_every_steps=20"],
    "confirm": ["train.steps=200", "train.tokens_per_step=1024", "train.gradient_clipping=1.0", "optimizer.lr=2e-3",
                "data.document_mask=true",
                "optimizer.betas=[0.9, 0.99]", "optimizer.eps=1e-6", "optimizer.weight_decay=0.2",
                "optimizer.decay_norms=true", "optimizer.decay_embeddings=false", "schedule.warmup_steps=5",
                "schedule.min_lr=1e-5", "schedule.kind=constant"],
    "forbidden": ["run.seed=1", "run.start_from=other", "model.hidden_size=128", "model.intermediate_size=256",
                  "model.num_hidden_layers=3", "model.num_attention_heads=2", "model.num_key_value_heads=1",
                  "model.vocab_size=600", "model.max_position_embeddings=256", "model.rms_norm_eps=1e-5",
                  "model.rope_theta=500000.0", "model.init=tinyllama", "train.sequence_length=32",
                  "data.packing=best_fit"],
}
PROFILE_CHANGES = [
    ("allowed", "train_micro_batch_size_per_gpu", {"train_micro_batch_size_per_gpu": 4}, {}),
    *(("allowed", f"zero_optimization.{key}", {"zero_optimization": {"stage": 1, key: value}}, {}) for key, value in (
        ("stage", 3), ("overlap_comm", True), ("contiguous_gradients", False), ("reduce_scatter", False),
        ("reduce_bucket_size", 7), ("allgather_bucket_size", 7), ("stage3_prefetch_bucket_size", 7),
        ("stage3_param_persistence_threshold", 7), ("stage3_max_live_parameters", 7))),
    ("allowed", "zero_optimization.offload_optimizer.device",
     {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}, {}),
    ("allowed", "parallel.tensor", {"parallel": {"tensor": 2}}, {}),
    ("allowed", "parallel.pipeline", {"parallel": {"pipeline": 2}}, {}),
    ("allowed", "parallel.replica_check_steps", {"parallel": {"replica_check_steps": None}}, {}),
    ("allowed", "recompute", {"recompute": "full"}, {}),
    ("allowed", "engine", {"engine": "flat"}, {}), ("allowed", "compile", {"compile": True}, {}),
    ("allowed", "cuda_graphs", {"cuda_graphs": False}, {}),
    ("allowed", "kernels.adamw", {"kernels": {"adamw": "torch"}}, {"kernels": {"adamw": "cuda"}}),
    ("allowed", "wall_clock_breakdown", {"wall_clock_breakdown": True}, {}),
    ("confirm", "bf16.enabled", BF16, {}), ("confirm", "fp16.enabled", FP16, {}),
    ("confirm", "bf16.enabled", {}, BF16), ("confirm", "fp16.enabled", {}, FP16),
    ("confirm", "communication_data_type", {**BF16, "communication_data_type": "bf16"}, BF16),
    ("confirm", "fp16.loss_scale_window", {"fp16": {"enabled": True, "loss_scale_window": 9}}, FP16),
    ("confirm", "fp16.hysteresis", {"fp16": {"enabled": True, "hysteresis": 9}}, FP16),
    ("confirm", "fp16.min_loss_scale", {"fp16": {"enabled": True, "min_loss_scale": 9.0}}, FP16),
    ("allowed", "fp16.initial_scale_power", {"fp16": {"enabled": True, "initial_scale_power": 9}}, FP16),
]


@pytest.mark.parametrize(("verdict", "override"), [(v, o) for v, overrides in RUN_CHANGES.items() for o in overrides])
def test_a_changed_key_of_the_run_file(tmp_path, verdict, override):
    """One row with both values; refused unless allowed, and the flag helps exactly where confirming is the rule."""
    key = override.partition("=")[0]
    (change,), now = changes(tmp_path, [override])
    assert (change.field, change.verdict, change.refused) == (key, verdict, verdict != "allowed")
    assert change.old != change.new
    (confirmed,), _ = changes(tmp_path, [override], allow=[key])
    assert confirmed.refused is (verdict == "forbidden")
    (by_section,), _ = changes(tmp_path, [override], allow=[key.partition(".")[0]])
    assert by_section.refused is (verdict == "forbidden")
    faults = refusals([change], now)
    assert len(faults) == (verdict != "allowed") and all(fault.count(";") >= 2 for fault in faults)
    assert all(fault.startswith(f"command line: {key}: was ") for fault in faults)
    assert verdict != "confirm" or f"add --allow-change {key}" in faults[0]
    assert verdict != "forbidden" or ("--allow-change" not in faults[0] and "another run" in faults[0])


@pytest.mark.parametrize(("verdict", "key", "now", "start"), PROFILE_CHANGES)
def test_a_changed_key_of_the_deepspeed_json(tmp_path, verdict, key, now, start):
    """The layout is free; the number format is not."""
    (change,), settings = changes(tmp_path, profile=now, start_profile=start)
    assert (change.field, change.verdict) == (key, verdict)
    assert all("m.json" in fault and f"--allow-change {key}" in fault for fault in refusals([change], settings))
    (confirmed,), _ = changes(tmp_path, profile=now, start_profile=start, allow=[key])
    assert not confirmed.refused


def test_enough_fields_are_tried():
    tried = {o.partition("=")[0] for overrides in RUN_CHANGES.values() for o in overrides}
    assert len(tried | {row[1] for row in PROFILE_CHANGES}) >= 50


def test_fp16_for_bf16_is_two_rows_and_its_scale_none(tmp_path):
    """A section that says nothing in the other precision does not count."""
    scale = {"fp16": {"enabled": True, "loss_scale_window": 9}}
    found, _ = changes(tmp_path, profile=scale, start_profile=BF16)
    assert [change.field for change in found] == ["bf16.enabled", "fp16.enabled"]
    for off in ({"bf16": None}, {"bf16": {"enabled": False}}, {"fp16": {"enabled": False}}, {"parallel": {}},
                {"parallel": None, "data_types": {"grad_accum_dtype": "fp32"}}):
        assert changes(tmp_path, profile=off)[0] == [], off


@pytest.mark.parametrize(("start", "now"), [
    ([], ["train.steps=none", "train.tokens=51200"]),
    (["train.steps=none", "train.tokens=51200"], []),
    ([], ["schedule.warmup_steps=none", "schedule.warmup_tokens=5120"]),
    (["schedule.kind=wsd", "schedule.decay_steps=20"], ["schedule.kind=wsd", "schedule.decay_tokens=10240"]),
    (['data.sources=[{prefix="a", weight=1}, {prefix="b", weight=3}]'],
     ['data.sources=[{prefix="a", weight=2.0}, {prefix="b", weight=6.0}]']),
])
def test_the_same_said_otherwise_is_allowed(tmp_path, start, now):
    """A length in tokens that was one in steps, weights of the same shares: shown, and not refused."""
    found, _ = changes(tmp_path, now, start=start)
    assert found and {change.verdict for change in found} == {"allowed"}, found


def test_another_length_in_tokens_is_no_other_word_for_the_same(tmp_path):
    found, _ = changes(tmp_path, ["train.steps=none", "train.tokens=102400"])
    told = [(change.field, change.verdict) for change in found]
    assert told == [("train.steps", "confirm"), ("train.tokens", "confirm")]


@pytest.mark.parametrize(("length", "refused"), [
    ([], False), (["train.steps=none", "train.tokens=102400"], True),
    (["schedule.warmup_steps=none", "schedule.warmup_tokens=10240"], True)])
def test_another_batch_and_a_length_in_tokens(tmp_path, length, refused):
    """Tokens over the new batch would count the steps so far wrong; given in steps, a confirmed change goes through."""
    found, now = changes(tmp_path, [*length, "train.tokens_per_step=1024"], start=length, allow=["train", "schedule"])
    faults = refusals(found, now)
    assert bool(faults) is refused
    for fault in faults:
        assert re.search(r"was 512 .*1,024.*the steps so far had 512 tokens.*turn (train|schedule)\.\w+ to "
                         r"(train|schedule)\.\w*steps", fault), fault


TWO = 'data.sources=[{prefix="a", weight=1}, {prefix="b", weight=3}]'


@pytest.mark.parametrize(("now", "field"), [
    ('data.sources=[{prefix="a", weight=1}]', "data.sources"), (TWO.replace("3", "2"), "data.sources[1].weight"),
    (TWO.replace('"a", weight=1', '"b", weight=1').replace('"b", weight=3', '"a", weight=3'), "data.sources[0].prefix"),
    (TWO.replace('"a"', '"c"'), "data.sources[0].prefix")])
def test_other_sources_are_another_order(tmp_path, now, field):
    """Fewer, other shares, another sequence, another path of which nobody knows the content."""
    found, settings = changes(tmp_path, [now], start=[TWO], content={})
    assert found[0].field == field and {change.verdict for change in found} == {"forbidden"}
    assert "command line: data.sources" in refusals(found, settings)[0]


def test_data_are_known_by_their_content(tmp_path):
    """Moved: allowed. Other tokens under the same path, or another tokenizer: forbidden, whatever is confirmed."""
    moved = ['data.sources=[{prefix="elsewhere/pt"}]']
    (change,), _ = changes(tmp_path, moved)
    assert (change.field, change.verdict) == ("data.sources[0].prefix", "allowed")
    for name in CONTENT:
        found, settings = changes(tmp_path, content={**CONTENT, name: "xxh3:z"}, allow=["data"])
        assert [(c.field, c.verdict) for c in found] == [(name, "forbidden")]
        assert 'was "xxh3:' in refusals(found, settings)[0]
    found, _ = changes(tmp_path, moved, content={**CONTENT, "data.sources[0].content": "xxh3:z"})
    assert {change.verdict for change in found} == {"forbidden"} and len(found) == 2


def test_what_an_older_release_did_not_write_stood_at_its_default(tmp_path):
    """Golden settings keep their meaning when keys are added; a key off its default is a change then too."""
    now = load(tmp_path)
    older = copy.deepcopy(now.run.model_dump(mode="json"))
    for section, key in (("model", "init"), ("optimizer", "decay_norms"), ("optimizer", "betas"), ("train", "tokens"),
                         ("checkpoint", "keep_last"), ("schedule", "min_lr")):
        del older[section][key]
    del older["log"], older["evaluation"]
    profile = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}}
    assert compare(InForce(older, profile, {}), in_force(now)) == []
    assert compare(InForce(older, None, {}), in_force(load(tmp_path, profile={**PROFILE, **BF16}))) == []
    changed = load(tmp_path, overrides=["optimizer.betas=[0.9, 0.99]"])
    (change,) = compare(InForce(older, profile, {}), in_force(changed))
    assert (change.field, change.old, change.verdict) == ("optimizer.betas", [0.9, 0.95], "confirm")


def test_what_a_newer_release_wrote_is_not_dropped(tmp_path):
    """A setting that this release cannot keep to is named; one that says nothing is no matter."""
    now = load(tmp_path)
    newer = copy.deepcopy(in_force(now))
    newer.run["train"] |= {"curriculum": "linear", "noise": None}
    newer.profile["offload"] = {"device": "disk"}
    found = compare(newer, in_force(now))
    assert [(change.field, change.verdict) for change in found] == [("train.curriculum", "forbidden"),
                                                                    ("offload", "forbidden")]
    assert "does not know the setting" in refusals(found, now)[0]


@pytest.mark.parametrize(("name", "message"), [
    ("optimizer.lrr", r"is no setting; .*did you mean 'optimizer.lr'\?"), ("lr", "did you mean 'optimizer.lr'"),
    ("optimiser", "did you mean 'optimizer'"), ("train.weight_decay", "did you mean 'optimizer.weight_decay'"),
    ("bf16.enabld", "did you mean 'bf16.enabled'"), ("", "is no setting; .*e.g. optimizer.lr"),
    ("zzz", "e.g. optimizer.lr or optimizer"), ("optimizer.lr=3", "did you mean 'optimizer.lr'"),
    ("model.hidden_size", "may not change within a run; .*this shape.*; remove the flag"),
    ("model", "may not change within a run"), ("run.seed", "order of the data"), ("data.sources", "may not change"),
    ("data.packing", "may not change"),
    ("data.sources[0].weight", "may not change"), ("data.tokenizer", "other pieces"),
    ("train.sequence_length", "of this length"),
])
def test_a_flag_that_cannot_help_is_refused(tmp_path, name, message):
    """With the other faults, before anything is opened."""
    (tmp_path / "m.json").write_text(json.dumps(PROFILE))
    (tmp_path / "r.toml").write_text(RUN)
    from megatron_ttl.config.load import load_settings

    with pytest.raises(ConfigError, match=message) as error:
        load_settings(tmp_path / "m.json", tmp_path / "r.toml", ["log.wandb=on"], [name, "optimizer"])
    assert len(error.value.faults) == 2 and error.value.faults[1].startswith(f"command line: --allow-change {name}: ")
    settings = load_settings(tmp_path / "m.json", tmp_path / "r.toml", [], ["optimizer", "train", "log.every_steps"])
    assert settings.allow_changes == ("optimizer", "train", "log.every_steps")
