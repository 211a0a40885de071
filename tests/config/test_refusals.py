"""What the two files may not say: every key misspelt, sixty contradictions, twenty-two broken DeepSpeed profiles."""

from __future__ import annotations

import json
import re

import pytest
from small_settings import PROFILE, RUN

from megatron_ttl.config.deepspeed import DeepSpeedProfile
from megatron_ttl.config.describe import leaf_keys
from megatron_ttl.config.load import load_settings
from megatron_ttl.config.schema import RunFile
from megatron_ttl.errors import ConfigError


def load(folder, profile=None, text=RUN, overrides=()):
    (folder / "m.json").write_text(profile if isinstance(profile, str) else json.dumps(profile or PROFILE))
    (folder / "r.toml").write_text(text)
    return load_settings(folder / "m.json", folder / "r.toml", list(overrides))


def faults_of(folder, **options):
    with pytest.raises(ConfigError) as error:
        load(folder, **options)
    return error.value.faults


def misspellings(name):
    """Return the four slips: a letter dropped, two swapped, another case."""
    middle = len(name) // 2
    swapped = name[: middle - 1] + name[middle] + name[middle - 1] + name[middle + 1 :]
    return [slip for slip in (name[:middle] + name[middle + 1 :], swapped, name.upper()) if slip != name]


def test_a_clean_pair_has_no_fault(tmp_path):
    """Values, defaults and origins."""
    settings = load(tmp_path, overrides=["optimizer.lr=2e-3", 'data.sources=[{prefix="data/b", weight=0.5}]',
                                         "run.dir=runs/bare-word"])
    assert settings.run.optimizer.lr == 2e-3 and settings.run.run.dir == "runs/bare-word"
    assert settings.run.data.sources[0].prefix == "data/b"
    assert settings.origins["optimizer.lr"] == "command line" and settings.origins["optimizer.eps"] == "default"
    with pytest.raises(Exception, match="frozen"):
        settings.run.train.steps = 5


def test_every_key_misspelt_is_refused_with_the_right_word(tmp_path):
    """Each key of the run file, as an override: at least 95 % of the slips name the key that was meant."""
    right, total, missed = 0, 0, []
    for key in leaf_keys(RunFile):
        section, name = key.rsplit(".", 1)
        for slip in misspellings(name):
            total += 1
            faults = faults_of(tmp_path, overrides=[f"{section}.{slip}=1"])
            told = any(slip in fault and f"'{key}'" in fault for fault in faults)
            right += told
            missed += [] if told else [(slip, faults[:1])]
    assert total > 100 and right / total >= 0.95, missed


def test_every_key_of_the_profile_misspelt_is_refused_with_the_right_word(tmp_path):
    """The same for the DeepSpeed JSON, where DeepSpeed itself accepts every slip at the top."""
    right, total, missed = 0, 0, []
    for key in leaf_keys(DeepSpeedProfile):
        *sections, name = key.split(".")
        for slip in misspellings(name):
            profile = json.loads(json.dumps(PROFILE))
            table = profile
            for section in sections:
                table = table.setdefault(section, {})
            table[slip] = 1
            total += 1
            told = any(slip in fault and f"'{key}'" in fault for fault in faults_of(tmp_path, profile=profile))
            right += told
            missed += [] if told else [slip]
    assert total > 30 and right / total >= 0.95, missed


def test_a_key_in_the_wrong_section_is_told_the_right_one(tmp_path):
    """lr under [train], steps under [optimizer], a run-file key in the JSON."""
    assert any("optimizer.lr" in f for f in faults_of(tmp_path, overrides=["train.lr=1"]))
    assert any("train.steps" in f for f in faults_of(tmp_path, overrides=["optimizer.steps=1"]))
    faults = faults_of(tmp_path, profile={**PROFILE, "train": {"tokens_per_step": 1}})
    assert any("belongs to the run file, as train" in f for f in faults)


