"""Results of fine-tuning: one JSON line per seed and metric, means over seeds, tables, and tests against another model."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from megatron_ttl.checkpoint.bounded_json import read_json_object
from megatron_ttl.console import print_table
from megatron_ttl.errors import CheckpointError, DataError, raise_faults
from megatron_ttl.evaluate.records import ScoredModel
from megatron_ttl.evaluate.significance import mcnemar
from megatron_ttl.files import write_text
from megatron_ttl.finetune.metrics import METRICS

RESULT, RECORDS, PREDICTIONS = "result.json", "finetune.jsonl", "predictions.json"
_CURE = "give output folders of finished fine-tunings"


class FineTuneRecord(BaseModel):
    """One figure: a line of `finetune.jsonl`."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", use_attribute_docstrings=True)

    time: str
    """UTC, ISO 8601, seconds."""
    model: ScoredModel
    """What was fine-tuned."""
    untrained: bool
    """Whether it began with random weights instead of its own."""
    task: str
    metric: str
    seed: int | None
    """None: the mean over all seeds."""
    value: float
    stderr: float | None
    """Of one seed: over the test rows."""
    deviation: float | None
    """Of the mean: standard deviation over the seeds; None with one seed."""
    seeds: int
    n: int
    """Test rows."""
    validation: float | None
    """The same metric on the validation rows, in the best epoch."""
    best_epoch: int | None
    baselines: dict[str, float]
    """The same metric for answers that need no model."""
    sample: bool
    """Whether the data are only a sample of the real ones."""
    data: str
    train_checksum: str
    test_checksum: str
    hyper_parameters: dict[str, Any]
    device: str
    versions: dict[str, str]


