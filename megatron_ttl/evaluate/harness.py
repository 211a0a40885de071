"""Run a task with lm-eval, the harness whose prompts, metrics and aggregations the field's tables are made of.

Rows, model and randomness are ours: the rows are read by the task, from local files; the model is any `Answerer`; the
demonstrations are drawn with our seed. Templates of packs run in a sandbox. Nothing is fetched from anywhere.
"""

from __future__ import annotations

import copy
import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from megatron_ttl.errors import ConfigError, DataError, UserError, raise_faults
from megatron_ttl.evaluate.demonstrations import with_own_demonstrations
from megatron_ttl.evaluate.harness_model import GENERATION_OPTIONS, Bar, language_model
from megatron_ttl.evaluate.task import Answerer, Measured, Task, TaskData, TaskResult
from megatron_ttl.runtime import set_default_variable

_RESAMPLES = 200
"""For standard errors without a formula: 5 % exact. lm-eval takes 100,000 (330 s for an F1), for translation 100."""
_SLOW_METRICS = ("bleu", "chrf", "chrf++", "ter")


class _Rows(list):
    """Rows as lm-eval wants them: a list that knows its columns."""

    @property
    def features(self) -> dict[str, None]:
        return dict.fromkeys(name for row in self for name in row)


def run_task(task: Task, answerer: Answerer, shots: int | None = None, limit: int | None = None, seed: int = 0,
             progress: Bar | None = None, standard_errors: bool = True) -> TaskResult:
    """Ask an answerer all that a task asks, and measure the answers.

    The global random generators are neither seeded nor drawn from, so that a run may evaluate while it trains.

    Args:
        task: what is asked.
        answerer: who is asked.
        shots: demonstrations before every question; None: as many as the task is defined with.
        limit: ask only about the first so many items; None: about all.
        seed: which demonstrations are drawn; the same seed draws the same.
        progress: opens a bar for a number of requests, as `console.progress` does.
        standard_errors: compute them; who needs none saves the bootstrap of metrics without a formula.

    Returns:
        Metrics with standard errors (None of a single item), and the rows behind them.

    Raises:
        ConfigError: lm-eval is not installed, or the task asks for what is not offered.
        DataError: definition and rows do not fit together.
        UserError: what the answerer refuses.
    """
    _load_harness()
    from lm_eval.evaluator import evaluate

    raise_faults(ConfigError, _unknown_wishes(task))
    shots = shots_of(task, shots)
    data = task.load()
    model = language_model(task.name, answerer, progress)
    cut_before = getattr(answerer, "truncated", 0)
    try:
        with np.errstate(divide="ignore", invalid="ignore"):  # acc_norm of a blank answer: minus infinity, never best
            built = _build(task, data, shots, seed)
            _require_gold(task, built, limit)
            found = evaluate(model, {"tasks": {task.name: built}}, limit=limit, bootstrap_iters=0)
            samples = found["samples"][task.name]
            metrics = _measure(task, built, samples, standard_errors)
    except UserError:
        raise
    except Exception as error:
        if model.answering:
            raise
        if isinstance(error, OverflowError):
            raise DataError(f"task {task.name}: a metric is no number: it overflows, as a perplexity above 1e308 does; it "
                            "must be one; look at the model and the rows") from error
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise DataError(f"task {task.name}: its definition does not fit its rows ({reason}); templates, metrics and "
                        "rows must belong together; correct the pack, or the data file") from error
    return TaskResult(task, shots, limit, metrics, _items(samples), data, model.request_checksum,
                      getattr(answerer, "truncated", 0) - cut_before)


def shots_of(task: Task, shots: int | None) -> int:
    """Return how many demonstrations a task gets when so many are asked for.

    One whose definition says `num_fewshot: 0` gets none (TruthfulQA's are part of its prompt), as in lm-eval.
    """
    if shots is None or task.config.get("num_fewshot") == 0:
        return task.shots
    return shots


