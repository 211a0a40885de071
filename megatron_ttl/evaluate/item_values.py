"""What a metric says of single items, and whether the score is no more than the mean of that."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def item_values(items: Sequence[Mapping[str, Any]], metric: str, value: float) -> list[float] | None:
    """Return a metric's figure of each item if their mean is the score; None for F1, a correlation and the like.

    Args:
        items: rows of `TaskResult.items`.
        metric: its name.
        value: the score of all items.
    """
    values = [row.get(metric) for row in items]
    if not values or not all(isinstance(figure, (int, float)) for figure in values):
        return None
    figures = [float(figure) for figure in values]
    return figures if math.isclose(float(np.mean(figures)), value, rel_tol=1e-9, abs_tol=1e-12) else None
