"""Stages of the data: which share of each source is drawn over which range of tokens."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import islice

from megatron_ttl.config.schema import DataConfig, RunFile, SourceConfig, StageConfig
from megatron_ttl.config.suggest import did_you_mean, nearest_multiples, nearest_words

Fault = tuple[str, str]
_MOST_TOLD, _MOST_LISTED = 50, 8  # faults and names: a file of thousands must not take minutes, nor fill the screen


def name_of(source: SourceConfig) -> str:
    """Return the name by which stages speak of a source."""
    return source.name or os.path.basename(os.path.normpath(source.prefix))


def stages_of(data: DataConfig) -> list[tuple[int | None, list[float]]]:
    """Return (token before which it ends, weights of all sources) of each stage; without stages one that never ends."""
    if not data.stages:
        return [(None, [source.weight for source in data.sources])]
    names = [name_of(source) for source in data.sources]
    return [(stage.until_tokens, [stage.weights.get(name, 0.0) for name in names]) for stage in data.stages]


def first_difference(old: DataConfig, new: DataConfig) -> int | None:
    """Return the token of the run from which on the two draw in other shares; None where they never do.

    Sources are the same by their place in the list. One that is not there is one that gives nothing.
    """
    a, b = _beginnings(old), _beginnings(new)
    for i in range(max(len(a), len(b))):
        begins = [stages[i][0] for stages in (a, b) if i < len(stages)]
        if len(begins) == 1 or a[i] != b[i]:
            return min(begins)
    return None


def _beginnings(data: DataConfig) -> list[tuple[int, dict[int, Fraction]]]:
    """Return (first token, share of each source that gives anything) of every stage."""
    found, begin = [], 0
    for until, weights in stages_of(data):
        exact = [Fraction(str(weight)) for weight in weights]
        found.append((begin, {i: weight / sum(exact) for i, weight in enumerate(exact) if weight}))
        begin = until or begin
    return found


def stage_faults(run: RunFile) -> Iterator[Fault]:
    """Yield what is wrong with names, weights and ends of the stages; nothing for a run without."""
    stages = run.data.stages
    if not stages:
        return
    names = [name_of(source) for source in run.data.sources]
    yield from _source_faults(run.data, names)
    for i, stage in enumerate(stages[:_MOST_TOLD]):
        yield from ((f"data.stages[{i}].weights", fault) for fault in _weight_faults(stage, dict.fromkeys(names)))
    yield from islice(_end_faults(stages, run.train.sequence_length), _MOST_TOLD)


def stages_reach_the_end(run: RunFile) -> Iterator[Fault]:
    """Yield the fault of a last stage that ends before the run does."""
    last, tokens = run.data.stages[-1].until_tokens if run.data.stages else None, run.total_steps * run.train.tokens_per_step
    if last is not None and last < tokens:
        yield (f"data.stages[{len(run.data.stages) - 1}].until_tokens", f"is {last:,}, and the run has {tokens:,} tokens; "
               "the last stage must reach the end; remove it, or add a stage for the rest")


def _source_faults(data: DataConfig, names: list[str]) -> Iterator[Fault]:
    counts = Counter(names)
    named = Counter(name for stage in data.stages for name in stage.weights)
    drawn = {name for stage in data.stages for name, weight in stage.weights.items() if weight}
    for i, (source, name) in enumerate(zip(data.sources, names, strict=True)):
        if counts[name] > 1:
            yield (f"data.sources[{i}].name", f'is "{name}", and so is that of another source; must be one of its own, for '
                   "stages say by name what they draw; give it another name")
        if "weight" in source.model_fields_set:
            yield (f"data.sources[{i}].weight", f"is {source.weight:g}, and there are stages, which have weights of their "
                   "own; only one of them may say what is drawn; remove it here")
        if name not in drawn and named[name] == len(data.stages) and len(drawn) > 0:
            yield (f"data.sources[{i}]", f'"{name}" has weight 0 in every stage; must be drawn in one at least; give it a '
                   "weight, or take the source out")


def _weight_faults(stage: StageConfig, names: Mapping[str, None]) -> Iterator[str]:
    meant: set[str] = set()
    for name in islice((name for name in stage.weights if name not in names), _MOST_TOLD):
        near = nearest_words(name, islice(names, _MOST_TOLD))
        meant.update(near)
        yield (f'names "{name}"; must be names of sources ({_listed(list(names))}); '
               f"{did_you_mean(near) if near else 'remove it, or give a source that name'}")
    for name, weight in stage.weights.items():
        if weight < 0:
            yield f'gives "{name}" {weight:g}; must be 0 or more; 0 leaves the source out'
    absent = [name for name in names if name not in stage.weights and name not in meant]
    if absent:
        yield (f"says nothing of {_listed(absent)}; must give every source a weight; add it, 0 where nothing is to be "
               "drawn")
    if stage.weights and all(weight == 0 for weight in stage.weights.values()):
        yield "are all 0; one at least must be above; give a source its share"


def _listed(names: list[str]) -> str:
    more = len(names) - _MOST_LISTED
    return ", ".join(names[:_MOST_LISTED]) + (f" and {more:,} more" if more > 0 else "")


def _end_faults(stages: Sequence[StageConfig], sequence_length: int) -> Iterator[Fault]:
    latest = 0
    for i, stage in enumerate(stages):
        key, until = f"data.stages[{i}].until_tokens", stage.until_tokens
        if until is None:
            if i < len(stages) - 1:
                yield key, "is missing; only the last stage may go on to the end of the run; add where it ends"
            continue
        if until % sequence_length:
            yield (key, f"{until:,} is not a multiple of sequence_length {sequence_length:,}; must be whole samples, for "
                   f"it is never rounded; set it to {nearest_multiples(until, sequence_length)}")
        if until <= latest:
            yield (key, f"is {until:,}, and the stage before it ends at {latest:,}; ends are counted from the first token "
                   "of the run and must ascend; raise it")
        latest = max(latest, until)