CONTRADICTIONS = [
    ("model.num_attention_heads=7", "num_attention_heads"), ("model.num_key_value_heads=3", "must divide"),
    ("model.hidden_size=66", "hidden_size"), ("model.num_attention_heads=64", "head"),
    ("model.hidden_size=0", "> 0"), ("model.num_hidden_layers=-1", "> 0"), ("model.vocab_size=2", "vocab_size"),
    ("model.vocab_size=1.5", "whole number"), ("model.rms_norm_eps=0", ">= 1e-38"), ("model.rope_theta=0.5", "> 1"),
    ("model.tie_word_embeddings=true", "tie_word_embeddings"), ("model.init=xavier", "tinyllama"),
    ("model.hidden_size=\"64\"", "without quotes"), ("model.hidden_size=true", "whole number"),
    ("model.max_position_embeddings=32", "max_position_embeddings"),
    ("train.sequence_length=256", "max_position_embeddings"), ("train.sequence_length=0", "> 0"),
    ("train.tokens_per_step=500", "448.*512|512.*448"), ("train.tokens_per_step=0", "> 0"),
    ("train.tokens=51200", "steps and tokens|tokens and steps|one of"), ("train.steps=0", "> 0"),
    ("train.steps=1.5", "whole number"), ("train.steps=many", "whole number"), ("train.steps=5", "warmup"),
    ("train.gradient_clipping=-1", ">= 0"), ("train.gradient_clipping=nan", "finite"),
    ("optimizer.lr=0", "> 0"), ("optimizer.lr=-1e-3", "> 0"), ("optimizer.lr=1", "< 1"),
    ("optimizer.lr=fast", "number"),
    ("optimizer.lr=inf", "finite"), ("optimizer.betas=[0.9]", "2 numbers"), ("optimizer.betas=[0.9, 1.0]", "betas"),
    ("optimizer.betas=[-0.1, 0.9]", "betas"), ("optimizer.eps=0", ">= 1e-38"), ("optimizer.weight_decay=-1", ">= 0"),
    ("optimizer.decay_norms=1", "true or false"), ("schedule.kind=linear", "cosine"),
    ("schedule.kind=wsd", "decay_steps"), ("schedule.decay_steps=10", "wsd"), ("schedule.min_lr=1e-3", "lower"),
    ("schedule.min_lr=-1", ">= 0"), ("schedule.warmup_steps=100", "warmup"), ("schedule.warmup_steps=-1", ">= 0"),
    ("schedule.warmup_tokens=512", "warmup"), ("schedule.decay_shape=exp", "sqrt"),
    ("checkpoint.every_steps=0", "> 0"), ("checkpoint.keep_last=0", ">= 1"),
    ("checkpoint.keep_every_steps=15", "multiple"),
    ("evaluation.every_steps=5", "prefixes"), ('evaluation.prefixes=["data/h"]', "every_steps"),
    ('evaluation.prefixes=["data/pt"]', "data/pt"), ("evaluation.max_tokens=0", "> 0"),
    ("data.sources=[]", "sources"), ('data.sources=[{prefix="a", weight=0}]', "> 0"),
    ('data.sources=[{weight=1.0}]', "prefix"), ('data.sources=[{prefix="a"}, {prefix="a"}]', "a"),
    ("data.sources=data/pt", "list"), ("energy.country_iso_code=Brazil", "ISO 3166"),
    ("energy.country_iso_code=bra", "BRA"), ("energy.measure_power_s=0", "> 0"), ("log.every_steps=0", "> 0"),
    ("log.wandb=maybe", "offline"), ("run.seed=-1", ">= 0"), ('run.dir=""', "not empty"),
    ("run=5", "section.key=value"),
    ("nonsense", "key=value|="), ("bf16.enabled=true", "DeepSpeed|JSON"),
]


