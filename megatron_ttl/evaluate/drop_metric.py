"""Compare an answer with the right one as DROP's authors do: exact match and F1 over aligned bags of words.

Source: Dua et al. 2019, DROP: A Reading Comprehension Benchmark Requiring Discrete Reasoning Over Paragraphs.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

import numpy as np

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def best_drop_scores(answer: str, references: Sequence[Sequence[str]]) -> tuple[float, float]:
    """Return exact match and F1 of an answer against whichever reference suits it best.

    Args:
        answer: one text.
        references: right answers, each a list of spans; one whose first span is blank counts nothing.
    """
    scores = [drop_scores([answer], reference) for reference in references if reference[0].strip()]
    return max((exact for exact, _ in scores), default=0.0), max((f1 for _, f1 in scores), default=0.0)


def drop_scores(predicted: Sequence[str], reference: Sequence[str]) -> tuple[float, float]:
    """Return exact match (0 or 1) and F1 (rounded to hundredths, as DROP does) of spans against spans."""
    mine, right = ([_normal(span) for span in spans] for spans in (predicted, reference))
    exact = float(len(mine) == len(right) and set(mine) == set(right))
    return exact, float(round(np.mean(_aligned([set(span.split()) for span in mine],
                                               [set(span.split()) for span in right])), 2))


def _aligned(predicted: Sequence[set[str]], reference: Sequence[set[str]]) -> np.ndarray:
    """Return the F1 of each pair of the best one-to-one alignment; what has no partner scores 0."""
    from scipy.optimize import linear_sum_assignment

    scores = np.array([[_f1(mine, right) if _numbers_agree(mine, right) else 0.0 for mine in predicted]
                       for right in reference])
    rows, columns = linear_sum_assignment(-scores)
    found = np.zeros(max(len(predicted), len(reference)))
    found[rows] = scores[rows, columns]
    return found


def _f1(mine: set[str], right: set[str]) -> float:
    shared = len(mine & right)
    precision = shared / len(mine) if mine else 1.0
    recall = shared / len(right) if right else 1.0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _numbers_agree(mine: set[str], right: set[str]) -> bool:
    """Whether no number is asked for, or one of those asked for is there."""
    numbers = {word for word in right if _is_number(word)}
    return not numbers or bool(numbers & mine)


def _normal(text: str) -> str:
    """Return a span in lower case without articles and punctuation, numbers written as floats."""
    words = (_normal_word(word) for word in re.split(" |-", text))
    return " ".join(word for word in words if word)


def _normal_word(word: str) -> str:
    word = word.lower()
    if not _is_number(word):
        word = word.translate(_PUNCTUATION)
    if _is_number(word):
        word = str(float(word))
    return " ".join(_ARTICLES.sub(" ", word).split())


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
