"""Settings files that no one would write: broken text with its place, values of any kind, no crash."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from patience import patient
from test_refusals import PROFILE, RUN, faults_of, load
from test_slips import as_toml

from megatron_ttl.config.deepspeed import DeepSpeedProfile
from megatron_ttl.config.describe import known_keys
from megatron_ttl.config.load import load_settings
from megatron_ttl.config.read import parse_json, parse_toml
from megatron_ttl.config.schema import RunFile
from megatron_ttl.errors import ConfigError

SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.text(),
                    st.floats(allow_nan=False, allow_infinity=False),
                    st.sampled_from(["auto", "none", "1", "bra", "a.bin", "wsd"]))
VALUES = st.recursive(SCALARS, lambda inner: st.one_of(
    st.lists(inner, max_size=3),
    st.dictionaries(st.sampled_from(["prefix", "weight", "stage", "a.b", ""]), inner, max_size=2)),
    max_leaves=4)


def changed(base, keys):
    """Draw a copy of `base` in which up to three keys have any value."""
    keys = [key for key in keys if "[]" not in key]

    def apply(changes):
        tables = copy.deepcopy(base)
        for key, value in changes:
            section, _, name = key.rpartition(".")
            table = tables.setdefault(section, {}) if section else tables
            if isinstance(table, dict):
                table[name] = value
        return tables

    return st.lists(st.tuples(st.sampled_from(keys), VALUES), min_size=1, max_size=3).map(apply)


def without_none(value):
    """TOML has no word for nothing."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value if item is not None] if isinstance(value, list) else value


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(run=changed(tomllib.loads(RUN), known_keys(RunFile)),
       profile=changed(PROFILE, known_keys(DeepSpeedProfile)))
def test_any_value_anywhere_is_taken_or_refused(tmp_path, run, profile):
    """Settings or faults of three parts on one line each; never another exception."""
    (tmp_path / "r.toml").write_text(as_toml(without_none(run)), encoding="utf-8")
    (tmp_path / "m.json").write_text(json.dumps(profile))
    try:
        loaded = load_settings(tmp_path / "m.json", tmp_path / "r.toml")
    except ConfigError as error:
        for fault in error.faults:
            assert fault.count(";") >= 2 and len(fault.splitlines()) == 1, fault
    else:
        assert json.loads(json.dumps(loaded.run.model_dump(mode="json"), allow_nan=False))


def strict_json(text):
    """Read JSON as the standard has it; None for what it refuses."""
    def pairs(items):
        if len({key for key, _ in items}) != len(items):
            raise ValueError("duplicate key")
        return dict(items)

    def constant(word):
        raise ValueError(word)

    try:
        value = json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 120), st.integers(0, 3), st.sampled_from(
    [*'{}[],:"\\#-.1 \n', "//", "/*", "*/", "NaN", "-Infinity", '"a"', '"stage": 1', "true", "null",
     "1e999", '"\\ud800"', "\0"])),
    min_size=1, max_size=3))
def test_json_is_accepted_exactly_where_the_standard_accepts_it(changes):
    """Oracle: Python's reader with duplicate keys and non-numbers refused."""
    text = json.dumps({**PROFILE, "bf16": {"enabled": True}, "_comment": ["a, b", 'c "d" // e']}, indent=1)
    for at, drop, insert in changes:
        text = text[:at] + insert + text[at + drop:]
    value, faults = parse_json(text, Path("m.json"))
    wanted = strict_json(text)
    assert bool(faults) == (wanted is None), (text, faults)
    assert wanted is None or value == wanted


