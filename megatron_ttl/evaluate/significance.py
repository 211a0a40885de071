"""Whether two models differ on the same items: paired tests, since both were asked the same questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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
    return McNemar(only_a, only_b, float(_statistics().binomtest(only_a, only_a + only_b, 0.5).pvalue))


@dataclass(frozen=True)
class PairedDifference:
    """How far two models are apart on the same items."""

    difference: float
    """Score of the first one minus that of the second."""
    low: float
    high: float
    """Ends of the 95 % interval: items drawn anew, with what both models said of them."""
    p_value: float
    """How likely a difference at least so large is if it does not matter which model gave which answer."""


def paired_difference(a: Sequence[Any], b: Sequence[Any], score: Callable[[Sequence[Any]], float] | None = None,
                      resamples: int = 1999, seed: int = 0) -> PairedDifference:
    """Compare two models on the same items by any score: interval by paired bootstrap, p by exchanging answers.

    Args:
        a: what the first model has of each item: a figure, or whatever `score` takes.
        b: the same of the second model, item by item.
        score: makes a score of all items; None: their mean.
        resamples: draws, seeded; a p-value is at least 2 / (resamples + 1) unless all exchanges are tried.
        seed: of the draws.

    Raises:
        DataError: the two have not the same number of items, or fewer than two.
        ConfigError: scipy is not installed.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapters 13 and 15.
    """
    if len(a) != len(b) or len(a) < 2:
        raise DataError(f"comparison: one model has {len(a)} items and the other {len(b)}; both must have been asked the "
                        "same items, two or more; score them on the same data")
    statistics = _statistics()
    draws: dict[str, Any] = {"n_resamples": resamples, "batch": max(1, 4_000_000 // len(a))}
    if score is None:
        sides = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)

        def difference(x: np.ndarray, y: np.ndarray, axis: int = -1) -> Any:
            return x.mean(axis=axis) - y.mean(axis=axis)
    else:
        every = [*a, *b]
        sides = np.arange(len(a)), np.arange(len(a), len(every))
        draws["vectorized"] = False

        def difference(x: np.ndarray, y: np.ndarray, axis: int = -1) -> Any:
            return score([every[place] for place in x]) - score([every[place] for place in y])

    found = float(difference(*sides))
    if all(x == y for x, y in zip(a, b, strict=True)):
        return PairedDifference(found, 0.0, 0.0, 1.0)
    interval = statistics.bootstrap(sides, difference, paired=True, method="percentile", rng=np.random.default_rng(seed),
                                    **draws).confidence_interval
    exchanged = statistics.permutation_test(sides, difference, permutation_type="samples",
                                            rng=np.random.default_rng(seed), **draws)
    return PairedDifference(found, float(interval.low), float(interval.high), float(exchanged.pvalue))


def _statistics() -> Any:
    """Return scipy's statistics.

    Raises:
        ConfigError: scipy is not installed.
    """
    try:
        from scipy import stats
    except ImportError:
        raise ConfigError("scipy is not installed; it is needed for tests of significance; "
                          "pip install 'megatron_ttl[evaluation]'") from None
    return stats
