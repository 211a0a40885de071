"""Find text of evaluation packs in documents: runs of 13 words that both hold.

Words are compared as `ngrams.words_of` has them: case folded, without punctuation. A text of a pack with fewer than
13 words is looked for as a whole if it has 8 words or more; a shorter one says too little, and is counted and left out.

Memory: at most 18 bytes per n-gram, in every worker. Hashes have 64 bits: that some
document of a corpus of w words is suspected wrongly has a probability of at most 6 w e / 2^64 for e n-grams, that is 0.3 %
for 10 billion words and a million n-grams.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from megatron_ttl.data.corpus.document import Document, Dropped, Step
from megatron_ttl.data.corpus.ngram_index import NgramIndex, index_owners, own_texts
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
    index: NgramIndex
    """N-grams of the packs, by their place in the settings."""
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
        counts = self.index.shared(text)
        return Counter({self.settings.packs[pack].name: counts[pack] for pack in sorted(counts)})


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
    contents, owners = {}, []
    for pack in settings.packs:
        owner = own_texts(_texts(pack, faults), settings.words, settings.short_words)
        contents[pack.name] = PackContents(texts=owner.texts, ngrams=len(owner.hashes), too_short=owner.too_short)
        owners.append(owner)
        if not len(owner.hashes) and not faults:
            faults.append(f"{pack.path}: has no text of {settings.short_words} words or more under "
                          f"{', '.join(pack.keys)}; a pack must have one; correct its keys")
    raise_faults(DataError, faults[:_MOST_FAULTS])
    return Decontaminator(settings, index_owners(owners, settings.words, settings.short_words), contents)


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
                yield from strings_in(record.get(key))


def strings_in(value: Any) -> Iterator[str]:
    """Yield a text, or the texts in lists and objects of them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from strings_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from strings_in(item)