def harness_versions() -> dict[str, str]:
    """Return the versions of what decides a score besides the model, as far as it is installed."""
    from importlib import metadata

    versions = {}
    for package in ("megatron_ttl", "lm_eval", "torch", "jinja2", "scikit-learn", "scipy", "sacrebleu"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


@functools.cache
def _load_harness() -> None:
    """Import lm-eval once; quiet, and with templates in a sandbox.

    Raises:
        ConfigError: it is not installed.
    """
    set_default_variable("TOKENIZERS_PARALLELISM", "false")
    try:
        import lm_eval.api.task
        import lm_eval.evaluator
        import lm_eval.utils
    except ImportError as error:
        raise ConfigError(f"lm-eval is not installed ({error}); it is needed for evaluation on tasks; "
                          "pip install 'megatron_ttl[evaluation]'") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings speak of keys that we set
    lm_eval.api.task.tqdm = lambda rows, **_: rows
    lm_eval.utils.env = sandbox(lm_eval.utils.env.filters["regex_replace"])


def sandbox(regex_replace: Callable[..., str]) -> Any:
    """Return an environment for templates as lm-eval's, in which a template reaches no code and changes no value."""
    from jinja2 import BaseLoader, StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(loader=BaseLoader(), undefined=StrictUndefined,
                                                keep_trailing_newline=True)
    environment.filters["regex_replace"] = regex_replace
    # lm-eval has a template compiled anew for every row.
    environment.from_string = functools.lru_cache(maxsize=256)(environment.from_string)
    return environment


def _unknown_wishes(task: Task) -> Iterator[str]:
    """Yield what lm-eval would fetch from a hub, run as code, or silently hand to a model that does not know it."""
    from lm_eval.api.registry import metric_registry

    for key in ("use_prompt", "unsafe_code", "doc_to_image", "doc_to_audio"):
        if task.config.get(key):
            yield f"task {task.name}: {key}: is not offered; a task must do without it; take it out of the pack"
    for entry in task.config.get("metric_list") or ():
        name = entry.get("metric")
        ours = callable(name) or task.config.get("process_results") or name in metric_registry
        if entry.get("hf_evaluate") or not ours:
            yield (f"task {task.name}: metric {name!r}: would be code from a hub; it must be one of lm-eval's own; "
                   "choose one of those, or let process_results name a function that counts")
    for option in sorted(set(task.config.get("generation_kwargs") or ()) - GENERATION_OPTIONS):
        yield (f"task {task.name}: generation_kwargs.{option}: is not known; the options are "
               f"{', '.join(sorted(GENERATION_OPTIONS))}; take it out of the pack")


def _build(task: Task, data: TaskData, shots: int, seed: int) -> Any:
    """Return lm-eval's task over our rows."""
    from lm_eval.api.task import ConfigurableTask

    class OverRows(ConfigurableTask):
        """lm-eval's task, which looks at the first letter of every choice of the first row when it is made."""

        def doc_to_choice(self, doc: Any, doc_to_choice: Any = None) -> list[str]:
            choices = super().doc_to_choice(doc, doc_to_choice)
            return choices if hasattr(self, "ready") else [choice or " " for choice in choices]

    config = copy.deepcopy({key: value for key, value in task.config.items()
                            if not key.startswith("dataset_") and not key.endswith("_split")})
    demonstrations = dict(config.get("fewshot_config") or {})
    process = config.pop("process_docs", None)
    splits = _splits(task, data, process, demonstrations.pop("process_docs", None) or process)
    demonstrations.pop("split", None)
    samples = demonstrations.get("samples")
    # Without the name of a split lm-eval would draw from the test rows, the row in question among them.
    pool = None if samples is not None else "fewshot" if "fewshot" in splits else "test"
    if shots:
        _require_pool(task, len(splits[pool] if pool else samples() if callable(samples) else samples),
                      shots + (pool == "test"))
    config |= {"task": task.name, "custom_dataset": lambda **_: splits, "test_split": "test", "fewshot_split": pool,
               "num_fewshot": shots}
    if demonstrations:
        config["fewshot_config"] = demonstrations
    kind = with_own_demonstrations(OverRows, task.demonstrations_column) if task.demonstrations_column else OverRows
    built = kind(config=config)
    built.ready = True
    built.set_fewshot_seed(seed)
    return built


def _splits(task: Task, data: TaskData, process: Callable | None, process_shots: Callable | None) -> dict[str, _Rows]:
    """Return the rows of every split, processed once; lm-eval would process them whenever it looks at them."""
    splits = {}
    for name, rows in data.splits.items():
        change = process if name == "test" else process_shots
        own = _Rows(dict(row) for row in rows)
        splits[name] = _Rows(change(own)) if change else own
    if not splits.get("test"):
        raise DataError(f"task {task.name}: {data.origin}: no item is left to ask about; there must be at least one; "
                        "give the whole file")
    return splits


def _require_pool(task: Task, rows: int, needed: int) -> None:
    if rows < needed:
        raise DataError(f"task {task.name}: {rows} rows to take demonstrations from; {needed} are needed for this many "
                        "shots; give a larger file, or --shots fewer")


def _require_gold(task: Task, built: Any, limit: int | None) -> None:
    """Refuse rows whose answer is none of their choices: lm-eval would count them as answered wrongly.

    Raises:
        DataError: there are such rows.
    """
    if built.OUTPUT_TYPE != "multiple_choice" or task.config.get("process_results"):
        return
    wrong = []
    for item, row in list(enumerate(built.eval_docs))[:limit]:
        choices = built.doc_to_choice(row)
        gold = built.doc_to_text(row) if built.multiple_input else built.doc_to_target(row)
        for one in gold if isinstance(gold, list) else [gold]:
            if not (one in choices if isinstance(one, str) else 0 <= one < len(choices)):
                wrong.append(f"item {item}: {one!r}")
    if wrong:
        raise DataError(f"task {task.name}: {len(wrong)} answers that are none of the choices ({', '.join(wrong[:5])}); "
                        "every row must hold its right answer; correct the data file")


def _measure(task: Task, built: Any, samples: Sequence[Mapping[str, Any]],
             standard_errors: bool) -> dict[str, Measured]:
    """Aggregate each metric as the task says; the task's own order first."""
    from lm_eval.api.metrics import mean

    values: dict[tuple[str, str], list[Any]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            values.setdefault((_metric_name(metric, sample, samples), metric), []).append(sample[metric])
    found = {}
    for (name, metric), items in values.items():
        aggregate = built.aggregation().get(metric, mean)
        value = float(aggregate(items))
        if not math.isfinite(value):
            raise DataError(f"task {task.name}: {name}: is no number ({value}) for these {len(items)} items; it must be "
                            "one; give more items, or look at the model and the rows")
        found[name] = Measured(value, _standard_error(metric, aggregate, items) if standard_errors else None)
    if missing := [metric for metric in task.metrics if metric not in found]:
        raise ConfigError(f"task {task.name}: metrics: {', '.join(missing)}; what is measured is {', '.join(found)}; "
                          "correct the pack's metric_list")
    return {name: found[name] for name in [*task.metrics, *(name for name in found if name not in task.metrics)]}


def _metric_name(metric: str, sample: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> str:
    """Name a metric: plainly after the task's first filter, with the filter's name after any other."""
    return metric if sample["filter"] == samples[0]["filter"] else f"{metric},{sample['filter']}"


def _standard_error(metric: str, aggregate: Callable[[Sequence[Any]], float], items: Sequence[Any]) -> float | None:
    """Return lm-eval's own formula, or its bootstrap: one process, seeded, bounded."""
    from lm_eval.api import metrics

    formula = {metrics.mean: metrics.mean_stderr, metrics.acc_all: metrics.acc_all_stderr}.get(aggregate)
    if len(items) < 2:
        return None
    if formula:
        return float(formula(items))
    draw = metrics._bootstrap_internal(aggregate, 100 if metric in _SLOW_METRICS else _RESAMPLES)
    try:
        error = float(metrics.sample_stddev(draw((0, items))))
    except (ValueError, ZeroDivisionError):  # a metric may not exist for some resample: one class only
        return None
    return error if math.isfinite(error) else None


def _items(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per document: number, target, answers, and what each metric made of it."""
    items: dict[int, dict[str, Any]] = {}
    for sample in samples:
        answers = [_plain(answer[0] if isinstance(answer, tuple) else answer)
                   for repeats in sample["resps"] for answer in repeats]
        item = items.setdefault(sample["doc_id"], {"item": sample["doc_id"], "target": _plain(sample["target"]),
                                                   "answers": answers})
        if sample["filter"] == "verdicts":
            item["verdicts"] = _plain(sample["filtered_resps"][0])
        for metric in sample["metrics"]:
            item[_metric_name(metric, sample, samples)] = _plain(sample[metric])
    return [items[number] for number in sorted(items)]


def _plain(value: Any) -> Any:
    """Return numpy's scalars and arrays as what JSON knows."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value
