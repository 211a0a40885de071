"""Score documents with a classifier of one's own: a linear model over character n-grams, calibrated to a probability.

A text is cut into words; the n-grams of a word do not depend on its neighbours, so a word's share in the score is
computed once and remembered. That is what makes it quick: language repeats its words.

The score is a mean over n-grams, and so does not grow with the length of a text: a sum over their root was no better
on short comments, and called most of an encyclopedia toxic. A long document is scored in windows of about 1,000
characters that overlap by half, and has the score of its worst one: a page of abuse in a clean book is found, which a
mean over the book would hide. One insult in a clean page is not.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, ValidationError

from megatron_ttl.data.corpus.document import Document, Step
from megatron_ttl.data.manifest import FileRecord, Part
from megatron_ttl.errors import DataError, raise_faults
from megatron_ttl.files import atomic_directory, checksum_bytes, or_disk_error, read_regular

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

RECORD, WEIGHTS = "toxicity.json", "toxicity.safetensors"
FEATURES = 2**18
"""Weights: n-grams are hashed to so many places."""
NGRAMS = (2, 5)
"""Shortest and longest n-gram, in characters, inside a word with a space on either side."""
LONGEST_WORD = 200
"""Characters; what is longer counts as several words."""
BLOCK = 500
"""Characters by which a window moves on; a window is two blocks."""
_WORDS = re.compile(rf"\S{{1,{LONGEST_WORD}}}")
_REMEMBERED_WORDS = 2**18  # 6 MB of numbers, about 20 MB of words
_WORDS_AT_ONCE = 10_000
_LARGEST_RECORD = 1 << 20
_LARGEST_WEIGHTS = 4 * FEATURES + 4096
_CURE = "train one with tools/train_toxicity.py"


class Calibration(Part):
    """How a margin becomes a probability: 1 / (1 + exp(-(slope * margin + offset))).

    Source: Platt, Probabilistic outputs for support vector machines, 1999.
    """

    slope: float = Field(gt=0)
    """A larger margin is a larger probability."""
    offset: float
    """Where the probability is 1/2: at margin -offset / slope."""


class Threshold(Part):
    """From which probability on a text is called toxic, chosen on the calibration part."""

    value: float = Field(ge=0, le=1)
    """A text is toxic from here on; a corpus keeps what lies below."""
    chosen_for: Literal["precision", "recall"]
    """What was asked for."""
    wanted: float = Field(gt=0, le=1)
    """How much of it."""
    reached: float = Field(ge=0, le=1)
    """How much of it the calibration part gives."""


class FeatureRecord(Part):
    """What the weights belong to."""

    ngrams: tuple[int, int] = NGRAMS
    places: int = FEATURES
    longest_word: int = LONGEST_WORD
    block: int = BLOCK


class ClassifierRecord(Part):
    """The `toxicity.json` of a classifier."""

    format: Literal["megatron_ttl toxicity classifier"] = "megatron_ttl toxicity classifier"
    version: Literal[1] = 1
    features: FeatureRecord = FeatureRecord()
    weights: FileRecord
    calibration: Calibration
    threshold: Threshold
    training: dict[str, Any]
    """Settings, input files with their checksums, sizes of the parts, versions of the libraries."""
    quality: dict[str, Any]
    """Figures of the held-out part, with 95 % intervals."""
    table: tuple[dict[str, Any], ...]
    """Precision and recall on the held-out part at thresholds from 0.05 to 0.95."""

    def encode(self) -> str:
        """Return the file's text. It holds its own checksum: a changed digit shows."""
        body = self.model_dump(mode="json")
        return json.dumps({**body, "checksum": _seal(body)}, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


class ToxicityClassifier:
    """Weights and calibration; the same text gives the same probability whatever was scored before it."""

    def __init__(self, weights: np.ndarray, calibration: Calibration) -> None:
        """Take float32 weights of shape [FEATURES].

        Raises:
            DataError: scikit-learn, which hashes the n-grams, is not installed.
        """
        self._weights = weights.astype(np.float64)
        self._calibration = calibration
        self._hash = ngram_hasher()
        self._forget(_REMEMBERED_WORDS)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> ToxicityClassifier:
        """Open a folder that `save_classifier` wrote.

        Raises:
            DataError: a file is missing, damaged or of another program, or scikit-learn is not installed.
        """
        record = read_record(Path(folder))
        return cls(_read_weights(Path(folder, WEIGHTS), record.weights), record.calibration)

    def probability(self, text: str) -> float:
        """Return the probability that a text is toxic, of its worst window, rounded to 4 digits."""
        from scipy.special import expit

        value = expit(self._calibration.slope * self.margin(text) + self._calibration.offset)
        return round(float(value), 4)

    def margin(self, text: str) -> float:
        """Return the largest mean weight of the n-grams of a window; 0 for a text without a word."""
        words = words_of(text)
        if not words:
            return 0.0
        rows = self._rows(words)
        lengths = self._lengths[rows]
        blocks = (np.cumsum(lengths) - lengths) // BLOCK
        sums = np.bincount(blocks, weights=self._sums[rows])
        counts = np.bincount(blocks, weights=self._counts[rows])
        if len(sums) > 1:
            sums, counts = sums[:-1] + sums[1:], counts[:-1] + counts[1:]
        return float(np.max(sums / counts))

    def _rows(self, words: list[str]) -> np.ndarray:
        """Return the place of every word in the tables, which are filled where they do not know one."""
        distinct = dict.fromkeys(words)
        new = [word for word in distinct if word not in self._known]
        if len(self._known) + len(new) > len(self._sums):
            self._forget(max(_REMEMBERED_WORDS, len(distinct)))
            new = list(distinct)
        for start in range(0, len(new), _WORDS_AT_ONCE):
            some = new[start : start + _WORDS_AT_ONCE]
            counts = self._hash(some)
            places = slice(len(self._known), len(self._known) + len(some))
            self._sums[places] = counts @ self._weights
            self._counts[places] = counts.sum(axis=1).A1
            self._lengths[places] = [len(word) + 1 for word in some]
            self._known.update(zip(some, range(places.start, places.stop), strict=True))
        return np.fromiter(map(self._known.__getitem__, words), np.int64, len(words))

    def _forget(self, words: int) -> None:
        self._known: dict[str, int] = {}
        self._sums, self._counts = np.zeros(words), np.zeros(words)
        self._lengths = np.zeros(words, np.int64)


def words_of(text: str) -> list[str]:
    """Return what stands between white space, in lower case; what is very long in pieces."""
    return _WORDS.findall(text.lower())


def ngram_hasher() -> Any:
    """Return a function from n words to their numbers of n-grams at each place: a sparse matrix [n, FEATURES].

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn.feature_extraction.text import HashingVectorizer
    except ImportError:
        raise DataError("scikit-learn: is not installed; it is needed for toxicity scores; "
                        "pip install 'megatron_ttl[corpus]'") from None
    # Without signs and without a norm: sums over words are sums over the text, and a row adds up to its n-grams.
    hasher = HashingVectorizer(analyzer="char_wb", ngram_range=NGRAMS, n_features=FEATURES, lowercase=False, norm=None,
                               alternate_sign=False)

    def count(words: list[str]) -> csr_matrix:
        from scipy.sparse import csr_matrix

        return csr_matrix(hasher.transform(words))

    return count


def toxicity_step(folder: str | os.PathLike[str]) -> Step:
    """Return the step that notes every document's probability as `toxicity`; it drops nothing.

    Raises:
        DataError: the classifier cannot be opened.
    """
    classifier = ToxicityClassifier.load(folder)

    def note_toxicity(document: Document) -> Document:
        return document.with_note("toxicity", classifier.probability(document.text))

    return note_toxicity


def save_classifier(output: Path, weights: np.ndarray, **record: Any) -> None:
    """Write a classifier's folder; complete when its name appears.

    Args:
        output: the folder; one that is there is replaced.
        weights: float32, shape [FEATURES].
        record: the other fields of `ClassifierRecord`.

    Raises:
        DiskError: it cannot be written.
    """
    from safetensors.numpy import save

    payload = save({"weights": np.ascontiguousarray(weights, np.float32)})
    file = FileRecord(bytes=len(payload), checksum=checksum_bytes(payload))
    text = ClassifierRecord(weights=file, **record).encode()
    with or_disk_error(output), atomic_directory(output) as folder:
        (folder / WEIGHTS).write_bytes(payload)
        (folder / RECORD).write_text(text, encoding="utf-8")


def read_record(folder: Path) -> ClassifierRecord:
    """Read and validate the `toxicity.json` of a classifier.

    Raises:
        DataError: it is missing, damaged, or of another version.
    """
    path = folder / RECORD
    try:
        value = json.loads(_read(path, _LARGEST_RECORD))
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: is not JSON ({error}); it must be a classifier's record; {_CURE}") from None
    if not isinstance(value, dict) or value.get("format") != "megatron_ttl toxicity classifier":
        raise DataError(f"{path}: is no classifier's record; its 'format' must be 'megatron_ttl toxicity classifier'; "
                        f"{_CURE}")
    seal = value.pop("checksum", None)
    if seal != _seal(value):
        raise DataError(f"{path}: its checksum is not that of what it says; it must be as it was written; {_CURE}")
    try:
        found = ClassifierRecord.model_validate_json(json.dumps(value))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise DataError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}; it must be as it was written; "
                        f"{_CURE}") from None
    if found.features != FeatureRecord():
        raise DataError(f"{path}: has other features ({found.features}) than this program ({FeatureRecord()}); they "
                        f"must be the same; {_CURE}")
    return found


def _read_weights(path: Path, expected: FileRecord) -> np.ndarray:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    payload = _read(path, _LARGEST_WEIGHTS)
    if (len(payload), checksum_bytes(payload)) != (expected.bytes, expected.checksum):
        raise DataError(f"{path}: has {len(payload):,} bytes with another checksum than {RECORD} says; it must be as "
                        f"it was written; copy it again, or {_CURE}")
    try:
        weights = load(payload).get("weights")
    except (SafetensorError, ValueError, KeyError) as error:
        raise DataError(f"{path}: is no safetensors file ({error}); it must be one; {_CURE}") from None
    fault = weights is None or weights.shape != (FEATURES,) or weights.dtype != np.float32 or not np.isfinite(weights).all()
    raise_faults(DataError, [f"{path}: holds other tensors than 'weights', {FEATURES:,} finite float32; it must hold "
                             f"that; {_CURE}"] if fault else [])
    return weights


def _read(path: Path, limit_bytes: int) -> bytes:
    try:
        return read_regular(path, limit_bytes)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); it must be a file of a classifier; "
                        f"{_CURE}") from None


def _seal(body: dict[str, Any]) -> str:
    return checksum_bytes(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())
