"""Whether two models differ on the same items: paired tests, since both were asked the same questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ttl.errors import ConfigError, DataError


@dataclass(frozen=True)
class McNemar:
    """What McNemar's exact test says of two models on the same items."""

    only_a: int
    """Items that only the first one got right."""
    only_b: int
    """Items that only the second one got right."""
    p_value: float
    """How likely a split at least so uneven is if neither model is better; 1 where no item tells them apart."""


def mcnemar(a_correct: Sequence[bool], b_correct: Sequence[bool]) -> McNemar:
    """Compare two models on the same items, right or wrong each, by McNemar's exact test, two-sided.

    Items that both or neither got right say nothing; of the others each is a fair coin if neither model is better.

    Args:
        a_correct: whether the first model got each item right.
        b_correct: the same of the second model, item by item.

    Raises:
        DataError: the two have not the same number of items.
        ConfigError: scipy is not installed.

    Source: McNemar 1947, Psychometrika 12; the exact form by the binomial distribution.
    """
    a, b = np.asarray(a_correct, dtype=bool), np.asarray(b_correct, dtype=bool)
    if a.shape != b.shape:
        raise DataError(f"comparison: one model has {a.size} items and the other {b.size}; both must have been asked the "
                        "same items; score them on the same data")
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    if not only_a + only_b:
        return McNemar(0, 0, 1.0)
    try:
        from scipy.stats import binomtest
    except ImportError:
        raise ConfigError("scipy is not installed; it is needed for McNemar's test; "
                          "pip install 'megatron_ttl[evaluation]'") from None
    return McNemar(only_a, only_b, float(binomtest(only_a, only_a + only_b, 0.5).pvalue))
