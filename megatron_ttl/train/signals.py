"""Ask the model that is being trained: how likely continuations are, and what it says itself.

Everything goes through the engine, forward only, in portions no larger than a training step's: so it works in every
layout, takes no memory that a step does not take, and gathers no weights that are cut.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from megatron_ttl.evaluate.signals import ScoredRow, SignalTask
from megatron_ttl.generate.sampling import Sampling, TokenChooser
from megatron_ttl.kernels.cross_entropy import IGNORED_LABEL
from megatron_ttl.parallel.mesh import Mesh
from megatron_ttl.tokenizer.tokenizer import Tokenizer
from megatron_ttl.train.engine import Engine

_WIDTHS = 8  # rows are filled up to a multiple of it, and of the tensor ranks, among which a sequence may be shared out

Ask = Callable[[], None]
"""Called before every pass on every process; ends the evaluation by raising, on all or on none."""


def row_nats(engine: Engine, rows: Sequence[ScoredRow], batch: int, ask: Ask) -> list[tuple[float, bool]]:
    """Return the nats of what each row asks for, and whether greedy decoding would say it; alike on every process.

    Rows of like length go together, shared out among the data-parallel ranks, which call equally often.

    Args:
        engine: between two steps; every process must call.
        rows: what is asked.
        batch: rows at once, per data-parallel rank.
        ask: see `Ask`.
    """
    mesh = engine.mesh
    order = sorted(range(len(rows)), key=lambda number: (-len(rows[number].ids), number))
    nats, misses = [0.0] * len(rows), [0.0] * len(rows)
    for start in range(0, len(order), batch * mesh.data_parallel_size):
        portion = order[start : start + batch * mesh.data_parallel_size]
        mine = portion[mesh.data_parallel_rank :: mesh.data_parallel_size]
        ask()
        shape = (-(-len(portion) // mesh.data_parallel_size), _width(len(rows[portion[0]].ids) - 1, mesh))
        input_ids, labels = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORED_LABEL)
        for place, number in enumerate(mine):
            ids, asked = torch.tensor(rows[number].ids), rows[number].asked
            input_ids[place, : len(ids) - 1] = ids[:-1]
            labels[place, len(ids) - 1 - asked : len(ids) - 1] = ids[-asked:]
        for number, (found, missed) in zip(mine, engine.row_scores(input_ids, labels).tolist(), strict=False):
            nats[number], misses[number] = found, missed
    totals = mesh.sum_data_parallel(*nats, *misses)
    return [(found, missed == 0) for found, missed in zip(totals[: len(rows)], totals[len(rows) :], strict=True)]


def _width(longest: int, mesh: Mesh) -> int:
    step = math.lcm(_WIDTHS, mesh.layout.tensor)
    return -(-longest // step) * step


def task_figures(task: SignalTask, answers: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Turn the answers to a task's rows into figures for a row of metrics.

    Returns:
        `accuracy/<task>` and its standard error; of a task with targets also `target_perplexity/<task>`, the exponential
        of the mean nats of a target.
    """
    found = iter(answers)
    right = []
    for item in task.items:
        nats, greedy = zip(*islice(found, len(item.continuations)), strict=True)
        right.append(float(greedy[0] if item.answer is None else nats.index(min(nats)) == item.answer))
    figures = {f"accuracy/{task.name}": statistics.fmean(right),
               f"accuracy_stderr/{task.name}": statistics.stdev(right) / math.sqrt(len(right))}
    if not task.has_choices:
        mean = statistics.fmean(nats for nats, _ in answers)
        figures[f"target_perplexity/{task.name}"] = math.exp(mean) if mean < 700 else math.inf
    return figures


@dataclass(frozen=True)
class Sample:
    """What the model said."""

    prompt: str
    sampling: Sampling
    text: str
    """What follows the prompt."""
    new_tokens: int
    ended: bool
    """Whether it ended the document itself."""


def continuations(engine: Engine, prompts: dict[str, list[int]], tokenizer: Tokenizer, new_tokens: int, seed: int,
                  ask: Ask) -> list[Sample]:
    """Continue each prompt greedily, and once more drawn with a seed of its own; alike on every process.

    Without a cache of keys and values: every new token costs a pass over all rows. What the first process chooses holds
    for all, so that rounding cannot part them.

    Args:
        engine: between two steps; every process must call.
        prompts: ids by text.
        tokenizer: says which ids there are, and ends documents.
        new_tokens: of each sample at most.
        seed: of the draws.
        ask: see `Ask`.
    """
    mesh, count = engine.mesh, len(prompts)
    samplings = [Sampling(temperature=0.0)] * count + [Sampling(seed=seed)] * count
    chooser = TokenChooser(Sampling(seed=seed), count)
    begun = list(prompts.values()) * 2
    rows, ended = [list(ids) for ids in begun], [False] * len(begun)
    for _ in range(new_tokens):
        ask()
        input_ids = torch.zeros(len(rows), _width(max(map(len, rows)), mesh), dtype=torch.int64)
        for place, ids in enumerate(rows):
            input_ids[place, : len(ids)] = torch.tensor(ids)
        logits = engine.logits_at(input_ids, torch.tensor([len(ids) - 1 for ids in rows]))[:, : tokenizer.vocab_size]
        chosen = [*logits[:count].argmax(-1).tolist(), *chooser(logits[count:]).tolist()]
        for place, token in enumerate(mesh.sum(*(float(mesh.is_first) * token for token in chosen))):
            if not ended[place]:
                rows[place].append(int(token))
                ended[place] = int(token) == tokenizer.eos_id
        if all(ended):
            break
    texts = [tokenizer.decode(ids)[len(tokenizer.decode(start)) :] for ids, start in zip(rows, begun, strict=True)]
    return [Sample(prompt, sampling, text, len(ids) - len(start), end) for prompt, sampling, text, ids, start, end
            in zip([*prompts] * 2, samplings, texts, rows, begun, ended, strict=True)]
