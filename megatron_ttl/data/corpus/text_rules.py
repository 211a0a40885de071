"""Rules that a text is kept or dropped by: Gopher's quality and repetition rules, and those FineWeb added.

A rule is a measure and the side on which its limit lies; limits, stop words and punctuation are data of a preset.
What a text is split into is computed once, when the first rule asks for it.

Source: Rae et al. 2021, "Scaling Language Models: Methods, Analysis & Insights from Training Gopher", appendix A1
(rules and limits); Penedo et al. 2024 and 2025, FineWeb and FineWeb-2 (line punctuation, new lines, limits by language).
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import count
from typing import Literal

import numpy as np

from megatron_ttl.data.corpus.document import Dropped

_DIGITS_KEPT = 6  # of a measure that is recorded

# A word may hold hyphens and apostrophes (disse-lhe, d'água) and a number its marks (1.234,56); dots and dashes in a
# row are one token, any other sign is one each. Letters, digits and combining marks are told apart by Unicode.
_TOKEN = r"[\w{marks}]+(?:(?:['’‐-]|(?<=[0-9])[.,:/](?=[0-9]))[\w{marks}]+)*|\.+|-+|[^\w\s{marks}]"
_ELLIPSES = ("...", "…")
_NONE = np.zeros(0, np.int64)


@dataclass(frozen=True)
class LanguageSigns:
    """What the rules must know of a language."""

    stop_words: frozenset[str] = frozenset()
    """In lower case and composed form (NFC)."""
    bullets: tuple[str, ...] = ()
    """Signs that begin an entry of a list."""
    sentence_ends: tuple[str, ...] = ()
    """Signs that end a line of prose."""


class TextParts:
    """A text and what it consists of, each part computed when first asked for.

    Letters and their accents are composed first (NFC): a decomposed `não` is three letters as well.
    """

    def __init__(self, text: str, signs: LanguageSigns) -> None:
        self.text = text if unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)
        self.signs = signs
        self._levels: list[_Repeats] = []

    @cached_property
    def tokens(self) -> list[str]:
        """Words, numbers and punctuation, in order."""
        return _token_pattern(_marks(self.text)).findall(self.text)

    @cached_property
    def codes(self) -> np.ndarray:
        """For each token the place where it first stood, int64 [tokens]."""
        first: dict[str, int] = {}
        return np.fromiter(map(first.setdefault, self.tokens, count()), np.int64, len(self.tokens))

    @cached_property
    def vocabulary(self) -> set[str]:
        """The different tokens."""
        return set(self.tokens)

    @cached_property
    def ends(self) -> np.ndarray:
        """Characters in the tokens before each place, int64 [tokens + 1]."""
        ends = np.zeros(len(self.tokens) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, self.tokens), np.int64, len(self.tokens)), out=ends[1:])
        return ends

    @cached_property
    def word_lengths(self) -> np.ndarray:
        """Characters of each token that holds a letter or a digit, int64 [words]."""
        plain = {token for token in self.vocabulary if not _has_letter_or_digit(token)}
        lengths = np.diff(self.ends)
        return lengths[np.fromiter((token not in plain for token in self.tokens), bool, len(self.tokens))]

    @cached_property
    def lines(self) -> list[str]:
        """Lines that are not blank, without space at their ends."""
        return [line for line in map(str.strip, self.text.split("\n")) if line]

    @cached_property
    def paragraphs(self) -> list[str]:
        """Lines between blank lines, joined again."""
        found, lines = [], []
        for line in map(str.strip, self.text.split("\n")):
            if line:
                lines.append(line)
            elif lines:
                found.append("\n".join(lines))
                lines = []
        return [*found, "\n".join(lines)] if lines else found

    @cached_property
    def repeated_lines(self) -> tuple[int, int]:
        """How many lines stood before, and their characters."""
        return _repeated(self.lines)

    @cached_property
    def repeated_paragraphs(self) -> tuple[int, int]:
        """How many paragraphs stood before, and their characters."""
        return _repeated(self.paragraphs)

    def repeats(self, n: int) -> _Repeats:
        """Return the n-grams of tokens that occur at least twice, n >= 2."""
        if not self._levels:
            counts = np.bincount(self.codes, minlength=1)
            group = np.where(counts[self.codes] > 1, self.codes, -1)
            self._levels.append(_Repeats(group, _NONE, _NONE))
        while len(self._levels) < n:
            self._levels.append(_longer(self._levels[-1].group))
        return self._levels[n - 1]


@dataclass(frozen=True)
class _Repeats:
    """The n-grams of one length that occur at least twice."""

    group: np.ndarray
    """Number of the n-gram that begins at each token, -1 where it occurs once, int64 [tokens]."""
    counts: np.ndarray
    """How often each n-gram occurs, int64 [groups]."""
    first: np.ndarray
    """Where each n-gram first begins, int64 [groups]."""


def _longer(group: np.ndarray) -> _Repeats:
    """Return the repeated (n+1)-grams: both n-grams within one are repeated ones, so few places are looked at."""
    longer = np.full(len(group), -1, np.int64)
    places = np.flatnonzero((group[:-1] >= 0) & (group[1:] >= 0))
    if len(places) < 2:
        return _Repeats(longer, _NONE, _NONE)
    keys = group[places] * len(group) + group[places + 1]
    order = np.argsort(keys)
    in_order = keys[order]
    starts = np.flatnonzero(np.concatenate(([True], in_order[1:] != in_order[:-1])))
    sizes = np.diff(starts, append=len(keys))
    again = sizes > 1
    if not again.any():
        return _Repeats(longer, _NONE, _NONE)
    longer[places[order]] = np.repeat(np.where(again, np.cumsum(again) - 1, -1), sizes)
    return _Repeats(longer, sizes[again], np.minimum.reduceat(places[order], starts)[again])


def _repeated(parts: list[str]) -> tuple[int, int]:
    if len(set(parts)) == len(parts):
        return 0, 0
    seen: set[str] = set()
    number = characters = 0
    for part in parts:
        if part in seen:
            number += 1
            characters += len(part)
        seen.add(part)
    return number, characters


def _marks(text: str) -> str:
    """Return the combining marks that a text holds, which `\\w` of Python's re leaves out of words."""
    return "".join(sorted(sign for sign in set(text) if sign >= "\u0300" and unicodedata.category(sign)[0] == "M"))


