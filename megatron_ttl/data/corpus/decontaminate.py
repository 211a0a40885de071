"""Find text of evaluation packs in documents: runs of 13 words that both hold.

Words are compared as `ngrams.words_of` has them: case folded, without punctuation. A text of a pack with fewer than
13 words is looked for as a whole if it has 8 words or more; a shorter one says too little, and is counted and left out.

Memory: 10 bytes per n-gram and at most 8 for a filter before the search, in every worker. Hashes have 64 bits: that some
document of a corpus of w words is suspected wrongly has a probability of at most 6 w e / 2^64 for e n-grams, that is 0.3 %
for 10 billion words and a million n-grams.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from megatron_ttl.data.corpus.document import Document, Dropped, Step
from megatron_ttl.data.corpus.ngrams import ngram_hashes, normalise, words_of
from megatron_ttl.data.documents import input_faults, read_chunks
from megatron_ttl.errors import DataError, raise_faults

_MODEL = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
_MOST_FAULTS = 20


class PackSettings(BaseModel):
    """One evaluation pack."""

    model_config = _MODEL

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9_.-]+$")
    """Name in notes and rules: `decontamination.<name>`."""
    path: str = Field(min_length=1)
    """A .jsonl or .jsonl.gz file."""
    keys: tuple[str, ...] = Field(min_length=1)
    """Keys whose texts are looked for; under a key may stand a text, or lists and objects of texts."""


class DecontaminateSettings(BaseModel):
    """Which packs are looked for, and what happens to a document that holds some of them."""

    model_config = _MODEL

    packs: tuple[PackSettings, ...] = ()
    """Evaluation packs; none: nothing is looked for."""
    words: int = Field(default=13, ge=2, le=64)
    """Words of an n-gram."""
    short_words: int = Field(default=8, ge=1)
    """Texts of packs with fewer words than an n-gram are looked for as a whole if they have at least so many."""
    min_ngrams: int = Field(default=1, ge=1)
    """Different n-grams of one pack that a document must hold to be dropped."""
    action: Literal["drop", "report"] = "drop"
    """Whether documents are dropped, or only get a note."""

    @model_validator(mode="after")
    def _fits(self) -> DecontaminateSettings:
        if self.short_words > self.words:
            raise ValueError(f"short_words: is {self.short_words}; it must be at most words ({self.words}); lower it")
        names = [pack.name for pack in self.packs]
        if len(set(names)) < len(names):
            raise ValueError("packs: two have the same name; the rule of a dropped document names its pack; rename one")
        return self


class PackContents(BaseModel):
    """What was read from one pack."""

    texts: int
    """Texts under the keys."""
    ngrams: int
    """Different n-grams and short texts that are looked for."""
    too_short: int
    """Texts that are left out because they have too few words."""


@dataclass(frozen=True)
class Decontaminator:
    """The step: notes what a document shares with packs, `{"decontamination": {pack: n-grams}}`, or drops it."""

    settings: DecontaminateSettings
    hashes: np.ndarray
    """Of the n-grams of all packs, sorted.  # uint64 [n-grams]"""
    members: np.ndarray
    """Which packs have it: a row of `pack_sets`.  # uint16 [n-grams]"""
    begins: np.ndarray
    """Whether any hash begins with these bits: it spares most of the searches.  # bool [power of two]"""
    pack_sets: tuple[tuple[int, ...], ...]
    """Sets of packs, by their place in the settings."""
    contents: dict[str, PackContents]
    """What was read, by pack."""

    def __call__(self, document: Document) -> Document | Dropped:
        """Return the document, with a note where it shares n-grams with packs, or why it goes."""
        found = self.shared(document.text)
        if not found:
            return document
        name, count = found.most_common(1)[0]
        if self.settings.action == "drop" and count >= self.settings.min_ngrams:
            return Dropped(f"decontamination.{name}", count, f"fewer than {self.settings.min_ngrams} shared n-grams")
        return document.with_note("decontamination", dict(found))

    def shared(self, text: str) -> Counter[str]:
        """Return how many different n-grams of each pack a text holds; of packs with as many the first comes first."""
        found: Counter[str] = Counter()
        if not len(self.hashes):
            return found
        hits = [np.empty(0, np.int64)]
        for size, hashes in enumerate(ngram_hashes(words_of(normalise(text)), self.settings.words), 1):
            if size >= self.settings.short_words:
                hashes = hashes[self.begins[_first_bits(hashes, len(self.begins))]]
                places = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
                hits.append(places[self.hashes[places] == hashes])
        counts = Counter(pack for place in np.unique(np.concatenate(hits)).tolist()
                         for pack in self.pack_sets[self.members[place]])
        for pack in sorted(counts):
            found[self.settings.packs[pack].name] = counts[pack]
        return found


