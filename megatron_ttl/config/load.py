"""Load the run file, the DeepSpeed JSON and the overrides; report every fault of all three at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ttl.config.changes import allowance_faults
from megatron_ttl.config.checks import accumulation, accumulation_fault, check_world, run_faults
from megatron_ttl.config.credentials import credential_faults
from megatron_ttl.config.deepspeed import (
    NOTES,
    OWNED_KEYS,
    DeepSpeedProfile,
    profile_faults,
    take_notes_and_owned,
)
from megatron_ttl.config.degrees import MAX_WORLD_SIZE, degree_faults, world_fault
from megatron_ttl.config.describe import known_keys, leaf_keys
from megatron_ttl.config.engine import engine_faults, engine_world_faults
from megatron_ttl.config.overrides import WHERE as COMMAND_LINE
from megatron_ttl.config.overrides import apply_overrides
from megatron_ttl.config.read import parse_json, parse_toml, read_text
from megatron_ttl.config.schema import RunFile
from megatron_ttl.config.skips import range_fault, union
from megatron_ttl.config.suggest import did_you_mean, nearest_keys, split_key
from megatron_ttl.config.validate import Checked, validate, without_indices
from megatron_ttl.errors import ConfigError, raise_faults

__all__ = ["Reading", "Settings", "accumulation", "check_world", "load_profile", "load_settings", "read_settings", "with_skips"]

_EXPLAINED = 2_000  # unknown keys for which the likely meaning is looked for
DEFAULT = "default"
"""Origin of a key that neither file nor command line gives."""

_OTHER_NAMES = {  # what the same thing is called elsewhere
    "learning_rate": "optimizer.lr", "max_lr": "optimizer.lr", "wd": "optimizer.weight_decay",
    "adam_beta1": "optimizer.betas", "adam_beta2": "optimizer.betas", "adam_epsilon": "optimizer.eps",
    "grad_clip": "train.gradient_clipping", "clip_grad": "train.gradient_clipping",
    "clip": "train.gradient_clipping",
    "train_batch_size": "train.tokens_per_step", "gradient_accumulation_steps": "train.tokens_per_step",
    "steps_per_print": "log.every_steps",
    "max_steps": "train.steps", "train_iters": "train.steps", "total_steps": "train.steps",
    "epochs": "train.tokens",
    "seq_length": "train.sequence_length", "seq_len": "train.sequence_length",
    "block_size": "train.sequence_length",
    "reset_position_ids": "data.document_mask", "reset_attention_mask": "data.document_mask",
    "num_layers": "model.num_hidden_layers", "n_layer": "model.num_hidden_layers",
    "num_heads": "model.num_attention_heads", "n_head": "model.num_attention_heads",
    "ffn_hidden_size": "model.intermediate_size", "dim": "model.hidden_size", "d_model": "model.hidden_size",
    "lr_scheduler_type": "schedule.kind", "batch_size": "train.tokens_per_step", "output_dir": "run.dir",
    "save_steps": "checkpoint.every_steps", "eval_steps": "evaluation.every_steps",
    "logging_steps": "log.every_steps", "country": "energy.country_iso_code",
}


@dataclass(frozen=True)
class Settings:
    """Everything a run needs to know, checked; where each value came from; both files as they were given."""

    run: RunFile
    profile: DeepSpeedProfile
    origins: dict[str, str]
    """Dotted key -> the file that gives it, 'command line' or 'default'."""
    run_text: str
    deepspeed_text: str
    run_path: Path
    deepspeed_path: Path
    device: str | None = None
    """Accelerator that the profile was written for (`_device`), for estimates."""
    allow_changes: tuple[str, ...] = ()
    """Keys and sections that a resumed run may change because it was asked for (`--allow-change`)."""


@dataclass(frozen=True)
class Reading:
    """Settings with all their faults: complete and usable only when there are none."""

    settings: Settings
    faults: list[str]
    wrong: frozenset[str]
    """Keys whose value cannot be used; rules about them must not be applied."""


def load_settings(deepspeed_config: str | os.PathLike[str], run_config: str | os.PathLike[str],
                  overrides: Iterable[str] = (), allow_changes: Iterable[str] = (),
                  skip_steps: Iterable[str] = ()) -> Settings:
    """Return the checked settings of a run.

    Raises:
        ConfigError: with every fault of both files, of the overrides and of the changes that are to be allowed.
    """
    reading = read_settings(deepspeed_config, run_config, overrides, None, allow_changes, skip_steps)
    raise_faults(ConfigError, reading.faults)
    return reading.settings


def load_profile(deepspeed_config: str | os.PathLike[str]) -> DeepSpeedProfile:
    """Return a checked machine profile by itself, for who needs no run.

    Raises:
        ConfigError: with every fault of the file.
    """
    path = Path(deepspeed_config)
    text, faults = read_text(path, "a DeepSpeed configuration in JSON", "--deepspeed_config")
    profile, _, _, more = _check_profile(text, path)
    raise_faults(ConfigError, credential_faults(text, str(path)) or [*faults, *more])
    return profile.value


def read_settings(deepspeed_config: str | os.PathLike[str], run_config: str | os.PathLike[str],
                  overrides: Iterable[str] = (), world_size: int | None = None,
                  allow_changes: Iterable[str] = (), skip_steps: Iterable[str] = ()) -> Reading:
    """Read and check everything; with `world_size`, the number of processes, also how the steps are shared out."""
    run_path, deepspeed_path = Path(run_config), Path(deepspeed_config)
    run_text, faults = read_text(run_path, "a run file in TOML", "--config")
    what = "a DeepSpeed configuration in JSON"
    deepspeed_text, more = read_text(deepspeed_path, what, "--deepspeed_config")
    faults += more
    overrides = list(overrides)
    leaks = [*credential_faults(run_text, str(run_path)), *credential_faults(deepspeed_text, str(deepspeed_path)),
             *credential_faults("\n".join(overrides), f"{COMMAND_LINE}, override")]
    run, run_origin, more = _check_run(run_text, run_path, overrides)
    faults += more
    profile, origin, device, more = _check_profile(deepspeed_text, deepspeed_path)
    faults += more
    wrong = run.wrong | profile.wrong
    between = [*degree_faults(run.value, profile.value, wrong), *engine_faults(run.value, profile.value, wrong)]
    faults += [f"{deepspeed_path}: {key}: {fault}" for key, fault in between]
    if world_size is not None:
        faults += _world_faults(run.value, profile.value, deepspeed_path, wrong, world_size)
    allowed = tuple(allow_changes)
    faults += [f"{COMMAND_LINE}: --allow-change {name}: {fault}" for name, fault in allowance_faults(allowed)]
    more_skips = tuple(skip_steps)
    faults += [f"{COMMAND_LINE}: --skip-steps: {fault}" for fault in map(range_fault, more_skips) if fault]
    run_file = run.value if faults else with_skips(run.value, more_skips)
    settings = Settings(run_file, profile.value, run_origin | origin, run_text, deepspeed_text, run_path,
                        deepspeed_path, device, allowed)
    return Reading(settings, leaks or faults, wrong)  # other faults could repeat what leaked


def with_skips(run: RunFile, more: Iterable[str]) -> RunFile:
    """Return the run file with more steps to leave out."""
    skips = union(run.train.skip_steps, more)
    if skips == union(run.train.skip_steps):
        return run
    return run.model_copy(update={"train": run.train.model_copy(update={"skip_steps": skips})})


def _world_faults(run: RunFile, profile: DeepSpeedProfile, path: Path, wrong: frozenset[str],
                  world_size: int) -> list[str]:
    """Return the faults that appear once the number of processes is known."""
    if not 0 < world_size <= MAX_WORLD_SIZE:
        return [f"{COMMAND_LINE}: --world-size: is {world_size:,}; must be a whole number > 0 and <= "
                f"{MAX_WORLD_SIZE:,}; give the number of processes"]
    if wrong & {"parallel", "parallel.tensor", "parallel.pipeline"}:
        return []
    if fault := world_fault(profile, world_size):
        return [f"{path}: parallel: {fault}"]
    if faults := [f"{path}: {key}: {fault}" for key, fault in engine_world_faults(profile, world_size, None, wrong)]:
        return faults
    if wrong & {"train", "train.tokens_per_step", "train.sequence_length", "train_micro_batch_size_per_gpu"}:
        return []
    fault = accumulation_fault(run.train.tokens_per_step, run.train.sequence_length,
                               profile.train_micro_batch_size_per_gpu,
                               world_size // (profile.cut.tensor * profile.cut.pipeline))
    return [f"{path}: train_micro_batch_size_per_gpu: {fault}"] if fault else []


def _check_run(text: str, path: Path, overrides: list[str]
               ) -> tuple[Checked[RunFile], dict[str, str], list[str]]:
    raw, broken = parse_toml(text, path)
    merged, given, bad = apply_overrides(raw, overrides, _in_short(_unknown_in_run))
    faults = broken + [f"{COMMAND_LINE}: {key}: {fault}" for key, fault in bad]
    checked = validate(RunFile, merged, _in_short(_unknown_in_run))
    if broken or not text:
        # Nothing of the file is known: say nothing about what it lacks, and apply no rule.
        return Checked(checked.value, (), frozenset(known_keys(RunFile))), {}, faults
    found = [*checked.faults, *run_faults(checked.value, checked.wrong)]
    faults += [f"{COMMAND_LINE if key.partition('[')[0] in given else path}: {key}: "
               f"{fault}" for key, fault in found]
    origins = {}
    for key in leaf_keys(RunFile):
        section, leaf = split_key(key)
        in_file = isinstance(merged.get(section), dict) and leaf in merged[section]
        origins[key] = COMMAND_LINE if key in given else str(path) if in_file else DEFAULT
    return checked, origins, faults


def _check_profile(text: str, path: Path
                   ) -> tuple[Checked[DeepSpeedProfile], dict[str, str], str | None, list[str]]:
    raw, broken = parse_json(text, path) if text else ({}, [])
    kept, bad = take_notes_and_owned(raw)
    checked = validate(DeepSpeedProfile, kept, _in_short(_unknown_in_profile))
    if broken or not text:
        return Checked(checked.value, (), frozenset(known_keys(DeepSpeedProfile))), {}, None, broken
    found = [*bad, *checked.faults, *profile_faults(checked.value, checked.wrong)]
    origins = {}
    for key in leaf_keys(DeepSpeedProfile):
        section, leaf = split_key(key)
        table = kept.get(section) if section else kept
        origins[key] = str(path) if isinstance(table, dict) and leaf in table else DEFAULT
    device = raw.get("_device") if isinstance(raw.get("_device"), str) else None
    return checked, origins, device, [f"{path}: {key}: {fault}" for key, fault in found]


def _in_short(unknown: Callable[[str], tuple[str, set[str]]]) -> Callable[[str], tuple[str, set[str]]]:
    """Return the same, which after many unknown keys no longer looks for what was meant: that takes time."""
    asked = 0

    def answer(key: str) -> tuple[str, set[str]]:
        nonlocal asked
        asked += 1
        if asked <= _EXPLAINED:
            return unknown(key)
        return "is not a key either; must be one that is known; remove it", set()

    return answer


def _unknown_in_run(key: str) -> tuple[str, set[str]]:
    own, others = known_keys(RunFile), known_keys(DeepSpeedProfile)
    return _unknown(key, own, others, "the run file", "the DeepSpeed JSON")


def _unknown_in_profile(key: str) -> tuple[str, set[str]]:
    own = [*known_keys(DeepSpeedProfile), *OWNED_KEYS, *NOTES]
    return _unknown(key, own, known_keys(RunFile), "the DeepSpeed JSON", "the run file")


def _unknown(key: str, own: Sequence[str], others: Sequence[str], file: str, other_file: str) -> tuple[str, set[str]]:
    """Return the fault of an unknown key, and the keys of this file that were probably meant."""
    path = without_indices(key)
    leaf = split_key(path)[1].lower()
    here, there = nearest_keys(path, own), nearest_keys(path, others)
    if leaf in _OTHER_NAMES and leaf not in {split_key(name)[1] for name in (*here, *there)}:
        target = _OTHER_NAMES[leaf]
        here, there = ([target], []) if target in own else ([], [target])
    exact_there = any(split_key(name)[1] == leaf for name in there)
    exact_here = any(split_key(name)[1].replace("[]", "") == leaf for name in here)
    if path in others and path not in own:
        here, there = [], [path]  # spelt exactly as the other file has it
    if there and (not here or (exact_there and not exact_here)):
        name = there[0]
        return (f"is not a key of {file}; it belongs to {other_file}, as {name}; remove it here"
                f"{' and edit that file' if other_file != 'the run file' else ' and set it there'}", set())
    section = split_key(path)[0]
    if here:
        elsewhere = sorted({split_key(name)[0] for name in here if split_key(name)[0] != section})
        place = "must stand " + " or ".join(f"in [{name}]" if name else "at the top" for name in elsewhere)
        owned = " (the run file owns it)" if any(name in OWNED_KEYS for name in here) else ""
        return (f"is not a key of {file}{' here' if elsewhere else ''}; "
                f"{place if elsewhere else 'must be one of its keys'}; "
                f"{did_you_mean(here)}{owned}", set(here))
    siblings = [split_key(name)[1] for name in own if split_key(name)[0] == section]
    expected = ", ".join(siblings) if siblings else ", ".join(name for name in own if "." not in name)
    return f"is not a key of {file}; must be one of {expected}; remove it", set()