@lru_cache(maxsize=256)
def _token_pattern(marks: str) -> re.Pattern[str]:
    return re.compile(_TOKEN.format(marks=marks))


def _has_letter_or_digit(token: str) -> bool:
    return token.isalnum() or any(map(str.isalnum, token))


def _has_letter(token: str) -> bool:
    return token.isalpha() or any(map(str.isalpha, token))


def _share(part: float, whole: float) -> float:
    return float(part) / float(whole) if whole else 0.0


# ---- the measures: each takes a text's parts and returns one number --------------------------------------------


def words(parts: TextParts) -> float:
    """Count the tokens that hold a letter or a digit."""
    return float(len(parts.word_lengths))


def mean_word_length(parts: TextParts) -> float:
    """Return the mean length of a word in characters; 0 without words."""
    return _share(parts.word_lengths.sum(), len(parts.word_lengths))


def hash_ratio(parts: TextParts) -> float:
    """Return hash signs per token."""
    return _share(parts.text.count("#"), len(parts.tokens))


def ellipsis_ratio(parts: TextParts) -> float:
    """Return ellipses (... and …) per token."""
    return _share(sum(map(parts.text.count, _ELLIPSES)), len(parts.tokens))


def bullet_lines(parts: TextParts) -> float:
    """Return the share of lines that begin like an entry of a list."""
    return _share(sum(line.startswith(parts.signs.bullets) for line in parts.lines), len(parts.lines))


def ellipsis_lines(parts: TextParts) -> float:
    """Return the share of lines that end in an ellipsis."""
    return _share(sum(line.endswith(_ELLIPSES) for line in parts.lines), len(parts.lines))


def alphabetic_words(parts: TextParts) -> float:
    """Return the share of words that hold a letter, words being what stands between spaces, as for Rae et al.

    With punctuation as tokens of their own, half of all laws and minutes of meetings would stay below 0.8.
    """
    pieces = parts.text.split()
    without = {piece for piece in set(pieces) if not _has_letter(piece)}
    return _share(sum(piece not in without for piece in pieces), len(pieces))


def stop_words(parts: TextParts) -> float:
    """Count the different stop words of the language that occur, in any case."""
    return float(len(parts.signs.stop_words.intersection(map(str.lower, parts.vocabulary))))


def duplicate_paragraphs(parts: TextParts) -> float:
    """Return the share of paragraphs that stood before."""
    return _share(parts.repeated_paragraphs[0], len(parts.paragraphs))


def duplicate_paragraph_characters(parts: TextParts) -> float:
    """Return the share of characters in paragraphs that stood before."""
    return _share(parts.repeated_paragraphs[1], len(parts.text))


def duplicate_lines(parts: TextParts) -> float:
    """Return the share of lines that stood before."""
    return _share(parts.repeated_lines[0], len(parts.lines))


def duplicate_line_characters(parts: TextParts) -> float:
    """Return the share of characters in lines that stood before."""
    return _share(parts.repeated_lines[1], len(parts.text))


def duplicate_line_characters_of_lines(parts: TextParts) -> float:
    """Return the share of characters, line ends not counted, in lines that stood before."""
    return _share(parts.repeated_lines[1], len(parts.text) - parts.text.count("\n"))