def summarize(seeds: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return mean and standard deviation (n - 1) over seeds of each metric on the test rows."""
    found = {}
    for metric in METRICS:
        values = [row["test"][metric] for row in seeds]
        found[metric] = {"mean": statistics.fmean(values), "seeds": len(values),
                         "deviation": statistics.stdev(values) if len(values) > 1 else None}
    return found


def write_records(output: Path, result: dict[str, Any]) -> None:
    """Write one line per seed and metric, then one per metric for all seeds."""
    fixed: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "model": ScoredModel(**result["model"]),
        "untrained": result["untrained"], "task": result["task"]["name"], "seeds": len(result["seeds"]),
        "n": result["rows"]["test"], "sample": result["data"]["sample"], "data": result["data"]["origin"],
        "train_checksum": result["data"]["train_checksum"], "test_checksum": result["data"]["test_checksum"],
        "hyper_parameters": _hyper_parameters(result), "device": result["device"], "versions": result["versions"]}
    records = []
    for metric in METRICS:
        own = {**fixed, "metric": metric, "baselines": {"majority": result["baselines"]["majority"][metric]}}
        records += [FineTuneRecord(**own, seed=row["seed"], value=row["test"][metric], deviation=None,
                                   stderr=row["test"][f"{metric}_stderr"], validation=row["validation"][metric],
                                   best_epoch=row["best_epoch"]) for row in result["seeds"]]
        mean = result["summary"][metric]
        records.append(FineTuneRecord(**own, seed=None, value=mean["mean"], deviation=mean["deviation"], stderr=None,
                                      validation=None, best_epoch=None))
    write_text(output / RECORDS, "".join(record.model_dump_json() + "\n" for record in records))


def _hyper_parameters(result: dict[str, Any]) -> dict[str, Any]:
    return {**result["training"], **{key: result[key] for key in ("max_tokens", "pooling", "separator", "validation",
                                                                  "split_seed")}}


def read_result(output: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the result of a finished fine-tuning.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = Path(output) / RESULT
    if not path.is_file():
        raise CheckpointError(f"{output}: has no {RESULT}; a finished fine-tuning has one; {_CURE}")
    return read_json_object(path)


def print_report(result: dict[str, Any]) -> None:
    """Print the seeds, their mean and deviation, and the majority class."""
    rows = result["rows"]
    table = [[f"seed {row['seed']}", row["best_epoch"], *_percent(row["validation"]), *_percent(row["test"])]
             for row in result["seeds"]]
    summary = result["summary"]
    table.append(["mean ± sd", None, None, None, *(_mean(summary[metric]) for metric in METRICS)])
    table.append(["majority class", None, None, None, *_percent(result["baselines"]["majority"])])
    parts = ("validation accuracy", "validation f1_macro", "test accuracy", "test f1_macro")
    print_table(("", "best epoch", *parts), table, title=f"{_label(result)} on {_task_label(result)}, %")
    stderr = 100 * result["seeds"][0]["test"]["accuracy_stderr"]
    print(f"{rows['train']:,} rows to learn from, {rows['validation']:,} to choose the epoch, {rows['test']:,} to judge "
          f"(standard error of one accuracy {stderr:.1f}); {rows['repeated']} repeated, {rows['contradictory']} "
          f"contradictory and {rows['test_rows_seen_in_training']} test rows seen in training left out; "
          f"{rows['cut_train'] + rows['cut_validation'] + rows['cut_test']} texts cut at {result['max_tokens']} tokens")


def compare(first: str | os.PathLike[str], second: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Compare two fine-tunings on the same test rows by McNemar's exact test.

    One row per seed that both have, and one, `seed` "vote", for what most seeds of each say (a tie goes to the first of
    the classes). Seeds share their test rows: their p-values are not independent and must not be multiplied.

    Raises:
        UserError: a folder is no finished fine-tuning, or the test rows are not the same.
    """
    results = [read_result(output) for output in (first, second)]
    checksums = [result["data"]["test_checksum"] for result in results]
    if checksums[0] != checksums[1]:
        raise DataError(f"{first}, {second}: were judged on other test rows ({checksums[0]}, {checksums[1]}); McNemar's "
                        "test needs the same; fine-tune both on the same data, with the same --split-seed")
    seeds = sorted(set.intersection(*({row["seed"] for row in result["seeds"]} for result in results)))
    said = [{seed: _predictions(output, seed, checksums[0]) for seed in [row["seed"] for row in result["seeds"]]}
            for output, result in zip((first, second), results, strict=True)]
    targets = said[0][seeds[0]]["targets"]
    rows = [(seed, [side[seed]["predicted"] for side in said]) for seed in seeds]
    rows.append(("vote", [_vote([answers["predicted"] for answers in side.values()]) for side in said]))
    found = []
    for seed, sides in rows:
        right = [[answer == target for answer, target in zip(side, targets, strict=True)] for side in sides]
        test = mcnemar(*right)
        found.append({"seed": seed, "accuracy": sum(right[0]) / len(targets), "other_accuracy": sum(right[1]) / len(targets),
                      "only_this_right": test.only_a, "only_other_right": test.only_b, "p_value": test.p_value})
    return found


def _predictions(output: str | os.PathLike[str], seed: int, test_checksum: str) -> dict[str, Any]:
    path = Path(output) / f"seed-{seed}" / PREDICTIONS
    found = read_json_object(path)
    if found.get("test_checksum") != test_checksum:
        raise CheckpointError(f"{path}: is about other rows than {RESULT}; both must be of one fine-tuning; {_CURE}")
    return found


def _vote(answers: Sequence[Sequence[int]]) -> list[int]:
    return [min(Counter(row).items(), key=lambda item: (-item[1], item[0]))[0] for row in zip(*answers, strict=True)]


def print_comparison(rows: Sequence[dict[str, Any]], other: str) -> None:
    """Print what `compare` found."""
    print_table(("", "accuracy", "other", "only this right", "only other right", "p"),
                [[f"seed {row['seed']}" if row["seed"] != "vote" else "vote of seeds", 100 * row["accuracy"],
                  100 * row["other_accuracy"], row["only_this_right"], row["only_other_right"], row["p_value"]]
                 for row in rows],
                title=f"McNemar's exact test against {other}")


def comparison_table(outputs: Sequence[str | os.PathLike[str]], 
                     metric: str = "accuracy") -> tuple[list[str], list[list[Any]]]:
    """Put results side by side as the paper's Table 5 does: models by tasks, and an average where a row is complete.

    Results whose hyper-parameters are not those of most say so behind the model's name: they are rows of their own.

    Returns:
        Header and rows; cells are `mean ± deviation` over seeds in per cent, the average is of the means.

    Raises:
        UserError: a folder is no result, a cell has two, or models were judged on other rows of a task.
    """
    results = [read_result(output) for output in outputs]
    tasks = list(dict.fromkeys(_task_label(result) for result in results))
    raise_faults(DataError, _test_faults(outputs, results))
    common = _most_frequent(results)
    cells: dict[str, dict[str, dict[str, Any]]] = {}
    faults = []
    for output, result in zip(outputs, results, strict=True):
        other = [f"{key} {json.dumps(value)}" for key, value in _training_of(result).items() if value != common.get(key)]
        label, task = _label(result) + (f" ({', '.join(other)})" if other else ""), _task_label(result)
        if task in cells.setdefault(label, {}):
            faults.append(f"{output}: is a second result of {label} on {task}; a table has one in each place; leave one out")
        cells[label][task] = result["summary"][metric]
    raise_faults(DataError, faults)
    majority = {_task_label(result): result["baselines"]["majority"][metric] for result in results}
    rows = []
    for label, own in cells.items():
        means = [own[task]["mean"] for task in tasks if task in own]
        rows.append([label, *(_mean(own[task]) if task in own else None for task in tasks),
                     f"{100 * statistics.fmean(means):.2f}" if len(means) == len(tasks) else None])
    rows.append(["majority class", *(f"{100 * majority[task]:.2f}" for task in tasks),
                 f"{100 * statistics.fmean(majority.values()):.2f}"])
    return ["", *tasks, "average"], rows


def _test_faults(outputs: Sequence[str | os.PathLike[str]], results: Sequence[dict[str, Any]]) -> list[str]:
    first: dict[str, tuple[Any, str]] = {}
    faults = []
    for output, result in zip(outputs, results, strict=True):
        task, checksum = result["task"]["name"], result["data"]["test_checksum"]
        other, wanted = first.setdefault(task, (output, checksum))
        if checksum != wanted:
            faults.append(f"{output}: was judged on other rows of {task} than {other} ({checksum}, {wanted}); figures in "
                          "one column must be about the same rows; leave one of them out")
    return faults


def _training_of(result: dict[str, Any]) -> dict[str, Any]:
    """Return what two models of one table should have in common; how they read texts is their own, and what an encoder pools."""
    pooling = {"pooling": result["pooling"]} if result["pooling"] != "[CLS]" else {}
    return {**result["training"], "validation": result["validation"], "split_seed": result["split_seed"], **pooling}


def _most_frequent(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the value of each hyper-parameter that most results have."""
    every = [_training_of(result) for result in results]
    return {key: Counter(row[key] for row in every if key in row).most_common(1)[0][0]
            for key in {key: None for row in every for key in row}}


def _label(result: dict[str, Any]) -> str:
    return result["model"]["name"] + (", untrained" if result["untrained"] else "")


def _task_label(result: dict[str, Any]) -> str:
    return result["task"]["name"] + (" (sample)" if result["data"]["sample"] else "")


def _percent(figures: dict[str, Any]) -> list[str]:
    return [f"{100 * figures[metric]:.2f}" for metric in METRICS]


def _mean(summary: dict[str, Any]) -> str:
    deviation = "" if summary["deviation"] is None else f" ± {100 * summary['deviation']:.2f}"
    return f"{100 * summary['mean']:.2f}{deviation}"
