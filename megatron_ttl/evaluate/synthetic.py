"""Compose signal tasks in Portuguese from tables of words: agreement minimal pairs and last-word cloze. Seeded, byte for byte.

No item can be answered by what words are like on their own. Agreement items come in pairs in which the same two words are
right once each, so that whoever prefers a word, or the longer sentence, has half of them. In cloze items that tell a
little story two words fit the frame, and only the story says which.
"""

from __future__ import annotations

import json
import random
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_ttl.evaluate.signals import PACKS
from megatron_ttl.files import make_directory, or_disk_error, write_text

WORDS = PACKS / "pt" / "synthetic.toml"
_OF = {"m": ("do", "dos"), "f": ("da", "das")}
_THE = {"m": ("o", "os"), "f": ("a", "as")}
_A = {"m": "um", "f": "uma"}
_GENDERS = ("m", "f")

Row = dict[str, Any]


def write_items(path: Path, rows: Sequence[Row]) -> None:
    """Write items as a signal task's file."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def agreement_rows(path: Path = WORDS) -> list[Row]:
    """Return the items of agreement_pt: two sentences that differ in one word, of which one agrees.

    Phenomena: subject and verb, without and with a noun of the other number between them (in a complement, in a relative
    clause); article and noun, in gender and in number; adjective and noun, side by side, and across a noun of the other
    gender or number.
    """
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    words, draw = _Words(table["agreement"], table["names"].split()), random.Random(table["seed"])
    rows: list[Row] = []
    for phenomenon, make in _PHENOMENA.items():
        seen: set[str] = set()
        while len(seen) < table["agreement"]["pairs_per_phenomenon"]:
            pair = make(words, draw)
            if pair[0][0] in seen:
                continue
            seen.add(pair[0][0])
            first = int(draw.random() * 2)
            for place, (right, wrong) in enumerate(pair):
                answer = first ^ place
                choices = [right, wrong] if answer == 0 else [wrong, right]
                rows.append({"phenomenon": phenomenon, "context": "", "choices": choices, "answer": answer})
    return _numbered("agreement", rows, draw)


class _Words:
    """The tables, cut up."""

    def __init__(self, table: dict[str, Any], names: list[str]) -> None:
        self._lists = {key: [entry.strip().split("/") for entry in value.replace("\n", " ").split(",")]
                       for key, value in table.items() if isinstance(value, str)}
        self._lists["names"] = [[name] for name in names]

    def one(self, name: str, draw: random.Random) -> list[str]:
        """Draw an entry: only `random` of the generator is used, whose values no Python version changes."""
        entries = self._lists[name]
        return entries[int(draw.random() * len(entries))]


def _gender(draw: random.Random) -> str:
    return _GENDERS[int(draw.random() * 2)]


def _sentence(*words: str) -> str:
    text = " ".join(words)
    return text[0].upper() + text[1:] + "."


Pair = list[tuple[str, str]]
"""Two items, (right, wrong) each."""


def _subject_verb(words: _Words, draw: random.Random, attractor: str = "none") -> Pair:
    """Both numbers of one subject with both forms of one verb."""
    people, gender, other = draw.random() < 0.5, _gender(draw), _gender(draw)
    if attractor == "relative" or people:
        head = words.one(f"kin_{gender}" if attractor == "complement" else f"people_{gender}", draw)
        between, verb = words.one(f"people_{other}", draw), words.one("people_verbs", draw)
        while between == head:
            between = words.one(f"people_{other}", draw)
    else:
        head, between, verb = (words.one(name, draw) for name in (f"parts_{gender}", f"places_{other}", "part_verbs"))
    relative = words.one("known_by", draw)
    pair = []
    for number in (0, 1):
        subject = [_THE[gender][number], head[number]]
        if attractor == "complement":
            subject += [_OF[other][1 - number], between[1 - number]]
        elif attractor == "relative":
            subject += ["que", _THE[other][1 - number], between[1 - number], relative[1 - number]]
        pair.append((_sentence(*subject, verb[number], verb[2]), _sentence(*subject, verb[1 - number], verb[2])))
    return pair


def _across_complement(words: _Words, draw: random.Random) -> Pair:
    return _subject_verb(words, draw, "complement")


def _across_relative(words: _Words, draw: random.Random) -> Pair:
    return _subject_verb(words, draw, "relative")


def _article_gender(words: _Words, draw: random.Random) -> Pair:
    name, did, when = (words.one(key, draw)[0] for key in ("names", "did", "when"))
    nouns = {gender: words.one(f"things_{gender}", draw)[0] for gender in _GENDERS}
    return [tuple(_sentence(name, did, _A[article], nouns[gender], when) for article in (gender, other))
            for gender, other in ("mf", "fm")]


def _article_number(words: _Words, draw: random.Random) -> Pair:
    name, did, when = (words.one(key, draw)[0] for key in ("names", "did", "when"))
    gender = _gender(draw)
    noun = _of_two_forms(words, f"things_{gender}", draw)
    return [tuple(_sentence(name, did, _THE[gender][article], noun[number], when) for article in (number, 1 - number))
            for number in (0, 1)]


def _of_two_forms(words: _Words, name: str, draw: random.Random) -> list[str]:
    noun = words.one(name, draw)
    while noun[0] == noun[1]:
        noun = words.one(name, draw)
    return noun


def _adjective_gender(words: _Words, draw: random.Random) -> Pair:
    name, did, when, adjective = (words.one(key, draw)[0] for key in ("names", "did", "when", "adjectives"))
    nouns = {gender: words.one(f"things_{gender}", draw)[0] for gender in _GENDERS}
    return [tuple(_sentence(name, did, _A[gender], nouns[gender], _inflected(adjective, form, 0), when)
                  for form in (gender, other)) for gender, other in ("mf", "fm")]


def _inflected(adjective: str, gender: str, number: int) -> str:
    return adjective[:-1] + {"m": "o", "f": "a"}[gender] + "s" * number


def _state_gender(words: _Words, draw: random.Random) -> Pair:
    """The noun between subject and adjective has the other gender."""
    number, state = int(draw.random() * 2), words.one("states", draw)[0]
    pair = []
    for gender, other in ("mf", "fm"):
        subject = [_THE[gender][number], words.one(f"parts_{gender}", draw)[number], _OF[other][number],
                   words.one(f"places_{other}", draw)[number], ("está", "estão")[number]]
        pair.append(tuple(_sentence(*subject, _inflected(state, form, number)) for form in (gender, other)))
    return pair


def _state_number(words: _Words, draw: random.Random) -> Pair:
    """The noun between subject and adjective has the other number."""
    gender, other = _gender(draw), _gender(draw)
    head, between = words.one(f"parts_{gender}", draw), words.one(f"places_{other}", draw)
    state = words.one("states", draw)[0]
    pair = []
    for number in (0, 1):
        subject = [_THE[gender][number], head[number], _OF[other][1 - number], between[1 - number],
                   ("está", "estão")[number]]
        pair.append(tuple(_sentence(*subject, _inflected(state, gender, form)) for form in (number, 1 - number)))
    return pair


_PHENOMENA: dict[str, Callable[[_Words, random.Random], Pair]] = {
    "subject-verb": _subject_verb, "subject-verb across a complement": _across_complement,
    "subject-verb across a relative clause": _across_relative, "article-noun gender": _article_gender,
    "article-noun number": _article_number, "adjective-noun gender": _adjective_gender,
    "adjective-noun gender across a complement": _state_gender, "adjective-noun number across a complement": _state_number,
}


def cloze_rows(path: Path = WORDS) -> list[Row]:
    """Return the items of cloze_pt: a context, and the word that it must end with, behind a space."""
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    cloze, draw = table["cloze"], random.Random(table["seed"] + 1)
    rows = [{"kind": kind, "context": context, "target": f" {word}"}
            for kind, context, word in (*_stories(cloze, table["names"].split(), draw), *_series(cloze))]
    for line in cloze["known"].strip().split("\n"):
        context, _, word = line.partition("|")
        rows.append({"kind": "known", "context": context, "target": f" {word}"})
    return _numbered("cloze", rows, draw)


def _stories(cloze: dict[str, Any], names: list[str], draw: random.Random) -> Iterator[tuple[str, str, str]]:
    lists = {key: value.replace("\n", " ").split(", ") for key, value in cloze.items()
             if isinstance(value, str) and ", " in value}
    lists["names"] = names

    def two(name: str) -> tuple[str, str]:
        entries = lists[name]
        first = int(draw.random() * len(entries))
        return entries[first], entries[(first + 1 + int(draw.random() * (len(entries) - 1))) % len(entries)]

    for frame in cloze["frames"]:
        kind, places, context, target = (part.strip() for part in frame.split(" | "))
        for number in range(cloze["items_per_frame"]):
            gender = _gender(draw)
            (a, b), (p, q) = two(f"{kind}_{gender}" if kind == "things" else kind), two(places)
            name = two("names")[0]
            while name in (p, q):
                name = two("names")[0]
            first = number % 2 == 0
            filled = {"n": name, "a": a, "b": b, "p": p, "q": q, "x": a if first else b, "x_place": p if first else q,
                      "o_a": _THE[gender][0], "um_a": _A[gender]}
            yield "story", context.format(**filled), target.format(**filled)


def _series(cloze: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield what comes next, and what came before."""
    months, days, counted, tens = (cloze[key].split() for key in ("months", "days", "counted", "tens"))
    for row, after, before in ((months, "Depois de {} vem o mês de", "O mês antes de {} é"),
                               (days, "Hoje é {}, amanhã será", "Hoje é {}, ontem foi")):
        for place, word in enumerate(row):
            yield "series", after.format(word), row[(place + 1) % len(row)]
            yield "series", before.format(word), row[place - 1]
    for row in (counted, tens):
        for place in range(3, len(row)):
            yield "series", ", ".join(row[place - 3 : place]) + ",", row[place]


def _numbered(task: str, rows: list[Row], draw: random.Random) -> list[Row]:
    """Mix the items, so that the first few are like all, and number them."""
    order = sorted(range(len(rows)), key=lambda _: draw.random())
    return [{"id": f"{task}-{number:03d}", **rows[place]} for number, place in enumerate(order, start=1)]


def write_shipped(output: Path) -> dict[str, int]:
    """Write the items of both tasks into a folder; return how many each has."""
    with or_disk_error(output):
        make_directory(output)
        tasks = {"agreement_pt": agreement_rows(), "cloze_pt": cloze_rows()}
        for name, rows in tasks.items():
            write_items(output / f"{name}.jsonl", rows)
    return {name: len(rows) for name, rows in tasks.items()}
