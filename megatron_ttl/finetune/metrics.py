"""Count right and wrong: accuracy, macro F1, figures per class, standard errors, the majority class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

METRICS = ("accuracy", "f1_macro")
_RESAMPLES = 1000


def confusion(targets: Sequence[int], predicted: Sequence[int], classes: int) -> np.ndarray:
    """Count rows by class (first axis) and prediction.  # [classes, classes]"""
    counts = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(counts, (np.asarray(targets, dtype=np.int64), np.asarray(predicted, dtype=np.int64)), 1)
    return counts


def accuracy(counts: np.ndarray) -> np.ndarray:
    """Return the share of rows that are right: [..., classes, classes] -> [...]"""
    return np.trace(counts, axis1=-2, axis2=-1) / counts.sum(axis=(-2, -1))


def f1_macro(counts: np.ndarray) -> np.ndarray:
    """Return the mean F1 of the classes that occur, as target or as prediction: [..., classes, classes] -> [...]"""
    hits = np.diagonal(counts, axis1=-2, axis2=-1)
    occurs = counts.sum(axis=-1) + counts.sum(axis=-2)
    return np.divide(2 * hits, occurs, out=np.zeros(hits.shape), where=occurs > 0).sum(-1) / (occurs > 0).sum(-1)


def measure(targets: Sequence[int], predicted: Sequence[int], names: Sequence[str]) -> dict[str, Any]:
    """Return the metrics, their standard errors, and figures per class.

    The standard error of accuracy is that of a share; of macro F1 the deviation over 1,000 seeded resamples of the rows.
    """
    counts = confusion(targets, predicted, len(names))
    n = int(counts.sum())
    share = float(accuracy(counts))
    resamples = np.random.default_rng(0).multinomial(n, counts.reshape(-1) / n, _RESAMPLES).reshape(-1, *counts.shape)
    classes = {}
    for number, name in enumerate(names):
        rows, said, hits = int(counts[number].sum()), int(counts[:, number].sum()), int(counts[number, number])
        classes[name] = {"rows": rows, "predicted": said, "right": hits, "precision": hits / said if said else None,
                         "recall": hits / rows if rows else None, "f1": 2 * hits / (rows + said) if rows + said else None}
    return {"n": n, "accuracy": share, "accuracy_stderr": math.sqrt(share * (1 - share) / n),
            "f1_macro": float(f1_macro(counts)), "f1_macro_stderr": float(f1_macro(resamples).std(ddof=1)),
            "classes": classes}


def majority(train_targets: Sequence[int], targets: Sequence[int], names: Sequence[str]) -> dict[str, Any]:
    """Measure the answer that needs no model: always the class that the training rows have most."""
    most = int(np.bincount(np.asarray(train_targets, dtype=np.int64), minlength=len(names)).argmax())
    figures = measure(targets, [most] * len(targets), names)
    return {"label": names[most], **{metric: figures[metric] for metric in METRICS}}