@pytest.mark.parametrize(("override", "message"), CONTRADICTIONS, ids=[override for override, _ in CONTRADICTIONS])
def test_a_wrong_value_is_refused_with_what_to_do(tmp_path, override, message):
    """More than sixty, each with its place and its cure on one line."""
    faults = faults_of(tmp_path, overrides=[override])
    assert any(re.search(message, fault) for fault in faults), faults
    assert all(fault.count(";") >= 2 and "\n" not in fault and len(fault) < 400 for fault in faults), faults


BAD_PROFILES = [
    {"gradient_cliping": 1.0}, {"gradient_acumulation_steps": 2}, {"zero_optimisation": {"stage": 1}}, {"bf_16": {}},
    {"optimzer": {}}, {"wall_clock_breakdwn": True}, {"seeed": 1},
    {"optimizer": {"type": "AdamW", "params": {"lr": "fast"}}},
    {"optimizer": {"type": "AdamW", "params": {"lr": -1}}}, {"gradient_clipping": "abc"}, {"gradient_clipping": 1.0},
    {"gradient_accumulation_steps": 2.5}, {"gradient_accumulation_steps": 0}, {"train_batch_size": 7},
    {"zero_optimization": {"stage": 7}}, {"zero_optimization": {"stage": 1, "overlap_com": True}},
    {"fp16": {"enabled": True}, "bf16": {"enabled": True}}, {"fp16": {"enabled": True, "loss_scale": 0}},
    {"fp16": {"enabled": True}, "zero_optimization": {"stage": 0}},
    {"parallel": {"pipeline": 2}, "zero_optimization": {"stage": 2}}, {"recompute": "some"},
    {"bf16": {"enabled": True}, "zero_optimization": {"stage": 0}}, {"train_micro_batch_size_per_gpu": "auto"},
    {"scheduler": {"type": "WarmupLR"}}, {"parallel": {"tensor": 3}}, {"data_types": {"grad_accum_dtype": "bf16"}},
    {"elasticity": {"enabled": True}}, {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "nvme"}}},
    {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
]


@pytest.mark.parametrize("change", BAD_PROFILES, ids=lambda change: json.dumps(change)[:50])
def test_a_broken_profile_is_refused(tmp_path, change):
    """DeepSpeed 0.19.8 takes sixteen of twenty-two such files without a word."""
    faults = faults_of(tmp_path, profile={**PROFILE, **change})
    assert all("m.json" in fault and fault.count(";") >= 2 for fault in faults), faults


@pytest.mark.parametrize(("options", "message"), [
    ({"profile": '{"zero_optimization": {"stage": 1}, "zero_optimization": {"stage": 2}}'}, "twice|duplicate|two"),
    ({"profile": '{"train_micro_batch_size_per_gpu": NaN}'}, "NaN"), ({"profile": "{"}, "m.json"),
    ({"profile": "[1]"}, "m.json"), ({"text": RUN + "\n[run"}, r"r.toml"),
    ({"text": " \n"}, "r.toml: is empty; it must be a run file in TOML"),
    ({"profile": " "}, "m.json: is empty; it must be a DeepSpeed configuration"),
    ({"text": "[run]\ndir = 'x'\n"}, "model: is missing"),
])
def test_broken_files_are_named(tmp_path, options, message):
    """Duplicate keys, numbers that are none, text that is neither TOML nor JSON."""
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, **options)


def test_all_faults_of_both_files_come_at_once(tmp_path):
    """Two of the run file, two of the profile, one override; missing files both."""
    faults = faults_of(tmp_path, profile={"train_micro_batch_size_per_gpu": 0, "zero_optimization": {"stag": 1}},
                       text=RUN.replace("warmup_steps = 10", "warmup_step = 10").replace("lr = 1e-3", "lr = 3"),
                       overrides=["log.wandb=on"])
    text = "\n".join(faults)
    for part in ("warmup_step", "optimizer.lr", "train_micro_batch_size_per_gpu", "zero_optimization.stag",
                 "log.wandb"):
        assert part in text
    with pytest.raises(ConfigError) as error:
        load_settings(tmp_path / "none.json", tmp_path / "none.toml")
    assert len(error.value.faults) == 2
