"""What counts as the same text: normalisation, words, and 64-bit hashes of runs of words."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
import xxhash

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying loses nothing


def normalise(text: str) -> str:
    """Return the text in NFC, case folded, every run of white space one blank, none at the ends.

    Punctuation stays: two texts that differ in a comma are two texts for what compares exactly.
    """
    # Composed before folding and after it: folding takes some letters apart.
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
    return " ".join(folded.split())


def words_of(normalised: str) -> list[str]:
    """Return the words: runs of letters, digits, underscores and combining marks. Punctuation is left out.

    A script that is written without blanks gives one word per sentence, and nothing to compare below sentences.
    """
    return _word_pattern().findall(normalised)


@cache
def _word_pattern() -> re.Pattern[str]:
    # \w knows no combining marks, and would cut the words of Devanagari at their vowels.
    marks = "".join(sign for sign in map(chr, range(0x10000)) if unicodedata.category(sign).startswith("M"))
    return re.compile(rf"[\w{marks}]+")


def ngram_hashes(words: Sequence[str], longest: int) -> Iterator[np.ndarray]:
    """Yield the hashes of all runs of 1, 2, ... `longest` words, as long as there are any.

    The hash of a run is the polynomial of the xxh3-64 of its words in 64-bit arithmetic: two different runs share one
    with a probability of about 2^-64, and the runs of n words are had from those of n - 1.

    Yields:
        One hash per run, in the order of the text.  # uint64 [words - n + 1]
    """
    digest = xxhash.xxh3_64_digest
    single = np.frombuffer(b"".join([digest(word.encode("utf-8")) for word in words]), ">u8").astype(np.uint64)
    hashes = np.zeros(len(words) + 1, np.uint64)
    for size in range(1, min(longest, len(words)) + 1):
        hashes = hashes[:-1] * _MULTIPLIER + single[size - 1:]
        yield hashes


def content_hash(normalised: str) -> bytes:
    """Return the xxh3-128 of a normalised text: 16 bytes."""
    return xxhash.xxh3_128_digest(normalised.encode("utf-8"))
