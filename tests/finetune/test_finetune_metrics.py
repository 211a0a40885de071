"""Figures agree with scikit-learn's; the best and the majority answer are known."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_ttl.finetune.metrics import confusion, f1_macro, majority, measure
from megatron_ttl.finetune.training import rate_at


@pytest.mark.parametrize("seed", range(4))
def test_as_scikit_learn_counts(seed):
    from sklearn.metrics import accuracy_score, f1_score

    draw = np.random.default_rng(seed)
    targets, predicted = draw.integers(0, 3, 50), draw.integers(0, 3 - seed % 2, 50)
    if seed > 1:
        targets[targets == 2] = 0  # a class without rows
    figures = measure(targets, predicted, ("a", "b", "c"))
    assert figures["accuracy"] == pytest.approx(accuracy_score(targets, predicted))
    assert figures["f1_macro"] == pytest.approx(f1_score(targets, predicted, average="macro"))
    assert figures["accuracy_stderr"] == pytest.approx(np.std(targets == predicted) / np.sqrt(50))
    resampled = [f1_macro(confusion(targets[chosen], predicted[chosen], 3))
                 for chosen in (draw.integers(0, 50, 50) for _ in range(500))]
    assert figures["f1_macro_stderr"] == pytest.approx(np.std(resampled), rel=0.2)
    assert sum(row["rows"] for row in figures["classes"].values()) == figures["n"] == 50


def test_the_majority_is_that_of_the_training_rows():
    figures = majority([1, 1, 0], [0, 0, 0, 1], ("no", "yes"))
    assert figures == {"label": "yes", "accuracy": 0.25, "f1_macro": pytest.approx(0.2)}


def test_the_learning_rate_falls_linearly_to_nothing():
    assert [rate_at(step, 4) for step in range(5)] == [1, 0.75, 0.5, 0.25, 0]
    assert [rate_at(step, 10, 0.2) for step in (0, 1, 2, 6, 10)] == [0, 0.5, 1, 0.5, 0]
