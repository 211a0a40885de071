"""lm-eval's own task objects over rows of a test: what they ask, and what they make of answers."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class Rows(list):
    """Rows as lm-eval wants them: a list that knows its columns."""

    @property
    def features(self) -> dict[str, None]:
        return dict.fromkeys(name for row in self for name in row)


def ours(config: Mapping[str, Any], splits: Mapping[str, Sequence[Mapping[str, Any]]]) -> Any:
    """Return lm-eval's task for the definition of a pack."""
    pool = "fewshot" if "fewshot" in splits else "test"
    return _task({**config, "custom_dataset": lambda **_: {name: Rows(rows) for name, rows in splits.items()},
                  "test_split": "test", "fewshot_split": pool})


def theirs(path: str, splits: Mapping[str, Sequence[Mapping[str, Any]]]) -> Any:
    """Return the task of a YAML file of the installed lm-eval (path inside its tasks) over rows of its own shape."""
    import datasets
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    datasets.disable_progress_bars()
    config = load_yaml(Path(lm_eval.tasks.__file__).parent / path)
    for key in ("dataset_path", "dataset_name"):
        config.pop(key, None)
    return _task({**config, "custom_dataset": lambda **_: {name: datasets.Dataset.from_list(list(rows))
                                                           for name, rows in splits.items()}, "metadata": None})


def _task(config: dict[str, Any]) -> Any:
    from lm_eval.api.task import ConfigurableTask

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    task = ConfigurableTask(config=copy.deepcopy(config))
    task.set_fewshot_seed(0)
    return task


def asked(task: Any, shots: int | None = None) -> list[list[Any]]:
    """Return for every row the requests: (context, continuation), or (context, generation options)."""
    if shots is None:
        shots = task.config.num_fewshot or 0
    requests = []
    for number, row in enumerate(task.eval_docs):
        made = task.construct_requests(doc=row, ctx=task.fewshot_context(row, shots), metadata=("", number, 1))
        requests.append([one.args for one in (made if isinstance(made, list) else [made])])
    return requests


def scored(task: Any, answers: Sequence[Sequence[Any]]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Return what each row's answers count for, and the aggregated metrics."""
    rows = [task.process_results(row, answer) for row, answer in zip(task.eval_docs, answers, strict=True)]
    return rows, {name: float(aggregate([row[name] for row in rows])) for name, aggregate in task.aggregation().items()}
