"""Compare two models on the items that both were asked: which differences of scores are more than chance.

Right or wrong: McNemar's exact test. Figures, and scores that are no mean over items (F1, correlations): the models'
answers to an item are exchanged at random, and the interval comes from items drawn anew. Both need the items that
tools/evaluate.py keeps beside the scores.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ttl.console import print_table
from megatron_ttl.data.documents import read_chunks
from megatron_ttl.errors import DataError, on_one_line
from megatron_ttl.evaluate.evaluate_tasks import items_path
from megatron_ttl.evaluate.item_values import item_values
from megatron_ttl.evaluate.pack_functions import macro_f1, mean_squared_error, pearson
from megatron_ttl.evaluate.records import SCORES_FILE, ScoreRecord, differences, read_records, say
from megatron_ttl.evaluate.score_table import choose_scores
from megatron_ttl.evaluate.significance import mcnemar, paired_difference

_SCORES: dict[str, Callable[[Sequence[Any]], float]] = {
    "f1": macro_f1, "f1_macro": macro_f1, "pearson": pearson, "pearsonr": pearson, "mse": mean_squared_error,
    "perplexity": lambda logs: math.exp(-float(np.mean(logs))),
}
"""How items become a score, where it is not their mean; believed only if it gives the recorded score again."""
_MOST_ITEM_BYTES = 64 << 20
_RESAMPLES = 999  # of scores that are computed anew for each


def compare(first: str | os.PathLike[str], second: str | os.PathLike[str], tasks: Sequence[str] = (),
            metrics: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Compare two models on every task and metric that both have.

    Args:
        first, second: model folders, run folders or files of scores; `@1000` behind a run chooses a step.
        tasks, metrics: as for `score_table.choose_scores`.

    Returns:
        A row per task and metric, values and differences in the metric's own unit.

    Raises:
        DataError: they have no task in common, were asked differently, or the items are not there.
    """
    (a_path, a_records), (b_path, b_records) = _scores_of(first), _scores_of(second)
    a_records = choose_scores(a_records, tasks, metrics)
    b_records = choose_scores(b_records, tasks, metrics)
    shared = [key for key in dict.fromkeys(map(_question, a_records)) if key in set(map(_question, b_records))]
    if not shared:
        raise DataError(f"{first}, {second}: have no score of the same task and metric; they must have one; evaluate both "
                        "on the same tasks")
    rows = []
    for key in shared:
        a, b = _pair([record for record in a_records if _question(record) == key],
                     [record for record in b_records if _question(record) == key], str(first), str(second))
        rows.append(_compared(a, _read_items(items_path(a_path, a)), b, _read_items(items_path(b_path, b))))
    return rows


