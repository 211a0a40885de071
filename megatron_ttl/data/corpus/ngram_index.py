"""Look up which of many owners (evaluation packs, items of tasks) share runs of words with a text.

Words are compared as `ngrams.words_of` has them: case folded, without punctuation. A text with fewer words than a run is
looked for as a whole, if it is not too short to say anything.

Memory: 9 bytes per n-gram, 10 for more than 256 sets of owners, 12 for more than 65,536; and at most 8 for a filter before
the search.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ttl.data.corpus.ngrams import ngram_hashes, normalise, words_of


@dataclass(frozen=True)
class OwnedTexts:
    """What one owner's texts are looked for by."""

    hashes: np.ndarray
    """Of its n-grams and short texts, each once, sorted.  # uint64 [n-grams]"""
    texts: int
    """Texts that it has."""
    too_short: int
    """Texts that are left out because they have too few words."""


def own_texts(texts: Iterable[str], words: int, short_words: int) -> OwnedTexts:
    """Take the n-grams of an owner's texts.

    Args:
        texts: what is looked for.
        words: length of a run.
        short_words: a text with fewer words than a run, but at least so many, is looked for as a whole.
    """
    sized = [words_of(normalise(text)) for text in texts]
    long = [found for found in sized if len(found) >= short_words]
    hashes = np.unique(np.concatenate([np.empty(0, np.uint64), *(_longest(found, words) for found in long)]))
    return OwnedTexts(hashes, len(sized), len(sized) - len(long))


def _longest(words: Sequence[str], longest: int) -> np.ndarray:
    """Return the hashes of the runs of `longest` words, or of all words where there are fewer."""
    *_, hashes = ngram_hashes(words, longest)
    return hashes


@dataclass(frozen=True)
class NgramIndex:
    """N-grams with their owners; it can be sent to other processes."""

    words: int
    short_words: int
    hashes: np.ndarray
    """Of the n-grams of all owners, sorted.  # uint64 [n-grams]"""
    members: np.ndarray
    """Who has it: a row of `owner_sets`.  # unsigned [n-grams]"""
    begins: np.ndarray
    """Whether any hash begins with these bits: it spares most of the searches.  # bool [power of two]"""
    owner_sets: tuple[tuple[int, ...], ...]
    """Sets of owners, by number."""

    def shared(self, text: str) -> Counter[int]:
        """Return how many different n-grams of each owner a text holds."""
        if not len(self.hashes):
            return Counter()
        hits = [np.empty(0, np.int64)]
        for size, hashes in enumerate(ngram_hashes(words_of(normalise(text)), self.words), 1):
            if size >= self.short_words:
                hashes = hashes[self.begins[_first_bits(hashes, len(self.begins))]]
                places = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
                hits.append(places[self.hashes[places] == hashes])
        return Counter(owner for place in np.unique(np.concatenate(hits)).tolist()
                       for owner in self.owner_sets[self.members[place]])


def index_owners(owners: Sequence[OwnedTexts], words: int, short_words: int) -> NgramIndex:
    """Put what all owners look for into one index; an owner is its place in the list."""
    hashes = np.concatenate([np.empty(0, np.uint64), *(owner.hashes for owner in owners)])
    numbers = np.repeat(np.arange(len(owners)), [len(owner.hashes) for owner in owners])
    unique, members, owner_sets = _merge(hashes, numbers)
    begins = np.zeros(max(2, 4 << len(unique).bit_length()), bool)
    begins[_first_bits(unique, len(begins))] = True
    return NgramIndex(words, short_words, unique, members, begins, owner_sets)


def _first_bits(hashes: np.ndarray, values: int) -> np.ndarray:
    return hashes >> np.uint64(65 - values.bit_length())


def _merge(hashes: np.ndarray, owners: np.ndarray) -> tuple[np.ndarray, np.ndarray, tuple[tuple[int, ...], ...]]:
    order = np.lexsort((owners, hashes))
    hashes, owners = hashes[order], owners[order]
    unique, starts = np.unique(hashes, return_index=True)
    several = np.flatnonzero(np.diff(starts, append=len(hashes)) > 1)
    sets: dict[tuple[int, ...], int] = {(owner,): owner for owner in range(int(owners.max(initial=-1)) + 1)}
    members = owners[starts]
    ends = np.append(starts, len(hashes))
    for place in several.tolist():
        together = tuple(owners[ends[place]:ends[place + 1]].tolist())
        members[place] = sets.setdefault(together, len(sets))
    return unique, members.astype(np.min_scalar_type(len(sets))), tuple(sets)
