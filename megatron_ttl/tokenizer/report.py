"""Compare tokenizers on the same text: how many tokens a word and a byte cost, and what a vocabulary cannot say.

A word is what stands between white space, its punctuation included, as `str.split` cuts. Tokens are those of whole
documents, without specials; whether a word is continued is seen on the word alone, behind another one and a space.

Source: Rust et al., How good is your tokenizer?, 2021 (fertility; share of continued words).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from megatron_ttl.errors import DataError, raise_faults
from megatron_ttl.tokenizer.foreign import BYTES, SPACES, UNKNOWN, ForeignTokenizer

ALL = "all"
"""Name of the row that adds up the sources."""
_BATCH_CHARACTERS = 1 << 20
_REMEMBERED_CHARACTERS = 8_000_000  # of all words together
_BEFORE = "a"  # a word is looked at behind another one, as it stands in text


@dataclass
class TextCounts:
    """What a text is, whoever tokenizes it."""

    documents: int = 0
    words: int = 0
    bytes: int = 0


@dataclass
class TokenCounts:
    """What a tokenizer makes of a text."""

    tokens: int = 0
    unknown: int = 0
    """Tokens that stand for what the vocabulary cannot say."""
    spelled: int = 0
    """Tokens that are a byte, or several that are no whole characters."""
    continued: int = 0
    """Words of more than one token."""


@dataclass
class _Counter:
    tokenizer: ForeignTokenizer
    known: dict[str, bool] = field(default_factory=dict)
    characters: int = 0

    def count(self, texts: Sequence[str], words: Counter[str]) -> TokenCounts:
        ids = [np.asarray(found, np.int64) for found in self.tokenizer.encode(texts)]
        kinds = self.tokenizer.kinds[np.concatenate(ids)] if ids else np.zeros(0, np.uint8)
        self._learn([word for word in words if word not in self.known])
        continued = sum(count for word, count in words.items() if self.known[word])
        result = TokenCounts(len(kinds), int((kinds & UNKNOWN > 0).sum()), int((kinds & BYTES > 0).sum()), continued)
        if self.characters > _REMEMBERED_CHARACTERS:
            self.known, self.characters = {}, 0
        return result

    def _learn(self, words: list[str]) -> None:
        before, *found = self.tokenizer.encode([_BEFORE, *(f"{_BEFORE} {word}" for word in words)])
        bar = self._pieces(before) + 1
        self.known.update((word, self._pieces(ids) > bar) for word, ids in zip(words, found, strict=True))
        self.characters += sum(map(len, words))

    def _pieces(self, ids: Sequence[int]) -> int:
        """Count the pieces that are more than spaces."""
        return int((self.tokenizer.kinds[np.asarray(ids, np.int64)] & SPACES == 0).sum())


def compare_tokenizers(tokenizers: Sequence[ForeignTokenizer], texts: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Count what each tokenizer makes of the texts of each source; memory does not grow with the text.

    Args:
        tokenizers: of different names; the first is what the others are compared with.
        texts: (source, text); read once.

    Returns:
        `tokenizers`: what was compared; `rows`: one per source and tokenizer, and for `all` sources where there are
        several. Shares are from 0 to 1, `versus_first` is how many more tokens it needs than the first.

    Raises:
        DataError: two tokenizers have one name, or there is no text.
    """
    names = Counter(tokenizer.name for tokenizer in tokenizers)
    raise_faults(DataError, (f"--tokenizers: {count} are called {name!r}; every one needs its own name; write NAME=PATH"
                             for name, count in names.items() if count > 1))
    counters = [_Counter(tokenizer) for tokenizer in tokenizers]
    sizes: dict[str, TextCounts] = {}
    counts: dict[str, list[TokenCounts]] = {}
    for source, batch in _batches(texts):
        words = Counter(word for text in batch for word in text.split())
        size = sizes.setdefault(source, TextCounts())
        size.documents += len(batch)
        size.words += words.total()
        size.bytes += sum(len(text.encode("utf-8")) for text in batch)
        for total, counter in zip(counts.setdefault(source, [TokenCounts() for _ in counters]), counters, strict=True):
            _add(total, counter.count(batch, words))
    if not sum(size.bytes for size in sizes.values()):
        raise DataError("--text: holds no text; tokenizers are compared on some; give other files")
    lines = [(source, size, counts[source]) for source, size in sizes.items()]
    if len(lines) > 1:
        together, total = TextCounts(), [TokenCounts() for _ in counters]
        for _, size, found in lines:
            _add(together, size)
            for sum_, count in zip(total, found, strict=True):
                _add(sum_, count)
        lines.append((ALL, together, total))
    return {
        "tokenizers": [{"name": one.name, "kind": one.kind, "vocab_size": one.vocab_size, "checksum": one.checksum}
                       for one in tokenizers],
        "rows": [_row(tokenizer.name, source, size, count, found[0]) for source, size, found in lines
                 for tokenizer, count in zip(tokenizers, found, strict=True)],
    }


def _add(total: Any, other: Any) -> None:
    for each in fields(total):
        setattr(total, each.name, getattr(total, each.name) + getattr(other, each.name))


def _batches(texts: Iterable[tuple[str, str]]) -> Iterator[tuple[str, list[str]]]:
    """Yield texts of one source that came one after another, about a million characters at a time."""
    source, batch, characters = "", [], 0
    for name, text in texts:
        if batch and (name != source or characters > _BATCH_CHARACTERS):
            yield source, batch
            batch, characters = [], 0
        source = name
        batch.append(text)
        characters += len(text)
    if batch:
        yield source, batch


def _row(name: str, source: str, size: TextCounts, count: TokenCounts, first: TokenCounts) -> dict[str, Any]:
    def share(part: float, whole: int) -> float | None:
        return round(part / whole, 6) if whole else None

    return {
        "source": source, "tokenizer": name, "documents": size.documents, "words": size.words, "bytes": size.bytes,
        "tokens": count.tokens, "tokens_per_word": share(count.tokens, size.words),
        "bytes_per_token": share(size.bytes, count.tokens), "unknown_share": share(count.unknown, count.tokens),
        "byte_share": share(count.spelled, count.tokens), "continued_words": share(count.continued, size.words),
        "versus_first": share(count.tokens - first.tokens, first.tokens),
    }