def print_comparison(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print what `compare` found, and how it was found."""
    columns = ("task", "metric", "n", "first", "second", "difference", "interval", "only first right", "only second right", "p")
    print_table(columns, [[row["task"], row["metric"], row["n"], row["first"], row["second"], row["difference"],
                           "-" if row["low"] is None else f"{row['low']:.4g} to {row['high']:.4g}",
                           row["only_first"], row["only_second"], f"{row['p']:.3g}"] for row in rows],
                title=f"{rows[0]['first_model']} against {rows[0]['second_model']}")
    print("p: McNemar's exact test where items are right or wrong, else by exchanging answers; of each comparison alone: "
          f"{len(rows)} of them find {len(rows) * 0.05:.2g} below 0.05 by chance")


def _question(record: ScoreRecord) -> tuple[str, str]:
    return record.task, record.metric


def _scores_of(place: str | os.PathLike[str]) -> tuple[Path, list[ScoreRecord]]:
    """Return a file of scores and its rows: of one step, if it is named, else of the last one."""
    name, _, step = os.fspath(place).rpartition("@")
    chosen = int(step) if name and step.isdecimal() and not os.path.exists(place) else None
    path = Path(os.fspath(place) if chosen is None else name)
    path = path / SCORES_FILE if path.is_dir() else path
    records = read_records(path)
    steps = {record.model.step for record in records if record.model.step is not None}
    if chosen is not None and chosen not in steps:
        raise DataError(f"{place}: has no scores of step {chosen}; it must be one of "
                        f"{', '.join(map(str, sorted(steps))) or 'none'}; evaluate that checkpoint")
    if steps:
        records = [record for record in records if record.model.step == (max(steps) if chosen is None else chosen)]
    return path, records


def _pair(first: Sequence[ScoreRecord], second: Sequence[ScoreRecord], a_name: str,
          b_name: str) -> tuple[ScoreRecord, ScoreRecord]:
    """Return the newest pair of rows that were asked the same."""
    alike = [(a, b) for a in first for b in second if not differences(a, b)]
    if alike:
        return max(alike, key=lambda pair: (pair[0].time, pair[1].time))
    a, b = first[-1], second[-1]
    what = "; ".join(f"{say(each, a)} in {a_name}, {say(each, b)} in {b_name}" for each in differences(a, b))
    raise DataError(f"{a.task}: {a.metric}: {what}; both must have been asked the same; evaluate one of them again")


def _read_items(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise DataError(f"{path}: does not exist; it must hold the items behind the scores; copy it with them, or evaluate "
                        "again with --again")
    rows, left = [], _MOST_ITEM_BYTES
    try:
        for chunk in read_chunks(path):
            left -= sum(map(len, chunk.lines))
            if left < 0:
                raise DataError(f"{path}: unpacks to more than {_MOST_ITEM_BYTES >> 20} MiB; items have a kilobyte each; "
                                "evaluate again with --again")
            rows += [json.loads(line) for line in chunk.lines]
        if all(isinstance(row["item"], int) for row in rows):
            return rows
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
    raise DataError(f"{path}: is no file of items; it must be as tools/evaluate.py wrote it; evaluate again with --again")


def _compared(a: ScoreRecord, a_items: list[dict[str, Any]], b: ScoreRecord, b_items: list[dict[str, Any]]) -> dict[str, Any]:
    if [(row["item"], row.get("target")) for row in a_items] != [(row["item"], row.get("target")) for row in b_items]:
        raise DataError(f"{a.task}: the items of {a.model.name} and {b.model.name} are not the same; they must be, with the "
                        "same right answers; evaluate both again with --again")
    row = {"task": on_one_line(a.task), "metric": on_one_line(a.metric), "n": len(a_items), "first_model": _label(a), "second_model": _label(b),
           "first": a.value, "second": b.value, "difference": a.value - b.value, "low": None, "high": None,
           "only_first": None, "only_second": None}
    sides = [item_values(items, record.metric, record.value) for record, items in ((a, a_items), (b, b_items))]
    if sides[0] is None or sides[1] is None:
        found = paired_difference(*_of_classes(a, a_items, b, b_items), _RESAMPLES)
        return row | {"low": found.low, "high": found.high, "p": found.p_value}
    found = paired_difference(sides[0], sides[1])
    row |= {"low": found.low, "high": found.high, "p": found.p_value}
    if set(sides[0]) | set(sides[1]) <= {0.0, 1.0}:
        test = mcnemar([value == 1 for value in sides[0]], [value == 1 for value in sides[1]])
        row |= {"only_first": test.only_a, "only_second": test.only_b, "p": test.p_value}
    return row


def _of_classes(a: ScoreRecord, a_items: Sequence[Mapping[str, Any]], b: ScoreRecord,
                b_items: Sequence[Mapping[str, Any]]) -> tuple[list[Any], list[Any], Callable[[Sequence[Any]], float]]:
    """Return what a metric keeps of each item, and how it becomes the score.

    Raises:
        DataError: that does not give the recorded scores.
    """
    score = _SCORES.get(a.metric.split(",")[0])
    sides = [[row.get(a.metric) for row in items] for items in (a_items, b_items)]
    try:
        if score and all(math.isclose(score(side), record.value, rel_tol=1e-9, abs_tol=1e-12)
                         for side, record in zip(sides, (a, b), strict=True)):
            return sides[0], sides[1], score
    except (TypeError, ValueError):
        pass
    raise DataError(f"{a.task}: {a.metric}: is not known to come from its items; metrics that are means over items, and "
                    f"{', '.join(sorted(_SCORES))}, can be compared; choose others with --metrics")


def _label(record: ScoreRecord) -> str:
    return on_one_line(record.model.name + ("" if record.model.step is None else f" @ {record.model.step:,}"))
