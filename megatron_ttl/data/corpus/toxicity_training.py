"""Train, calibrate and measure a toxicity classifier on labelled texts: three parts that share no text.

The split hashes each text with the seed, so a text always falls into the same part, whatever stands around it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megatron_ttl import __version__
from megatron_ttl.data.corpus.toxicity import (
    Calibration, Threshold, ToxicityClassifier, ngram_hasher, save_classifier, words_of,
)
from megatron_ttl.data.documents import input_faults
from megatron_ttl.data.strict_records import read_records
from megatron_ttl.errors import ConfigError, DataError, raise_faults
from megatron_ttl.files import checksum

DIALECT_WARNING = ("a classifier repeats the judgement of its labels: look at what it calls toxic in dialects, slang and "
                   "the words of minorities before anything is filtered by it")
PARTS = ("training", "calibration", "test")
_BOUNDS = (0.6, 0.8)  # shares of the texts: 60 % to learn from, 20 % to calibrate, 20 % to measure
_FEWEST = 10  # texts of each label in each part: below, an interval says nothing
_PENALTIES = (100.0, 300.0, 1000.0, 3000.0)  # inverse strengths of the L2 penalty; cross-validation chooses
_RESAMPLES = 1000
_MOST_FAULTS = 100


@dataclass(frozen=True)
class Labelled:
    """Texts and whether they are toxic."""

    texts: list[str]
    toxic: np.ndarray
    """bool, shape [texts]."""


@dataclass(frozen=True)
class LabelNames:
    """How the input says what it says."""

    text_key: str = "text"
    label_key: str = "label"
    toxic: tuple[str, ...] = ("1", "true")
    """Labels of toxic texts; numbers and booleans as JSON writes them."""
    clean: tuple[str, ...] = ("0", "false")
    """Labels of the others."""


def train_toxicity(paths: Sequence[str], output: str | Path, names: LabelNames | None = None, *,
                   precision: float | None = None, recall: float | None = None, seed: int = 0,
                   overwrite: bool = False, on_progress: Callable[[float], None] | None = None) -> dict[str, Any]:
    """Train a classifier and write its folder; the same input gives the same bytes.

    Args:
        paths: `.jsonl` or `.jsonl.gz` files of labelled texts; every line must be one.
        output: folder to write.
        names: keys and labels of the input.
        precision: choose the lowest threshold that reaches it on the calibration part; or
        recall: choose the highest threshold that reaches it.
        seed: of the split and of the intervals.
        overwrite: replace a folder that is there.
        on_progress: told how many bytes have been read.

    Returns:
        What was trained and how good it is on the held-out part, flat; `table` has a row per threshold.

    Raises:
        ConfigError: a setting is out of range, or the output exists.
        DataError: the input is not what it must be, too small, or teaches nothing.
    """
    output, names = Path(output), names or LabelNames()
    raise_faults(ConfigError, _setting_faults(output, names, precision, recall, seed, overwrite))
    raise_faults(DataError, input_faults(paths))
    hasher = ngram_hasher()
    files = [{"file": Path(path).name, "checksum": checksum(path)} for path in paths]
    labelled, left_out = read_labelled(paths, names, on_progress)
    parts = split(labelled, seed)
    raise_faults(DataError, _size_faults(parts))
    weights, penalty = _fit(parts["training"], hasher)
    plain = ToxicityClassifier(weights, Calibration(slope=1.0, offset=0.0))
    margins = np.array([plain.margin(text) for text in parts["calibration"].texts])
    calibration = fit_sigmoid(margins, parts["calibration"].toxic)
    classifier = ToxicityClassifier(weights, calibration)
    probabilities = {part: np.array([classifier.probability(text) for text in parts[part].texts]) for part in PARTS[1:]}
    threshold = choose_threshold(parts["calibration"].toxic, probabilities["calibration"], precision, recall)
    toxic, scores = parts["test"].toxic, probabilities["test"]
    quality = measure(toxic, scores, threshold.value, seed)
    table = threshold_table(toxic, scores)
    sizes = {name: {"texts": len(part.texts), "toxic": int(part.toxic.sum())} for name, part in parts.items()}
    training = {"inputs": files, "text_key": names.text_key, "label_key": names.label_key, "toxic": list(names.toxic),
                "clean": list(names.clean), "seed": seed, "parts": sizes, **left_out, "penalty": penalty,
                "versions": {"megatron_ttl": __version__, "scikit-learn": _sklearn_version()}}
    save_classifier(output, weights, calibration=calibration, threshold=threshold, training=training, quality=quality,
                    table=tuple(table))
    return {"output": str(output), **{f"{name}_texts": size["texts"] for name, size in sizes.items()}, **left_out,
            "penalty": penalty, "threshold": threshold.value, f"calibration_{threshold.chosen_for}": threshold.reached,
            **quality, "table": table}


def _setting_faults(output: Path, names: LabelNames, precision: float | None, recall: float | None, seed: int,
                    overwrite: bool) -> list[str]:
    faults = []
    if (precision is None) == (recall is None):
        faults.append("--precision, --recall: " + ("neither is" if precision is None else "both are") +
                      " given; the threshold is chosen for one of them; give one")
    for name, value in (("--precision", precision), ("--recall", recall)):
        if value is not None and not 0 < value <= 1:
            faults.append(f"{name}: is {value}; it must be over 0 and at most 1; 0.9 is usual")
    if both := sorted(set(names.toxic) & set(names.clean)):
        faults.append(f"--toxic, --clean: both name {', '.join(both)}; a label has one meaning; take it out of one")
    if not 0 <= seed < 2**64:
        faults.append(f"--seed: is {seed}; it must be from 0 to 2^64 - 1; choose another")
    if output.is_file() or (output.is_dir() and any(output.iterdir()) and not overwrite):
        faults.append(f"{output}: exists; a classifier is not overwritten unasked; choose another name, or give "
                      "--overwrite")
    return faults


def read_labelled(paths: Sequence[str], names: LabelNames,
                  on_progress: Callable[[float], None] | None = None) -> tuple[Labelled, dict[str, int]]:
    """Read labelled texts, each distinct text once; return them, and how many lines were left out and why.

    Texts that differ in case and white space alone are the same. One with both labels teaches nothing: it is left out.

    Raises:
        DataError: a line is no labelled text.
    """
    found: dict[str, tuple[str, set[bool]]] = {}
    faults: list[str] = []
    seen: Counter[str] = Counter()
    for record in read_records(paths, names.text_key, on_progress):
        label = _label(record.fields.get(names.label_key))
        if label in names.toxic or label in names.clean:
            seen["lines"] += 1
            found.setdefault(_key(record.text), (record.text, set()))[1].add(label in names.toxic)
        elif len(faults) < _MOST_FAULTS:
            what = f"label {label[:80]!r} under" if names.label_key in record.fields else "no key"
            faults.append(f"{record.where}: has {what} '{names.label_key}'; it must be one of "
                          f"{', '.join((*names.toxic, *names.clean))}; correct it, or name it with --toxic or --clean")
    raise_faults(DataError, faults)
    kept = [(text, labels) for text, labels in found.values() if len(labels) == 1]
    left_out = {"repeated": seen["lines"] - len(found), "with_both_labels": len(found) - len(kept)}
    return Labelled([text for text, _ in kept], np.array([True in labels for _, labels in kept], bool)), left_out


def _label(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _key(text: str) -> str:
    return " ".join(text.casefold().split())


def split(labelled: Labelled, seed: int) -> dict[str, Labelled]:
    """Share texts out to training, calibration and test by a keyed hash of the text alone."""
    places = np.array([xxhash.xxh3_64_intdigest(_key(text).encode(), seed) / 2**64 for text in labelled.texts])
    number = np.searchsorted(_BOUNDS, places, side="right")
    return {name: Labelled([labelled.texts[place] for place in np.flatnonzero(number == part)],
                           labelled.toxic[number == part]) for part, name in enumerate(PARTS)}


def _size_faults(parts: dict[str, Labelled]) -> list[str]:
    return [f"the {name} part: has {count} {kind} texts; it must have at least {_FEWEST}; give more labelled texts"
            for name, part in parts.items()
            for kind, count in (("toxic", int(part.toxic.sum())), ("other", int((~part.toxic).sum()))) if count < _FEWEST]


def _fit(part: Labelled, hasher: Any) -> tuple[np.ndarray, float]:
    """Return float32 weights [FEATURES] and the penalty that five-fold cross-validation liked best."""
    from scipy.sparse import csr_matrix, diags
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from threadpoolctl import threadpool_limits

    number: dict[str, int] = {}
    rows = [[number.setdefault(word, len(number)) for word in words_of(text)] for text in part.texts]
    starts = np.cumsum([0, *map(len, rows)])
    every = np.concatenate(rows)
    words = csr_matrix((np.ones(len(every)), every, starts), shape=(len(rows), len(number)))
    counts = words @ hasher(list(number))
    used = np.unique(counts.indices)  # the others would only cost time: their weights stay 0
    features = (diags(1 / counts.sum(axis=1).A1) @ counts)[:, used]
    folds = StratifiedKFold(5)  # the hash has shuffled enough
    # The solver adds up short vectors: threads would wait for each other, fifty times as long on a busy machine.
    with threadpool_limits(1):
        scores = {penalty: cross_val_score(LogisticRegression(C=penalty, max_iter=1000), features, part.toxic, cv=folds,
                                           scoring="roc_auc").mean() for penalty in _PENALTIES}
        best = max(scores, key=lambda penalty: (scores[penalty], -penalty))
        model = LogisticRegression(C=best, max_iter=1000).fit(features, part.toxic)
    weights = np.zeros(counts.shape[1], np.float32)
    weights[used] = model.coef_[0]
    return weights, best


def fit_sigmoid(margins: np.ndarray, toxic: np.ndarray) -> Calibration:
    """Fit a probability to margins of texts that were not learnt from.

    Source: Platt, Probabilistic outputs for support vector machines, 1999: targets a little inside 0 and 1, by which
    a part without mistakes does not give certainty. As a logistic regression, every text stands for both labels.

    Raises:
        DataError: toxic texts do not have the larger margins.
    """
    from sklearn.linear_model import LogisticRegression

    positive, negative = int(toxic.sum()), int((~toxic).sum())
    target = np.where(toxic, (positive + 1) / (positive + 2), 1 / (negative + 2))
    doubled = np.concatenate([margins, margins])[:, None]
    scale = float(np.std(margins)) or 1.0
    labels = np.repeat([True, False], len(margins))
    model = LogisticRegression(C=np.inf, tol=1e-9, max_iter=1000)
    model.fit(doubled / scale, labels, sample_weight=np.concatenate([target, 1 - target]))
    slope, offset = float(model.coef_[0, 0]) / scale, float(model.intercept_[0])
    if slope <= 0:
        raise DataError("the calibration part: its toxic texts do not have the larger scores; a classifier must have "
                        "learnt something; look at the labels, or give more labelled texts")
    return Calibration(slope=slope, offset=offset)


def choose_threshold(toxic: np.ndarray, probabilities: np.ndarray, precision: float | None,
                     recall: float | None) -> Threshold:
    """Choose the lowest threshold that reaches the precision, or the highest one that reaches the recall.

    Raises:
        DataError: no threshold does.
    """
    from sklearn.metrics import precision_recall_curve

    precisions, recalls, thresholds = precision_recall_curve(toxic, probabilities)  # thresholds rise
    if precision is not None:
        good = np.flatnonzero(precisions[:-1] >= precision)
        if not len(good):
            raise DataError(f"--precision: is {precision}; the calibration part reaches at most "
                            f"{precisions[:-1].max():.3f}; ask for less, or give more labelled texts")
        place, kind, wanted, reached = good[0], "precision", precision, precisions
    else:
        assert recall is not None
        place, kind, wanted, reached = np.flatnonzero(recalls[:-1] >= recall)[-1], "recall", recall, recalls
    return Threshold(value=float(thresholds[place]), chosen_for=kind, wanted=wanted, reached=float(reached[place]))


def measure(toxic: np.ndarray, probabilities: np.ndarray, threshold: float, seed: int) -> dict[str, Any]:
    """Return accuracy, precision, recall, F1 at the threshold and AUROC, each with a 95 % interval.

    The intervals are percentiles over 1,000 resamples of the texts; where a figure has no value it is None.
    """
    draw = np.random.default_rng(seed)
    resamples = []
    for _ in range(_RESAMPLES):
        chosen = draw.integers(0, len(toxic), len(toxic))
        resamples.append(_figures(toxic[chosen], probabilities[chosen], threshold))
    result: dict[str, Any] = {"test_toxic": int(toxic.sum()), "flagged": int((probabilities >= threshold).sum())}
    for name, value in _figures(toxic, probabilities, threshold).items():
        values = [figures[name] for figures in resamples if figures[name] is not None]
        result[name] = None if value is None else round(value, 4)
        result[f"{name}_95"] = [round(float(edge), 4) for edge in np.percentile(values, [2.5, 97.5])] if values else None
    return result


def _figures(toxic: np.ndarray, probabilities: np.ndarray, threshold: float) -> dict[str, float | None]:
    from scipy.stats import rankdata

    flagged = probabilities >= threshold
    hits, positives, negatives = int((flagged & toxic).sum()), int(toxic.sum()), int((~toxic).sum())
    above = rankdata(probabilities)[toxic].sum() - positives * (positives + 1) / 2  # Mann and Whitney's U
    return {"accuracy": float((flagged == toxic).mean()),
            "precision": hits / int(flagged.sum()) if flagged.any() else None,
            "recall": hits / positives if positives else None,
            "f1": 2 * hits / (int(flagged.sum()) + positives) if positives or flagged.any() else None,
            "auroc": float(above / (positives * negatives)) if positives and negatives else None}


def threshold_table(toxic: np.ndarray, probabilities: np.ndarray) -> list[dict[str, Any]]:
    """Return flagged texts, precision and recall at thresholds from 0.05 to 0.95."""
    rows = []
    for step in range(1, 20):
        threshold = step / 20
        flagged = probabilities >= threshold
        hits, count = int((flagged & toxic).sum()), int(flagged.sum())
        rows.append({"threshold": threshold, "flagged": count, "precision": round(hits / count, 4) if count else None,
                     "recall": round(hits / int(toxic.sum()), 4)})
    return rows


def _sklearn_version() -> str:
    import sklearn

    return sklearn.__version__
