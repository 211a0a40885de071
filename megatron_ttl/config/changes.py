"""What may differ between two starts of one run: one table with every key of the run file and the DeepSpeed JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ValidationError

from megatron_ttl.config.deepspeed import DeepSpeedProfile
from megatron_ttl.config.describe import known_keys, leaf_keys, show, walk
from megatron_ttl.config.schema import DataConfig, RunFile
from megatron_ttl.config.stages import first_difference
from megatron_ttl.config.suggest import did_you_mean, nearest_keys
from megatron_ttl.config.validate import without_indices

if TYPE_CHECKING:
    from megatron_ttl.config.load import Settings

Verdict = Literal["allowed", "confirm", "forbidden"]

_LAYOUT = "it says how the work is shared out, and the curve stays the same to rounding"
_UPDATE = "every later update is another one"
_SCHEDULE = "the learning rate of every later step follows from it (steps are counted from the first of the run)"
_SCALE = "it decides which steps fp16 skips"

_TABLE: tuple[tuple[Verdict, str, str], ...] = (  # verdict, why, keys; `section.*` is all of a section
    ("allowed", "a run folder may be moved", "run.dir"),
    ("forbidden", "the order of the data is a function of it", "run.seed"),
    ("forbidden", "the run began there and never reads it again", "run.start_from"),
    ("forbidden", "the weights were drawn by it", "model.init"),
    ("forbidden", "the weights have this shape, and mean something in this function alone",
     "model.hidden_size model.intermediate_size model.num_hidden_layers model.num_attention_heads "
     "model.num_key_value_heads model.vocab_size model.max_position_embeddings model.rms_norm_eps model.rope_theta "
     "model.tie_word_embeddings"),
    ("forbidden", "the data position counts samples of these sources, weights and order", "data.sources "
     "data.sources[].weight data.sources[].prefix"),
    ("allowed", "stages say by it what they draw, and nothing else does", "data.sources[].name"),
    ("confirm", "later samples come from other sources (each goes on where it stands)", "data.stages "
     "data.stages[].until_tokens data.stages[].weights"),
    ("forbidden", "the data position counts samples that are put together so", "data.packing"),
    ("forbidden", "the data position counts samples of the tokens that were there", "data.sources[].content"),
    ("forbidden", "the ids of the data would mean other pieces than those the weights know", "data.tokenizer"),
    ("forbidden", "the data position counts samples of this length", "train.sequence_length"),
    ("confirm", "every later step has another batch (the data go on without a gap, the schedule goes on counting "
     "steps)", "train.tokens_per_step"),
    ("confirm", _SCHEDULE, "train.steps train.tokens"),
    ("confirm", _UPDATE, "train.gradient_clipping"),
    ("confirm", "every later token is predicted from less or more (the data go on without a gap)", "data.document_mask"),
    ("allowed", "it says when a run that goes wrong is ended", "train.max_nonfinite_steps"),
    ("allowed", "the run goes back to before those steps", "train.skip_steps"),
    ("confirm", _UPDATE, "optimizer.lr optimizer.betas optimizer.eps optimizer.weight_decay optimizer.decay_norms "
     "optimizer.decay_embeddings"),
    ("confirm", _SCHEDULE, "schedule.kind schedule.warmup_steps schedule.warmup_tokens schedule.decay_steps "
     "schedule.decay_tokens schedule.decay_shape schedule.min_lr"),
    ("allowed", "it only measures", "evaluation.* log.* energy.*"),
    ("allowed", "it says when the run is kept", "checkpoint.*"),
    ("allowed", "it says when a run that hangs is ended", "watchdog.*"),
    ("allowed", "the samples and their order are the same, however they are read", "data_loader.*"),
    ("allowed", _LAYOUT, "train_micro_batch_size_per_gpu zero_optimization.stage zero_optimization.overlap_comm "
     "zero_optimization.contiguous_gradients zero_optimization.reduce_scatter zero_optimization.reduce_bucket_size "
     "zero_optimization.allgather_bucket_size zero_optimization.stage3_prefetch_bucket_size "
     "zero_optimization.stage3_param_persistence_threshold zero_optimization.stage3_max_live_parameters "
     "zero_optimization.offload_optimizer.device zero_optimization.offload_optimizer.pin_memory "
     "parallel.tensor parallel.pipeline parallel.sequence recompute"),
    ("allowed", "the same numbers are computed in another way, and the curve stays the same to rounding",
     "engine compile cuda_graphs kernels.*"),
    ("allowed", "it only measures and compares", "parallel.replica_check_steps wall_clock_breakdown"),
    ("allowed", "it has one value", "data_types.grad_accum_dtype"),
    ("confirm", "forward and backward pass compute in another number format", "bf16.enabled fp16.enabled"),
    ("confirm", "gradients are rounded to it on their way between processes", "communication_data_type"),
    ("confirm", _SCALE, "fp16.loss_scale_window fp16.hysteresis fp16.min_loss_scale"),
    ("allowed", "the checkpoint has the scale that the run goes on with", "fp16.initial_scale_power"),
)
CONTENT_KEYS = ("data.sources[].content", "data.tokenizer")
"""Rows of the table that are no keys: checksums of what the sources hold."""

_RULES = {key: (verdict, why) for verdict, why, keys in _TABLE for key in keys.split()}
_UNKNOWN: tuple[Verdict, str] = ("forbidden", "this release does not know the setting, so it cannot keep to it")
_UNCLASSIFIED: tuple[Verdict, str] = ("forbidden", "nobody has said what a change of it does")
_IN_STEPS = {"train.steps": "train.tokens", "schedule.warmup_steps": "schedule.warmup_tokens",
             "schedule.decay_steps": "schedule.decay_tokens"}
_IN_TOKENS = {tokens: steps for steps, tokens in _IN_STEPS.items()}


@dataclass(frozen=True)
class InForce:
    """The settings of a run at some time, as JSON has them; what is missing stood at its default."""

    run: Mapping[str, Any]
    profile: Mapping[str, Any] | None
    """None: not known."""
    content: Mapping[str, str]
    """Checksums by `data.sources[0].content` and `data.tokenizer`; what is missing is not known."""
    consumed_tokens: int | None = None
    """How far the run has read; None: not known, so that nothing that it may have read can be another."""


@dataclass(frozen=True)
class Change:
    """A setting that differs from the run so far."""

    field: str
    old: Any
    new: Any
    verdict: Verdict
    why: str
    confirmed: bool = False

    @property
    def refused(self) -> bool:
        """Whether the run may not go on like this."""
        return self.verdict == "forbidden" or (self.verdict == "confirm" and not self.confirmed)

    @property
    def row(self) -> tuple[str, str, str, str]:
        """Field, before, now and verdict, for people."""
        verdict = {"allowed": "allowed", "forbidden": "may not change"}.get(
            self.verdict, "confirmed" if self.confirmed else "to be confirmed")
        return self.field, show(self.old), show(self.new), verdict


def rule_of(key: str) -> tuple[Verdict, str] | None:
    """Return the verdict on a change of a key, and why; None if the table does not have it."""
    key = without_indices(key)
    return _RULES.get(key) or _RULES.get(f"{key.partition('.')[0]}.*")


def compare(before: InForce, now: InForce, confirmed: Iterable[str] = ()) -> list[Change]:
    """Return every setting that differs, with what the table says of it.

    Args:
        before: of the run so far.
        now: of the run about to go on.
        confirmed: keys and sections whose change was asked for.
    """
    old, new = _flat(RunFile, before.run), _flat(RunFile, now.run)
    found = _run_changes(old, new, before, now)
    found += [Change(key, value, None, *_UNKNOWN) for key, value in _strangers(RunFile, before.run)]
    if before.profile is not None and now.profile is not None:
        found += _profile_changes(_flat(DeepSpeedProfile, before.profile), _flat(DeepSpeedProfile, now.profile))
        found += [Change(key, value, None, *_UNKNOWN) for key, value in _strangers(DeepSpeedProfile, before.profile)]
    names = tuple(confirmed)
    return [Change(c.field, c.old, c.new, c.verdict, c.why,
                   c.verdict == "confirm" and any(_covers(name, c.field) for name in names)) for c in found]


def refusals(changes: Iterable[Change], settings: Settings) -> list[str]:
    """Return a fault for each change that may not be, with the flag that confirms it where one does."""
    faults = []
    for change in changes:
        if not change.refused:
            continue
        own_file = settings.deepspeed_path if change.field in known_keys(DeepSpeedProfile) else settings.run_path
        origin = settings.origins.get(change.field.partition("[")[0], "default")
        where = own_file if origin == "default" else origin
        was = f"{where}: {change.field}: was {show(change.old)} in the run so far, is now {show(change.new)}"
        if change.verdict == "confirm":
            faults.append(f"{was}; must stay so or be confirmed, for {change.why}; set it back, or add --allow-change "
                          f"{change.field}")
        else:
            faults.append(f"{was}; must stay as it was: {change.why}; set it back, or begin another run: run.dir=<a "
                          "new folder>")
    return faults


def allowance_faults(names: Iterable[str]) -> list[tuple[str, str]]:
    """Return (name, fault) of each `--allow-change` that names nothing, or what never may change."""
    leaves = [*leaf_keys(RunFile), *leaf_keys(DeepSpeedProfile)]
    known = [*known_keys(RunFile), *known_keys(DeepSpeedProfile)]
    faults = []
    for name in names:
        covered = [rule_of(key) or _UNCLASSIFIED for key in leaves if _covers(name, key)]
        if without_indices(name) in CONTENT_KEYS or without_indices(name).startswith("data.sources"):
            covered = [rule_of(name) or _UNCLASSIFIED]
        if not covered:
            near = nearest_keys(name.partition("=")[0], known)
            faults.append((name, "is no setting; must be a key or a section of the run file or of the DeepSpeed JSON; "
                           + (did_you_mean(near) if near else "e.g. optimizer.lr or optimizer")))
        elif all(verdict == "forbidden" for verdict, _ in covered):
            faults.append((name, f"may not change within a run; must stay as it was: {covered[0][1]}; remove the flag, "
                           "or begin another run: run.dir=<a new folder>"))
    return faults


def _covers(name: str, key: str) -> bool:
    return key == name or key.startswith((f"{name}.", f"{name}["))


def _run_changes(old: dict[str, Any], new: dict[str, Any], before: InForce, now: InForce) -> list[Change]:
    found = []
    for key in old:
        if key == "data.sources":
            found += _data_changes(old, new, before, now)
        elif old[key] != new[key] and key != "data.stages":
            verdict, why = rule_of(key) or _UNCLASSIFIED
            steps = key if key in _IN_STEPS else _IN_TOKENS.get(key)
            if steps is not None and _in_steps(old, steps) == _in_steps(new, steps):
                verdict, why = "allowed", "it is the same length, told otherwise"
            in_tokens = [f"{name} to {_IN_TOKENS[name]}" for name in _IN_TOKENS if new[name] is not None]
            if key == "train.tokens_per_step" and in_tokens:
                verdict = "forbidden"
                why = (f"the steps so far had {show(old[key])} tokens, and lengths in tokens are divided by "
                       f"tokens_per_step as if all had {show(new[key])} (to change it, turn {' and '.join(in_tokens)})")
            found.append(Change(key, old[key], new[key], verdict, why))
    for key in sorted(before.content):
        if key in now.content and before.content[key] != now.content[key]:
            found.append(Change(key, before.content[key], now.content[key], *(rule_of(key) or _UNCLASSIFIED)))
    return found


def _data_changes(old: dict[str, Any], new: dict[str, Any], before: InForce, now: InForce) -> list[Change]:
    """Compare sources one by one, and what is drawn of them: by their weights, or by stages where there are any."""
    sources, stages = "data.sources", "data.stages"
    if not old[stages] and not new[stages]:
        if not isinstance(old[sources], list) or len(old[sources]) != len(new[sources]):
            return [Change(sources, old[sources], new[sources], *(rule_of(sources) or _UNCLASSIFIED))]
        return _source_changes(old[sources], new[sources], before, now) + _weight_changes(old[sources], new[sources])
    verdict, why = _stage_verdict(old, new, before)
    found = [Change(stages, old[stages], new[stages], verdict, why)] if old[stages] != new[stages] or why else []
    if not isinstance(old[sources], list) or len(old[sources]) > len(new[sources]):
        return [*found, Change(sources, old[sources], new[sources], *(rule_of(sources) or _UNCLASSIFIED))]
    if len(old[sources]) < len(new[sources]):  # what was drawn so far is known to be the same where this may be
        told = rule_of(sources) or _UNCLASSIFIED
        if verdict != "forbidden":
            told = "allowed", "no sample so far is of the sources that are added"
        found.append(Change(sources, old[sources], new[sources], *told))
    return found + _source_changes(old[sources], new[sources], before, now)


def _stage_verdict(old: dict[str, Any], new: dict[str, Any], before: InForce) -> tuple[Verdict, str]:
    """Say whether the samples that were read would be others, or some that were planned, or none of them."""
    try:
        was, is_now = (DataConfig.model_validate_json(json.dumps({"sources": flat["data.sources"], "stages":
                                                                  flat["data.stages"]})) for flat in (old, new))
    except (ValidationError, TypeError, ValueError):
        return _UNKNOWN
    begin = first_difference(was, is_now)
    if begin is None:
        return "allowed", "" if old["data.stages"] == new["data.stages"] else "the same is drawn, told otherwise"
    read = before.consumed_tokens
    if read is None or begin < read:
        return "forbidden", ((rule_of("data.sources") or _UNCLASSIFIED)[1] + (
            f"; the run has read {read:,} tokens: let the stage that it is in end there, and add one" if read else ""))
    planned = _in_steps(old, "train.steps") * (old["train.tokens_per_step"] or 0)
    if planned and begin >= planned:
        return "allowed", "it says what comes after the end that the run had so far"
    return rule_of("data.stages") or _UNCLASSIFIED


def _source_changes(old: list[Any], new: list[Any], before: InForce, now: InForce) -> list[Change]:
    """Compare sources at the same places of two lists, by content where it is known."""
    verdict, why = rule_of("data.sources") or _UNCLASSIFIED
    found = []
    for i, (a, b) in enumerate(zip(old, new, strict=False)):
        key, content = f"data.sources[{i}]", f"data.sources[{i}].content"
        if a.get("prefix") != b.get("prefix"):
            same = content in before.content and before.content[content] == now.content.get(content)
            found.append(Change(f"{key}.prefix", a.get("prefix"), b.get("prefix"), "allowed" if same else verdict,
                                "the data were moved: their checksum is the same" if same else why))
        if a.get("name") != b.get("name"):
            found.append(Change(f"{key}.name", a.get("name"), b.get("name"), *(rule_of(f"{key}.name") or _UNCLASSIFIED)))
    return found


def _weight_changes(old: list[Any], new: list[Any]) -> list[Change]:
    """Compare the weights of two lists of as many sources, by shares: 1 and 1 are 2 and 2."""
    verdict, why = rule_of("data.sources[].weight") or _UNCLASSIFIED
    found = []
    for i, (a, b, share_a, share_b) in enumerate(zip(old, new, _shares(old), _shares(new), strict=True)):
        if _weight(a) != _weight(b):
            same = share_a == share_b
            found.append(Change(f"data.sources[{i}].weight", _weight(a), _weight(b), "allowed" if same else verdict,
                                "the shares are the same" if same else why))
    return found


def _weight(source: Mapping[str, Any]) -> Any:
    return source.get("weight", 1.0)


def _shares(sources: list[Mapping[str, Any]]) -> list[Fraction]:
    weights = [Fraction(str(_weight(source))) for source in sources]
    return [weight / sum(weights) for weight in weights]


def _in_steps(flat: dict[str, Any], key: str) -> int:
    return flat[key] or (flat[_IN_STEPS[key]] or 0) // (flat["train.tokens_per_step"] or 1)


def _profile_changes(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    found = []
    scaled = old["fp16.enabled"] and new["fp16.enabled"]
    for key, before in old.items():
        switch = key in ("bf16.enabled", "fp16.enabled")  # false is the same as no such section
        a, b = (bool(before), bool(new[key])) if switch else (before, new[key])
        if a != b and (switch or scaled or not key.startswith("fp16.")):
            found.append(Change(key, a, b, *(rule_of(key) or _UNCLASSIFIED)))
    return found


def _flat(model: type[BaseModel], tables: Mapping[str, Any]) -> dict[str, Any]:
    """Return the value of every key of a schema; what is missing, e.g. in an older release, is the default."""
    flat = {}
    for key, field, leaf in walk(model):
        if not leaf or "[]" in key:
            continue
        table: Any = tables
        *sections, name = key.split(".")
        for section in sections:
            table = table.get(section) if isinstance(table, Mapping) else None
        if isinstance(table, Mapping) and name in table:
            value = table[name]
        else:
            value = None if field.is_required() else field.get_default(call_default_factory=True)
        flat[key] = list(value) if isinstance(value, tuple) else value
    return flat


def _strangers(model: type[BaseModel], tables: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return the keys that the schema does not know, with their values: a newer release wrote them."""
    known, leaves = set(known_keys(model)), set(leaf_keys(model))
    found = []
    for name, value in tables.items():
        key = prefix + name
        if key not in known:
            found += [(key, value)] if value is not None else []
        elif key not in leaves and isinstance(value, Mapping):
            found += _strangers(model, value, f"{key}.")
    return found
