"""Score answers that need no model, through the same harness as a model's: what a score must be compared with.

`random`: every choice as likely as any other. `majority`: always the most frequent answer of the test rows, where all
items have the same choices, a metric is one of classes (F1), or generated answers repeat. `longest`, `shortest`: the choice
with the most or the fewest characters, the first of several, where choices are texts of their own.

Random answers need no luck where a metric is a mean over items: a run per choice ("always the second") gives what each
item scores with each answer, and the mean over them is the expectation. Others (F1) are means over fixed draws.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from megatron_ttl.errors import DataError
from megatron_ttl.evaluate.item_values import item_values
from megatron_ttl.evaluate.task import Answerer, GenerationRequest, Request, Task, TaskResult

Runner = Callable[..., TaskResult]
"""`harness.run_task`: (task, answerer, shots, limit, seed) -> what came out."""

DRAWS = 10
"""Random draws for metrics that are no means over items."""
_NOT_CHOSEN = -1e3  # nats: nothing is left of it as a probability, and nothing overflows
_MOST_LABELS = 10  # answers that a generating task repeats


@dataclass
class FixedAnswers:
    """An `Answerer` that answers as it was told, and remembers what the choices were.

    Attributes:
        choices: continuations by item and number of the choice.
    """

    chosen: Callable[[int], int] = lambda item: 0
    """Number of the choice by item."""
    said: Callable[[int], str] = lambda item: ""
    """What is generated, by item."""
    choices: dict[int, dict[int, str]] = field(default_factory=dict)

    def loglikelihood(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """Give the chosen continuation all probability; greedy decoding would say none of them."""
        for request in requests:
            self.choices.setdefault(request.item, {}).setdefault(request.choice, request.continuation)
        return [(0.0 if request.choice == self.chosen(request.item) else _NOT_CHOSEN, False) for request in requests]

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """Refuse: whoever knows nothing of a language has no probability of a text."""
        raise DataError("baselines: rolling log-likelihoods; a baseline has none; leave the task without baselines")

    def generate(self, requests: Sequence[GenerationRequest]) -> list[str]:
        """Return what was told."""
        return [self.said(request.item) for request in requests]


def baselines(task: Task, run_task: Runner, limit: int | None = None, seed: int = 0) -> dict[str, dict[str, float]]:
    """Score every baseline that makes sense for a task; demonstrations are left out, for nobody reads them.

    Args:
        task: multiple choice, or generation of answers that repeat; any other has no baselines.
        run_task: `harness.run_task`.
        limit: only the first so many items.
        seed: as for `run_task`; draws of random answers have seeds of their own.

    Returns:
        For each metric the values by baseline.

    Raises:
        UserError: what `run_task` says of the task or its data.
    """
    data = task.load()
    run = partial(_run, run_task, replace(task, load=lambda: data), limit, seed)
    kind = task.config.get("output_type", "generate_until")
    found = _of_choices(task, run) if kind == "multiple_choice" else _of_texts(run) if kind == "generate_until" else {}
    by_metric: dict[str, dict[str, float]] = {}
    for name, values in found.items():
        for metric, value in values.items():
            by_metric.setdefault(metric, {})[name] = value
    return by_metric


def _run(run_task: Runner, task: Task, limit: int | None, seed: int, answerer: Answerer) -> TaskResult | None:
    """Run; None where the metrics of such answers do not exist, as a correlation with a constant."""
    try:
        return run_task(task, answerer, shots=0, limit=limit, seed=seed)
    except DataError as error:
        if "is no number" in str(error):
            return None
        raise


def _of_choices(task: Task, run: Callable[[Answerer], TaskResult | None]) -> dict[str, dict[str, float]]:
    recorder = FixedAnswers()
    first = run(recorder)
    if first is None or not recorder.choices:
        return {}
    counts = {item: len(choices) for item, choices in recorder.choices.items()}
    constants = [first, *(run(FixedAnswers(lambda item, choice=choice: choice)) for choice in range(1, max(counts.values())))]
    draws = (_drawn(counts, number) for number in range(DRAWS))
    found = {"random": _expected(constants, counts, lambda: [run(FixedAnswers(draw.__getitem__)) for draw in draws])}
    lists = list(dict.fromkeys(tuple(recorder.choices[item].values()) for item in sorted(recorder.choices)))
    all_labels = max(lists, key=len)  # exams have questions with four letters and with five
    of_classes = any(item_values(first.items, metric, measured.value) is None for metric, measured in first.metrics.items())
    told_apart = any(len(set(choices)) > 1 for choices in lists)  # not where the contexts are the choices
    if of_classes or (told_apart and all(all_labels[:len(choices)] == choices for choices in lists)):
        labels = [text.strip() for text in all_labels]
        majority = _most_frequent([_label_of(row["target"], labels) for row in first.items])
        found["majority"] = _values(constants[majority] if majority is not None else None)
    elif any(len(set(map(len, choices))) > 1 for choices in lists):
        for name, sign in (("longest", 1), ("shortest", -1)):
            picks = {item: max(choices, key=lambda number, choices=choices: (sign * len(choices[number]), -number))
                     for item, choices in recorder.choices.items()}
            found[name] = _values(run(FixedAnswers(picks.__getitem__)))
    return found


def _of_texts(run: Callable[[Answerer], TaskResult | None]) -> dict[str, dict[str, float]]:
    first = run(FixedAnswers())
    if first is None:
        return {}
    targets = [row["target"] for row in first.items]
    if not all(isinstance(target, str) for target in targets):
        return {}
    counts = Counter(targets)
    common, times = counts.most_common(1)[0]
    if times < 2:
        return {}  # answers of their own: no constant is a guess
    found = {"majority": _values(run(FixedAnswers(said=lambda item: common)))}
    labels = sorted(counts)
    if len(labels) <= _MOST_LABELS and 2 * len(labels) <= len(targets):
        constants = [run(FixedAnswers(said=lambda item, label=label: label)) for label in labels]
        sizes = {row["item"]: len(labels) for row in first.items}
        draws = (_drawn(sizes, number) for number in range(DRAWS))
        found["random"] = _expected(constants, sizes, lambda: [
            run(FixedAnswers(said=lambda item, draw=draw: labels[draw[item]])) for draw in draws])
    return found


def _drawn(counts: Mapping[int, int], seed: int) -> dict[int, int]:
    """Draw a choice for each item."""
    draw = np.random.default_rng(seed)
    return {item: int(draw.integers(counts[item])) for item in sorted(counts)}


def _expected(constants: Sequence[TaskResult | None], counts: Mapping[int, int],
              draws: Callable[[], list[TaskResult | None]]) -> dict[str, float]:
    """Return what random answers score: exactly for means over items, else the mean over draws, made only if needed.

    Args:
        constants: what came out for "always choice 0", "always choice 1", ...
        counts: choices by item.
        draws: makes the draws.
    """
    whole = [result for result in constants if result is not None]
    if len(whole) < len(constants):
        return _mean_values(draws())
    found = {}
    for metric in whole[0].metrics:
        scores = [item_values(result.items, metric, result.metrics[metric].value) for result in whole]
        if all(values is not None for values in scores):
            found[metric] = float(np.mean([np.mean([values[place] for values in scores[:counts[row["item"]]] if values])
                                           for place, row in enumerate(whole[0].items)]))
    if len(found) < len(whole[0].metrics):
        found |= {metric: value for metric, value in _mean_values(draws()).items() if metric not in found}
    return found


def _values(result: TaskResult | None) -> dict[str, float]:
    return {} if result is None else {metric: measured.value for metric, measured in result.metrics.items()}


def _mean_values(results: Sequence[TaskResult | None]) -> dict[str, float]:
    whole = [_values(result) for result in results if result is not None]
    return {metric: float(np.mean([values[metric] for values in whole])) for metric in (whole[0] if whole else ())}


def _label_of(target: Any, labels: Sequence[str]) -> int | None:
    """Return the number of the right choice, if it is one: tasks name it by number or by text."""
    if isinstance(target, str) and target.strip() in labels:
        return labels.index(target.strip())
    return target if isinstance(target, int) and 0 <= target < len(labels) else None


def _most_frequent(labels: Sequence[int | None]) -> int | None:
    counts = Counter(label for label in labels if label is not None)
    return min(counts, key=lambda label: (-counts[label], label)) if counts else None