def build_decontaminator(settings: DecontaminateSettings) -> Step:
    """Read the packs and return the step that looks for them; it can be sent to other processes.

    Raises:
        DataError: a pack is missing, damaged, or has no text under its keys; all faults at once.
    """
    return read_packs(settings)


def read_packs(settings: DecontaminateSettings) -> Decontaminator:
    """Do what `build_decontaminator` does, and give access to what was read.

    Raises:
        DataError: as there.
    """
    faults: list[str] = input_faults(list(dict.fromkeys(pack.path for pack in settings.packs))) if settings.packs else []
    raise_faults(DataError, faults)
    contents, hashes, owners = {}, [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for number, pack in enumerate(settings.packs):
        texts = list(_texts(pack, faults))
        sized = [words_of(normalise(text)) for text in texts]
        long = [words for words in sized if len(words) >= settings.short_words]
        mine = np.unique(np.concatenate([np.empty(0, np.uint64), *(_wanted(words, settings.words) for words in long)]))
        contents[pack.name] = PackContents(texts=len(texts), ngrams=len(mine), too_short=len(sized) - len(long))
        hashes.append(mine)
        owners.append(np.full(len(mine), number))
        if not len(mine) and not faults:
            faults.append(f"{pack.path}: has no text of {settings.short_words} words or more under "
                          f"{', '.join(pack.keys)}; a pack must have one; correct its keys")
    raise_faults(DataError, faults[:_MOST_FAULTS])
    unique, members, pack_sets = _merge(np.concatenate(hashes), np.concatenate(owners))
    begins = np.zeros(max(2, 4 << len(unique).bit_length()), bool)
    begins[_first_bits(unique, len(begins))] = True
    return Decontaminator(settings, unique, members, begins, pack_sets, contents)


def _first_bits(hashes: np.ndarray, values: int) -> np.ndarray:
    return hashes >> np.uint64(65 - values.bit_length())


def _wanted(words: Sequence[str], longest: int) -> np.ndarray:
    """Return the hashes of the runs of `longest` words, or of all words where there are fewer."""
    *_, hashes = ngram_hashes(words, longest)
    return hashes


def _merge(hashes: np.ndarray, owners: np.ndarray) -> tuple[np.ndarray, np.ndarray, tuple[tuple[int, ...], ...]]:
    order = np.lexsort((owners, hashes))
    hashes, owners = hashes[order], owners[order]
    unique, starts = np.unique(hashes, return_index=True)
    several = np.flatnonzero(np.diff(starts, append=len(hashes)) > 1)
    sets: dict[tuple[int, ...], int] = {(owner,): owner for owner in range(int(owners.max(initial=-1)) + 1)}
    members = owners[starts].astype(np.uint16)
    ends = np.append(starts, len(hashes))
    for place in several.tolist():
        packs = tuple(owners[ends[place]:ends[place + 1]].tolist())
        members[place] = sets.setdefault(packs, len(sets))
    return unique, members, tuple(sets)


def _texts(pack: PackSettings, faults: list[str]) -> Iterator[str]:
    """Yield the texts of a pack; a line that is no object, or has none of the keys, becomes a fault."""
    for chunk in read_chunks(pack.path):
        for number, line in enumerate(chunk.lines, chunk.first_line):
            if not line.strip():
                continue
            try:
                record = json.loads(line.removeprefix(b"\xef\xbb\xbf").decode("utf-8"))
            except (ValueError, RecursionError):
                record = None
            if not isinstance(record, dict) or not any(key in record for key in pack.keys):
                faults.append(f"{pack.path}:{number}: is no object with one of the keys {', '.join(pack.keys)}; every line "
                              "must be one; repair or remove it")
                continue
            for key in pack.keys:
                yield from _strings(record.get(key))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