@pytest.mark.parametrize(("text", "message"), [
    ('{\n  "a": 1, // one\n}', "m.json:2:11: is a comment; .* _comment"),
    ('{"a": 1 /* x */}', "m.json:1:9: is a comment"),
    ('# x\n{}', "m.json:1:1: is a comment"), ('{"a": [1,\n 2,]}', "m.json:2:3: is a comma before"),
    ('{"a": 1,\n "b": {"a": 1},\n "a": 2}', 'm.json:3:2: is the key "a" again .first in line 1.'),
    ('{"a": NaN}', "m.json:1:7: is NaN"), ('{"a": -Infinity}', "m.json:1:7: is -Infinity"),
    ('{"a": 1 "b": 2}', "m.json:1:9: Expecting ',' delimiter"),
    ("[1]", "holds .1.; it must hold one JSON object"),
    ('{"a": "x}', "m.json:1:7: Unterminated string"), ('{"a": "\\ud800"}', "half a character"),
    ('{"a": ' * 100_000, "m.json: .*recursion"), ('{"a": ' + "9" * 5_000 + "}", "m.json: .*digits"),
])
def test_broken_json_is_shown_its_place(text, message):
    """Line and column of each fault, in JSON's own terms."""
    with pytest.raises(ConfigError, match=message.replace("_comment", '"_comment"')):
        raise ConfigError(*parse_json(text, Path("m.json"))[1])


@pytest.mark.parametrize(("text", "message"), [
    ("[run]\ndir = runs", "r.toml:2:7: Invalid value"), ("[run]\n[run]", "r.toml:2:5: Cannot declare"),
    ('a = 1\na = 2\n', "r.toml:2:6: Cannot overwrite"),
    ("a = [1", "r.toml: .*Unclosed array|r.toml: .*end of document"),
    ("a = " + "[" * 100_000, "r.toml: .*recursion"), ("a = " + "9" * 5_000, "r.toml: .*digits"),
])
def test_broken_toml_is_shown_its_place(text, message):
    """Line and column of the fault."""
    with pytest.raises(ConfigError, match=message):
        raise ConfigError(*parse_toml(text, Path("r.toml"))[1])


@pytest.mark.parametrize(("overrides", "message"), [
    (["train.steps=none"], "train.steps: is missing, and so is train.tokens"),
    (["train.steps=5 6"], "whole number"),
    (["optimizer.lr=none"], 'is "none"; must be a number'),
    (["train.steps=1", "train.steps=1"], "is given twice"),
    (["train.steps="], "has no value"),
    (["data.sources=[{prefix=x}]"], "must be TOML"),
    (["model=3"], "whole section"),
    (["run.dir=\"a\"\nrun.seed=3"], "more than one value|must be TOML"),
    (["run.seed=2020-01-01"], "is a date or time"),
    (["optimizer.lr=1e-400"], "is 0.0; must be a number > 0"),
    (['run.dir="a\\u0000"'], "must be a path of printable"),
    (['run.dir=" "'], "must be a path of printable"), (["--steps"], "is no override"),
    (["train.steps=9223372036854775807"], "must be fewer than 2.63"),
    (["energy.enabled=False"], "write false, without quotes"),
    (["run.dir=7"], 'write "7", in quotes'),
    (["train.steps=1e3"], "is 1000.0; must be a whole number > 0; write 1000"),
    (["run.start_from=runs/x/checkpoints/step-00000001"], "lies in run.dir"),
    (["train.steps=true"], "is true; must be a whole"),
    (['evaluation.prefixes=["data/h", "data/./h"]', "evaluation.every_steps=5"], "already evaluation"),
    (['data.sources=[{prefix="data/pt.bin"}]'], 'write "data/pt"'),
    (['evaluation.prefixes=["h"]', "evaluation.every_steps=5", "evaluation.max_tokens=10"],
     "at least one sample"),
])
def test_overrides_that_do_not_work(tmp_path, overrides, message):
    """What a shell and a tired user can type."""
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, overrides=overrides)


def test_none_takes_an_optional_key_away(tmp_path):
    """A run given in steps becomes one given in tokens, visibly."""
    loaded = load(tmp_path, overrides=["train.steps=none", "train.tokens=51200"])
    assert loaded.run.train.steps is None and loaded.run.total_steps == 100
    assert loaded.origins["train.steps"] == loaded.origins["train.tokens"] == "command line"


