"""The rules between settings: what is right alone and wrong together."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from megatron_ttl.config.schema import RunFile
from megatron_ttl.config.skips import range_fault
from megatron_ttl.config.stages import stage_faults, stages_reach_the_end
from megatron_ttl.config.suggest import nearest_multiples

if TYPE_CHECKING:
    from megatron_ttl.config.load import Settings

_LONGEST_PATH = 3_800  # Linux takes 4,095; the names of our files come after it
Fault = tuple[str, str]  # (dotted key, `what it is; what it must be; what to do`)


def run_faults(run: RunFile, wrong: Iterable[str] = ()) -> list[Fault]:
    """Return the faults between the keys of a run file; keys that are `wrong` by themselves are left out."""
    unusable = set(wrong)
    return [fault for keys, rule in _RULES if unusable.isdisjoint(keys) for fault in rule(run)]


def divisors(number: int) -> list[int]:
    """Return the divisors in ascending order; quick for any number that a setting may have."""
    low = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*low, *(number // d for d in low)})


def _head_sizes(run: RunFile) -> Iterator[Fault]:
    model = run.model
    hidden, heads = model.hidden_size, model.num_attention_heads
    if hidden % heads:
        yield ("model.hidden_size", f"{hidden:,} over {heads:,} heads leaves {hidden % heads:,} channels; "
               f"must be a multiple of num_attention_heads; set it to {nearest_multiples(hidden, heads)}")
    elif model.head_dim % 2:
        yield ("model.num_attention_heads", f"gives heads of {hidden:,} / {heads:,} = {model.head_dim:,} "
               "channels; RoPE turns channels in pairs, so the head size must be even; change hidden_size or "
               "num_attention_heads")


def _key_value_heads(run: RunFile) -> Iterator[Fault]:
    heads, kv_heads = run.model.num_attention_heads, run.model.num_key_value_heads
    if heads % kv_heads:
        fitting = ", ".join(f"{k:,}" for k in divisors(heads))
        yield ("model.num_key_value_heads", f"{heads:,} query heads cannot share {kv_heads:,}; must divide "
               f"num_attention_heads; set it to one of {fitting}")


def _tied(run: RunFile) -> Iterator[Fault]:
    if run.model.tie_word_embeddings:
        yield ("model.tie_word_embeddings", "is true; must be false: the models of both papers have two "
               "separate weights, and no part of this release computes a tied head; remove the key")


def _positions(run: RunFile) -> Iterator[Fault]:
    sequence, positions = run.train.sequence_length, run.model.max_position_embeddings
    if sequence > positions:
        yield ("train.sequence_length", f"is {sequence:,}, model.max_position_embeddings {positions:,}; must "
               "not be longer than the positions that the exported model declares; shorten it or raise the "
               "other")


def _tokens_per_step(run: RunFile) -> Iterator[Fault]:
    tokens, sequence = run.train.tokens_per_step, run.train.sequence_length
    if tokens % sequence:
        yield ("train.tokens_per_step", f"{tokens:,} is not a multiple of sequence_length {sequence:,}; must "
               f"hold whole samples; set it to {nearest_multiples(tokens, sequence)}")


def _length(run: RunFile) -> Iterator[Fault]:
    yield from _one_of(run.train.steps, run.train.tokens, "train.steps", "train.tokens", required=True)


def _length_multiple(run: RunFile) -> Iterator[Fault]:
    yield from _multiple("train.tokens", run.train.tokens, run)


def _skip_steps(run: RunFile) -> Iterator[Fault]:
    for i, text in enumerate(run.train.skip_steps):
        if fault := range_fault(text):
            yield f"train.skip_steps[{i}]", fault


def _warmup(run: RunFile) -> Iterator[Fault]:
    yield from _one_of(run.schedule.warmup_steps, run.schedule.warmup_tokens,
                       "schedule.warmup_steps", "schedule.warmup_tokens", required=False)


def _warmup_multiple(run: RunFile) -> Iterator[Fault]:
    yield from _multiple("schedule.warmup_tokens", run.schedule.warmup_tokens, run)


def _decay(run: RunFile) -> Iterator[Fault]:
    schedule = run.schedule
    if schedule.kind == "wsd":
        yield from _one_of(schedule.decay_steps, schedule.decay_tokens, "schedule.decay_steps",
                           "schedule.decay_tokens", required=True)
        return
    given = [name for name in ("decay_steps", "decay_tokens") if getattr(schedule, name) is not None]
    given += ["decay_shape"] if "decay_shape" in schedule.model_fields_set else []
    for name in given:
        yield (f"schedule.{name}", f"is given, and schedule.kind is \"{schedule.kind}\"; it belongs to "
               "\"wsd\" alone; remove it or set kind to \"wsd\"")


def _decay_multiple(run: RunFile) -> Iterator[Fault]:
    yield from _multiple("schedule.decay_tokens", run.schedule.decay_tokens, run)


def _phases_fit(run: RunFile) -> Iterator[Fault]:
    total, warmup, decay = run.total_steps, run.warmup_steps, run.decay_steps
    if not total:
        return
    key = "schedule.warmup_tokens" if run.schedule.warmup_tokens else "schedule.warmup_steps"
    if warmup >= total:
        yield (key, f"is {warmup:,} steps, and the run has {total:,}; must be shorter than the run; shorten "
               "it")
    elif run.schedule.kind == "wsd" and warmup + decay > total:
        yield ("schedule.decay_steps", f"warm-up of {warmup:,} and decay of {decay:,} steps are "
               f"{warmup + decay:,}, and the run has {total:,}; must fit into the run; set the decay to at "
               f"most {total - warmup:,} steps")


def _minimum_lr(run: RunFile) -> Iterator[Fault]:
    minimum, peak = run.schedule.min_lr, run.optimizer.lr
    if run.schedule.kind == "constant":
        if minimum:
            yield ("schedule.min_lr", f"is {minimum}, and schedule.kind is \"constant\"; it would have no "
                   "effect; remove it or choose another kind")
    elif minimum >= peak:
        yield ("schedule.min_lr", f"is {minimum}, optimizer.lr is {peak}; must be lower, or the rate never "
               f"falls; lower it, e.g. to {peak / 10:.3g}")


def _betas(run: RunFile) -> Iterator[Fault]:
    if any(not 0 <= beta < 1 for beta in run.optimizer.betas):
        yield ("optimizer.betas", f"is {list(run.optimizer.betas)}; both must be in [0, 1); e.g. [0.9, 0.95]")


def _sources(run: RunFile) -> Iterator[Fault]:
    prefixes = [source.prefix for source in run.data.sources]
    yield from _prefixes((f"data.sources[{i}].prefix", prefix) for i, prefix in enumerate(prefixes))


def _held_out(run: RunFile) -> Iterator[Fault]:
    prefixes = run.evaluation.prefixes
    yield from _prefixes((f"evaluation.prefixes[{i}]", prefix) for i, prefix in enumerate(prefixes))


def _held_out_is_not_trained(run: RunFile) -> Iterator[Fault]:
    trained = {os.path.normpath(source.prefix) for source in run.data.sources}
    for i, prefix in enumerate(run.evaluation.prefixes):
        if os.path.normpath(prefix) in trained:
            yield (f"evaluation.prefixes[{i}]", f'"{prefix}" is also in data.sources; held-out text must not '
                   "be trained on; name the held-out dataset that preprocess_data.py wrote beside it")


def _evaluation(run: RunFile) -> Iterator[Fault]:
    evaluation = run.evaluation
    given = [name for name in ("prefixes", "samples", "tasks") if getattr(evaluation, name)]
    if evaluation.every_steps and not given:
        yield ("evaluation.every_steps", f"is {evaluation.every_steps:,} without prefixes; there must be "
               "something to evaluate on; give evaluation.prefixes, samples or tasks, or remove it")
    if given and not evaluation.every_steps:
        yield ("evaluation.every_steps", f"is missing, and evaluation.{given[0]} is given; must say how often; "
               f"give it or remove the {given[0]}")
    if evaluation.max_tokens is not None and not evaluation.prefixes:
        yield ("evaluation.max_tokens", f"is {evaluation.max_tokens:,} without prefixes; there must be "
               "something to evaluate on; give evaluation.prefixes or remove it")


def _samples(run: RunFile) -> Iterator[Fault]:
    evaluation, sequence = run.evaluation, run.train.sequence_length
    if evaluation.samples and evaluation.sample_tokens >= sequence:
        yield ("evaluation.sample_tokens", f"is {evaluation.sample_tokens:,}, train.sequence_length {sequence:,}; must "
               "leave room for a prompt; lower it")
    if evaluation.task_items is not None and not evaluation.tasks:
        yield ("evaluation.task_items", f"is {evaluation.task_items:,} without tasks; there must be a task to limit; give "
               "evaluation.tasks or remove it")
    for key in ("samples", "tasks"):
        texts = getattr(evaluation, key)
        for i, text in enumerate(texts):
            if text in texts[:i]:
                yield (f"evaluation.{key}[{i}]", f'"{text[:80]}" is there twice; each must be named once; remove one')


def _evaluation_tokens(run: RunFile) -> Iterator[Fault]:
    most, sequence = run.evaluation.max_tokens, run.train.sequence_length
    if most is not None and most < sequence:
        yield ("evaluation.max_tokens", f"is {most:,}, train.sequence_length {sequence:,}; must hold at "
               "least one sample; raise it")


def _retention(run: RunFile) -> Iterator[Fault]:
    every, keep = run.checkpoint.every_steps, run.checkpoint.keep_every_steps
    if keep is not None and keep % every:
        yield ("checkpoint.keep_every_steps", f"{keep:,} is not a multiple of every_steps {every:,}; must "
               f"be, or no such checkpoint is ever written; set it to {nearest_multiples(keep, every)}")


def _energy(run: RunFile) -> Iterator[Fault]:
    if run.energy.enabled and run.energy.country_iso_code is None:
        yield ("energy.country_iso_code", "is missing; must be an ISO 3166 alpha-3 code, for the grid's "
               "carbon intensity is never guessed; add e.g. \"BRA\", or set energy.enabled = false")


def _start_from(run: RunFile) -> Iterator[Fault]:
    start, folder = run.run.start_from, os.path.normpath(run.run.dir)
    if start is not None and (os.path.normpath(start) + os.sep).startswith(folder + os.sep):
        yield ("run.start_from", f'"{start}" lies in run.dir; must belong to another run: this one resumes '
               "by itself; remove it or give another run.dir")


def _paths(run: RunFile) -> Iterator[Fault]:
    named = [("run.dir", run.run.dir), ("run.start_from", run.run.start_from or "x")]
    named += [(f"data.sources[{i}].prefix", source.prefix) for i, source in enumerate(run.data.sources)]
    named += [(f"evaluation.prefixes[{i}]", prefix) for i, prefix in enumerate(run.evaluation.prefixes)]
    for key, path in named:
        if not path.isprintable() or not path.strip():
            yield (key, f"is {path!r}; must be a path of printable characters; write one")
        elif len(os.fsencode(path)) > _LONGEST_PATH or any(len(os.fsencode(part)) > 200 for part in path.split("/")):
            yield (key, f"is {path[:60]!r}... of {len(os.fsencode(path)):,} bytes; must have at most "
                   f"{_LONGEST_PATH:,}, and 200 in each name; shorten it")


def _countable(run: RunFile) -> Iterator[Fault]:
    tokens = run.total_steps * run.train.tokens_per_step
    if tokens >= 2**63:
        yield ("train.tokens" if run.train.tokens else "train.steps", f"makes {tokens:.1e} tokens; must be "
               "fewer than 2^63, the largest count of a token; shorten the run")


def _one_of(a: int | None, b: int | None, name_a: str, name_b: str, required: bool) -> Iterator[Fault]:
    if a is not None and b is not None:
        yield (name_a, f"is {a:,}, and {name_b} is {b:,}; only one of them may be given; remove one "
               f"(on the command line: {name_a}=none or {name_b}=none)")
    elif required and a is None and b is None:
        yield (name_a, f"is missing, and so is {name_b}; exactly one of them must be given; add one")


def _multiple(key: str, tokens: int | None, run: RunFile) -> Iterator[Fault]:
    if tokens is not None and tokens % run.train.tokens_per_step:
        yield (key, f"{tokens:,} is not a multiple of tokens_per_step {run.train.tokens_per_step:,}; must be "
               "whole steps, for it is never rounded; set it to "
               f"{nearest_multiples(tokens, run.train.tokens_per_step)}")


def _prefixes(named: Iterable[tuple[str, str]]) -> Iterator[Fault]:
    seen: dict[str, str] = {}
    for key, prefix in named:
        if prefix.endswith((".bin", ".idx", ".json", ".jsonl")):
            stem = prefix.rsplit(".", 1)[0]
            yield (key, f'is "{prefix}"; must be the path without its ending; write "{stem}"')
        first = seen.setdefault(os.path.normpath(prefix), key)
        if first != key:
            yield (key, f'"{prefix}" is already {first}; a dataset may be named once; remove it or add up '
                   'the weights')


_LENGTH = ("train.steps", "train.tokens", "train.tokens_per_step")
_PHASES = ("schedule.kind", "schedule.warmup_steps", "schedule.warmup_tokens", "schedule.decay_steps",
           "schedule.decay_tokens")
_RULES: tuple[tuple[tuple[str, ...], Callable[[RunFile], Iterator[Fault]]], ...] = (
    (("model.hidden_size", "model.num_attention_heads"), _head_sizes),
    (("model.num_attention_heads", "model.num_key_value_heads"), _key_value_heads),
    (("model.tie_word_embeddings",), _tied),
    (("train.sequence_length", "model.max_position_embeddings"), _positions),
    (("train.tokens_per_step", "train.sequence_length"), _tokens_per_step),
    (("train.steps", "train.tokens"), _length),
    (("train.tokens", "train.tokens_per_step"), _length_multiple),
    (("train.skip_steps",), _skip_steps),
    (("schedule.warmup_steps", "schedule.warmup_tokens"), _warmup),
    (("schedule.warmup_tokens", "train.tokens_per_step"), _warmup_multiple),
    (("schedule.kind", "schedule.decay_steps", "schedule.decay_tokens", "schedule.decay_shape"), _decay),
    (("schedule.decay_tokens", "train.tokens_per_step"), _decay_multiple),
    ((*_LENGTH, *_PHASES), _phases_fit),
    (("schedule.kind", "schedule.min_lr", "optimizer.lr"), _minimum_lr),
    (("optimizer.betas",), _betas),
    (("data.sources",), _sources),
    (("data.sources", "data.stages", "train.sequence_length"), stage_faults),
    (("data.stages", *_LENGTH), stages_reach_the_end),
    (("evaluation.prefixes",), _held_out),
    (("data.sources", "evaluation.prefixes"), _held_out_is_not_trained),
    (("evaluation.prefixes", "evaluation.samples", "evaluation.tasks", "evaluation.every_steps", "evaluation.max_tokens"),
     _evaluation),
    (("evaluation.samples", "evaluation.sample_tokens", "evaluation.tasks", "evaluation.task_items",
      "train.sequence_length"), _samples),
    (("evaluation.max_tokens", "train.sequence_length"), _evaluation_tokens),
    (("checkpoint.every_steps", "checkpoint.keep_every_steps"), _retention),
    (("energy.enabled", "energy.country_iso_code"), _energy),
    (("run.dir", "run.start_from"), _start_from),
    (("run.dir", "run.start_from", "data.sources", "evaluation.prefixes"), _paths),
    (_LENGTH, _countable),
)


def accumulation_fault(tokens_per_step: int, sequence_length: int, micro_batch: int,
                       data_parallel_size: int) -> str:
    """Return the fault of a step that is no whole number of passes, with those near that are, or nothing."""
    samples = tokens_per_step // sequence_length
    passes = micro_batch * data_parallel_size
    if tokens_per_step % sequence_length or samples % passes == 0:
        return ""  # the former is a fault of the run file alone
    equation = (f"{micro_batch:,} micro batch x {sequence_length:,} sequence x {data_parallel_size:,} "
                f"data-parallel = {passes * sequence_length:,} tokens do not divide tokens_per_step "
                f"{tokens_per_step:,}")
    if samples % data_parallel_size:
        do = f"use a number of processes that divides {samples:,} samples"
    else:
        per_rank = samples // data_parallel_size
        fitting = divisors(per_rank)
        near = sorted(sorted(fitting, key=lambda m: abs(m - micro_batch))[:2])
        do = f"set train_micro_batch_size_per_gpu to {' or '.join(f'{m:,}' for m in near)}"
    multiples = nearest_multiples(tokens_per_step, passes * sequence_length)
    return (f"{equation}; must divide, the accumulation is derived from it; {do}, or train.tokens_per_step "
            f"to {multiples}")


def check_world(settings: Settings, data_parallel_size: int) -> list[str]:
    """Return the faults that appear once the number of data-parallel processes is known."""
    fault = accumulation_fault(settings.run.train.tokens_per_step, settings.run.train.sequence_length,
                               settings.profile.train_micro_batch_size_per_gpu, data_parallel_size)
    return [f"{settings.deepspeed_path}: train_micro_batch_size_per_gpu: {fault}"] if fault else []


def accumulation(settings: Settings, data_parallel_size: int) -> int:
    """Return how many micro batches each process adds up before an optimizer step.

    Raises:
        ConfigError: tokens_per_step is no multiple of micro batch x sequence x data_parallel_size.
    """
    from megatron_ttl.errors import ConfigError, raise_faults

    raise_faults(ConfigError, check_world(settings, data_parallel_size))
    samples = settings.profile.train_micro_batch_size_per_gpu * data_parallel_size
    return settings.run.samples_per_step // samples
