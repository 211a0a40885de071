"""Every slip at every letter of every key, every key in every wrong section: which key is the user told?"""

from __future__ import annotations

import json
import tomllib
from collections import defaultdict

import pytest
from test_refusals import PROFILE, RUN

from megatron_ttl.config.deepspeed import DeepSpeedProfile
from megatron_ttl.config.describe import known_keys
from megatron_ttl.config.load import load_settings
from megatron_ttl.config.schema import RunFile
from megatron_ttl.config.suggest import edit_distance, nearest_keys
from megatron_ttl.errors import ConfigError


def slips(name):
    """Yield (kind, misspelt name): each letter dropped, each pair swapped, two other cases."""
    for i in range(len(name)):
        yield "dropped letter", name[:i] + name[i + 1:]
        if i:
            yield "swapped letters", name[: i - 1] + name[i] + name[i - 1] + name[i + 1:]
    yield "case", name.upper()
    yield "case", name.capitalize()


def wrong_keys(model):
    """Return {wrong key: {(kind, key that was meant)}} for a schema; a slip may be near to two keys."""
    keys = known_keys(model)
    sections = {key.rpartition(".")[0] for key in keys} - {"data.sources[]", "data.stages[]"}
    wrong = defaultdict(set)
    for key in keys:
        section, _, name = key.rpartition(".")
        if section not in sections:
            continue
        for kind, slip in slips(name):
            wrong[f"{section}.{slip}" if section else slip].add((kind, key))
        for other in sections - {section}:
            wrong[f"{other}.{name}" if other else name].add(("wrong section", key))
    return {path: meant for path, meant in wrong.items() if path not in keys and path.rpartition(".")[2]}


def plant(tables, paths):
    """Put 1 under each dotted path."""
    for path in paths:
        table = tables
        *sections, name = path.split(".")
        for section in sections:
            table = table.setdefault(section, {})
        if name not in table:
            table[name] = 1
    return tables


def as_toml(tables):
    """Write nested tables as TOML; inline, so that any key may stand anywhere."""
    def inline(value):
        if isinstance(value, dict):
            return "{" + ", ".join(f'"{k}" = {inline(v)}' for k, v in value.items()) + "}"
        return "[" + ", ".join(map(inline, value)) + "]" if isinstance(value, list) else json.dumps(value)

    return "\n".join(f'"{key}" = {inline(value)}' for key, value in tables.items())


def measure(model, faults):
    """Return how many slips were told the right key, by kind."""
    told = {fault.split(": ")[1]: fault for fault in faults}
    right, total = defaultdict(int), defaultdict(int)
    for path, meant in wrong_keys(model).items():
        for kind, key in meant:
            total[kind] += 1
            fault = told.get(path, "")
            right[kind] += f"'{key}'" in fault or f"as {key};" in fault
    return {kind: (right[kind], total[kind]) for kind in total}


@pytest.mark.parametrize("model", [RunFile, DeepSpeedProfile])
def test_the_key_that_was_meant_is_named(tmp_path, model):
    """All slips in one file, refused in one go; at least 95 of 100 of each kind name the right key."""
    run, profile = tomllib.loads(RUN), json.loads(json.dumps(PROFILE))
    plant(run if model is RunFile else profile, wrong_keys(model))
    (tmp_path / "r.toml").write_text(as_toml(run))
    (tmp_path / "m.json").write_text(json.dumps(profile))
    with pytest.raises(ConfigError) as error:
        load_settings(tmp_path / "m.json", tmp_path / "r.toml")
    figures = measure(model, error.value.faults)
    assert set(figures) == {"dropped letter", "swapped letters", "case", "wrong section"}
    assert all(right >= 0.95 * total for right, total in figures.values()), figures
    assert sum(total for _, total in figures.values()) > (1_500 if model is RunFile else 500)


@pytest.mark.parametrize(("path", "message"), [
    ("gradient_clipping", r"must stand in \[train\]; did you mean 'train.gradient_clipping'"),
    ("train_batch_size", "did you mean 'train.tokens_per_step'"),
    ("learning_rate", "did you mean 'optimizer.lr'"),
    ("model.num_layers", "did you mean 'model.num_hidden_layers'"),
    ("train.seq_length", "'train.sequence_length'"),
    ("every_steps", "'evaluation.every_steps' or 'checkpoint.every_steps' or 'log.every_steps'"),
    ("train.micro_batch", "one of sequence_length, tokens_per_step, steps, tokens, gradient_clipping"),
    ("zero_optimization.stage", "belongs to the DeepSpeed JSON, as zero_optimization.stage"),
    ("model.train_micro_batch_size_per_gpu", "to the DeepSpeed JSON, as train_micro_batch_size_per_gpu"),
])
def test_names_from_elsewhere_are_led_home(tmp_path, path, message):
    """Other names, keys of the other file, a key of three sections; never sent to a file that refuses it."""
    (tmp_path / "m.json").write_text(json.dumps(PROFILE))
    (tmp_path / "r.toml").write_text(RUN)
    with pytest.raises(ConfigError, match=message):
        load_settings(tmp_path / "m.json", tmp_path / "r.toml", [f"{path}=1"])


@pytest.mark.parametrize(("a", "b", "distance"), [
    ("", "", 0),
    ("lr", "rl", 1),
    ("steps", "step", 1),
    ("kitten", "sitting", 3),
    ("ca", "abc", 3),
    ("abcd", "badc", 2)])
def test_edit_distance(a, b, distance):
    """Against values worked out by hand; ('ca', 'abc') tells optimal string alignment from its relatives."""
    assert edit_distance(a, b) == edit_distance(b, a) == distance


def test_the_right_word_elsewhere_beats_a_slip_here():
    """Moving a key costs less than a typing mistake, more than none; a plural as much as moving."""
    assert nearest_keys("a.lr", ["a.lrs_", "a.lrx", "b.lr"]) == ["b.lr"]
    assert nearest_keys("a.lr", ["a.lr", "b.lr"]) == ["a.lr"]
    assert nearest_keys("a.prefix", ["a.prefixes", "b.prefix"]) == ["a.prefixes", "b.prefix"]
    assert nearest_keys("a.quite_another", ["a.lr", "b.lr"]) == []


@pytest.mark.parametrize(("overrides", "profile"), [
    (['data.sources=[{prefx="data/pt"}]'], {}), (['data.sources=[{prefix="a", weight="b"}]'], {}),
    ([], {"bf16": {"enabld": True}}), ([], {"zero_optimization": {"stag": 1}})])
def test_one_mistake_is_one_fault(tmp_path, overrides, profile):
    """The key that was meant is not also reported as missing, nor its list as too short."""
    (tmp_path / "m.json").write_text(json.dumps({**PROFILE, **profile}))
    (tmp_path / "r.toml").write_text(RUN)
    with pytest.raises(ConfigError) as error:
        load_settings(tmp_path / "m.json", tmp_path / "r.toml", overrides)
    assert len(error.value.faults) == 1, error.value.faults