@pytest.mark.parametrize(("change", "message"), [
    ({"zero_optimization": {"stage": True}}, "stage: is true; must be a whole number"),
    ({"zero_optimization": {"stage": "1"}}, "write it without quotes"),
    ({"zero_optimization": 1}, "must be a table"),
    ({"zero_optimization": {"stage": 1, "reduce_bucket_size": 5e8}}, "is 500000000.0; .* write 500000000"),
    ({"communication_data_type": "bf16"}, "in an fp32 run"), ({"_comment": 3}, "is neither text nor a list"),
    ({"_device": 3}, "must name the accelerator"),
    ({"train_batch_size": 8}, "train.tokens_per_step of the run file owns it"),
    ({"parallel": {"pipeline": 0}}, "parallel.pipeline: is 0; must be"),
    ({"wandb": {}}, "log.wandb of the run file"),
    ({"zero_optimization": {"stage": 3, "mics_shard_size": 8}}, "was removed from DeepSpeed in 0.19.8"),
    ({"bf16.enabled": True}, "did you mean 'bf16.enabled'"), ({"a\nb": 1}, r'"a\\nb": is not a key'),
])
def test_profiles_that_do_not_work(tmp_path, change, message):
    """Numbers as truth values, DeepSpeed's own ways of writing, other owners' keys."""
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, profile={**PROFILE, **change})


def test_auto_null_and_notes_are_taken(tmp_path):
    """What profiles of other programs carry without saying anything."""
    auto = dict.fromkeys(["optimizer", "scheduler", "gradient_clipping", "train_batch_size"], "auto")
    notes = {"_comment": ["why"], "_device": "NVIDIA A100-SXM4-40GB", "bf16": None}
    loaded = load(tmp_path, profile={**PROFILE, **auto, **notes})
    assert loaded.device == "NVIDIA A100-SXM4-40GB" and loaded.profile.precision == "fp32"


def test_a_fault_in_one_key_hides_no_rule_between_others(tmp_path):
    """A wrong learning rate silences the rules about it, and only these."""
    overrides = ["optimizer.lr=fast", "schedule.min_lr=1e-2", "model.num_key_value_heads=3"]
    faults = faults_of(tmp_path, overrides=overrides)
    assert len(faults) == 2 and any("num_key_value_heads" in fault for fault in faults), faults


def test_loading_is_quick_and_needs_no_torch():
    """Both files, in a fresh interpreter; the bound has room for a busy machine (measured: 0.2 s)."""
    script = ("import sys, time; t = time.perf_counter(); import megatron_ttl.config.load; "
              "assert not {'torch', 'deepspeed'} & set(sys.modules); print(time.perf_counter() - t)")
    command = [sys.executable, "-c", script]
    times = [float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
             for _ in range(3)]
    assert min(times) <= patient(0.5), times


def test_another_kind_of_file_is_not_explained_to_its_end(tmp_path):
    """Thousands of wrong keys: two thousand are named, and no rule is applied to the rest."""
    faults = faults_of(tmp_path, text="".join(f"step{number} = 1\n" for number in range(3_000)))
    assert len(faults) < 2_020 and "..: are more keys that are wrong; must be those of the schema; " in faults[-1]


@pytest.mark.parametrize("section", ["bf16", "fp16", "data_types", "parallel"])
def test_a_section_that_is_null_is_no_section(tmp_path, section):
    """Alone, and beside a fault of another key, when the settings are built from what is right."""
    load(tmp_path, profile={**PROFILE, section: None})
    with pytest.raises(ConfigError) as error:
        load(tmp_path, profile={**PROFILE, section: None, "train_micro_batch_size_per_gpu": 0})
    assert len(error.value.faults) == 1 and "train_micro_batch_size_per_gpu" in error.value.faults[0]