def top_n_gram(parts: TextParts, n: int) -> float:
    """Return the share of characters in the most frequent n-gram of tokens, 1 at most; 0 if none occurs twice.

    Of several that are as frequent, the first one counts.
    """
    found = parts.repeats(n)
    if not len(found.counts):
        return 0.0
    most = found.counts.max()
    at = found.first[found.counts == most].min()
    length = parts.ends[at + n] - parts.ends[at] + n - 1  # with the spaces between
    return min(1.0, _share(most * length, len(parts.text)))


def duplicate_n_gram(parts: TextParts, n: int) -> float:
    """Return the share of characters in n-grams of tokens that stood before, overlapping ones counted once."""
    group = parts.repeats(n).group
    found = np.flatnonzero(group >= 0)
    places, numbers = found.tolist(), group[found].tolist()
    seen: set[int] = set()
    counted: list[int] = []
    at = 0
    while at < len(places):
        if numbers[at] in seen:
            counted.append(places[at])
            # what begins before the end of this n-gram overlaps it, and is neither counted nor remembered
            at = bisect_left(places, places[at] + n, at, min(at + n, len(places)))
        else:
            seen.add(numbers[at])
            at += 1
    starts = np.array(counted, np.int64)
    return _share((parts.ends[starts + n] - parts.ends[starts]).sum(), len(parts.text))


def line_punctuation(parts: TextParts) -> float:
    """Return the share of lines that end like a sentence."""
    return _share(sum(line.endswith(parts.signs.sentence_ends) for line in parts.lines), len(parts.lines))


def newline_ratio(parts: TextParts) -> float:
    """Return line ends per token."""
    return _share(parts.text.count("\n"), len(parts.tokens))


@dataclass(frozen=True)
class Rule:
    """One measure and the side on which its limit lies."""

    name: str
    """Table and key of the preset that hold its limit: `gopher.min_words`."""
    measure: Callable[[TextParts], float]
    is_share: bool = True
    """The measure lies between 0 and 1."""

    @property
    def bound(self) -> Literal["min", "max"]:
        """Whether the limit is the least or the most that a text may have."""
        return "min" if self.name.partition(".")[2].startswith("min_") else "max"

    def allows(self, value: float, limit: float) -> bool:
        """Tell whether a text with this value stays; the limit itself is allowed."""
        return value >= limit if self.bound == "min" else value <= limit


RULES: tuple[Rule, ...] = (
    Rule("gopher.min_words", words, is_share=False),
    Rule("gopher.max_words", words, is_share=False),
    Rule("gopher.min_mean_word_length", mean_word_length, is_share=False),
    Rule("gopher.max_mean_word_length", mean_word_length, is_share=False),
    Rule("gopher.max_hash_ratio", hash_ratio, is_share=False),
    Rule("gopher.max_ellipsis_ratio", ellipsis_ratio, is_share=False),
    Rule("gopher.max_bullet_lines", bullet_lines),
    Rule("gopher.max_ellipsis_lines", ellipsis_lines),
    Rule("gopher.min_alphabetic_words", alphabetic_words),
    Rule("gopher.min_stop_words", stop_words, is_share=False),
    Rule("gopher.max_duplicate_paragraphs", duplicate_paragraphs),
    Rule("gopher.max_duplicate_paragraph_characters", duplicate_paragraph_characters),
    Rule("gopher.max_duplicate_lines", duplicate_lines),
    Rule("gopher.max_duplicate_line_characters", duplicate_line_characters),
    *(Rule(f"gopher.max_top_{n}_gram", partial(top_n_gram, n=n)) for n in (2, 3, 4)),
    *(Rule(f"gopher.max_duplicate_{n}_gram", partial(duplicate_n_gram, n=n)) for n in (5, 6, 7, 8, 9, 10)),
    Rule("fineweb.min_line_punctuation", line_punctuation),
    Rule("fineweb.max_duplicate_line_characters", duplicate_line_characters_of_lines),
    Rule("fineweb.max_newline_ratio", newline_ratio, is_share=False),
)
"""In the order in which they are applied: a text is dropped by the first that it breaks."""


def broken_rule(text: str, limits: Mapping[str, float], signs: LanguageSigns) -> Dropped | None:
    """Return the first rule that a text breaks, with value and limit; None if it keeps to all.

    `limits` holds the limit of each rule that is to be applied, by the rule's name.
    """
    parts = TextParts(text, signs)
    for rule in RULES:
        if (limit := limits.get(rule.name)) is None:
            continue
        value = rule.measure(parts)
        if not rule.allows(value, limit):
            return Dropped(rule.name, round(value, _DIGITS_KEPT), limit)
    return None


def measures(text: str, signs: LanguageSigns, names: Iterable[str] | None = None) -> dict[str, float]:
    """Return what each rule (or those in `names`) measures on a text, by the rule's name."""
    parts = TextParts(text, signs)
    wanted = None if names is None else set(names)
    return {rule.name: rule.measure(parts) for rule in RULES if wanted is None or rule.name in wanted}
