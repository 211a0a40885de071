"""Make four-way continuation items of any text: how does this paragraph go on, and how do three others?

The wrong continuations are right ones of other paragraphs, and as long as the right one: in a fourth of the items that is
the longest, in a fourth the second longest, and so on.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_ttl.data.documents import DocumentReader, input_faults
from megatron_ttl.errors import DataError, UserError, raise_faults
from megatron_ttl.evaluate.synthetic import Row, write_items
from megatron_ttl.files import atomic_directory

CHOICES = 4
_CONTEXT, _CONTINUATION = (40, 400), (20, 250)  # characters, from and to
_NEAR = 8  # wrong continuations are among so many of the next shorter and longer ones
_MOST_DOCUMENTS = 200_000
_SENTENCE_ENDS = re.compile(r"(?<=[.!?…”])\s+(?=[“\"(]?[A-ZÀ-Þ—])")
_NAME = re.compile(r"[A-Za-z0-9_.-]+")


@dataclass(frozen=True)
class _Cut:
    """A paragraph in two."""

    number: int
    context: str
    continuation: str


def continuation_rows(texts: Iterable[str], items: int, seed: int) -> list[Row]:
    """Return items made of documents: one paragraph of a document at most, cut between two sentences near its middle.

    Args:
        texts: documents that the model has not been trained on; the first 200,000 are looked at.
        items: how many.
        seed: of what is chosen.

    Raises:
        DataError: the documents have too few paragraphs of two sentences and a fitting length.
    """
    draw = random.Random(seed)
    cuts = _cuts(texts, draw)
    middle = range(_NEAR, len(cuts) - _NEAR)
    if len(middle) < items:
        raise DataError(f"--text: has {len(cuts):,} documents with a paragraph that can be cut between two sentences (the "
                        f"first part {_CONTEXT[0]} to {_CONTEXT[1]} characters, the second {_CONTINUATION[0]} to "
                        f"{_CONTINUATION[1]}); {items:,} items need {items + 2 * _NEAR:,}; give more text, or ask for fewer items")
    places = sorted(middle, key=lambda _: draw.random())[:items]
    rows = []
    for number, place in enumerate(places):
        shorter, answer = number % CHOICES, number // CHOICES % CHOICES  # every length rank at every place equally often
        below = _some(range(place - _NEAR, place), shorter, draw)
        above = _some(range(place + 1, place + 1 + _NEAR), CHOICES - 1 - shorter, draw)
        choices = [cuts[other].continuation for other in _some([*below, *above], CHOICES - 1, draw)]
        choices.insert(answer, cuts[place].continuation)
        rows.append({"context": cuts[place].context, "choices": [f" {choice}" for choice in choices], "answer": answer})
    rows.sort(key=lambda _: draw.random())
    return [{"id": f"continuation-{number:04d}", **row} for number, row in enumerate(rows, start=1)]


def _some(entries: Iterable[int], count: int, draw: random.Random) -> list[int]:
    return sorted(entries, key=lambda _: draw.random())[:count]


def _cuts(texts: Iterable[str], draw: random.Random) -> list[_Cut]:
    """Return a cut of every document that has one, by length of the continuation; no two contexts or continuations alike."""
    contexts, continuations = set(), set()
    found = []
    for number, text in enumerate(islice(texts, _MOST_DOCUMENTS)):
        possible = [cut for paragraph in text.split("\n") if (cut := _cut(number, paragraph)) is not None]
        if not possible:
            continue
        cut = possible[int(draw.random() * len(possible))]
        if cut.context not in contexts and cut.continuation not in continuations:
            contexts.add(cut.context)
            continuations.add(cut.continuation)
            found.append(cut)
    return sorted(found, key=lambda cut: (len(cut.continuation), cut.number))


def _cut(number: int, paragraph: str) -> _Cut | None:
    paragraph = paragraph.strip()
    ends = sorted(((match.start(), match.end()) for match in _SENTENCE_ENDS.finditer(paragraph)),
                  key=lambda end: (abs(end[0] - len(paragraph) / 2), end))
    for end, start in ends:
        context, continuation = paragraph[:end], paragraph[start:]
        if (_CONTEXT[0] <= len(context) <= _CONTEXT[1]
                and _CONTINUATION[0] <= len(continuation) <= _CONTINUATION[1]):
            return _Cut(number, context, continuation)
    return None


def make_continuation_pack(text: Path, output: Path, text_key: str = "text", items: int = 400, seed: int = 1,
                           skip: int = 0, language: str = "pt", license: str = "as the text it was made of") -> dict[str, Any]:
    """Write a folder with a task `continuation_<name of the folder>`: its definition and its items.

    Args:
        text: documents, `.jsonl`, packed or not, that no model to be compared has been trained on.
        output: the folder, new.
        text_key: key of the text.
        items: how many.
        seed: of what is chosen.
        skip: leave out so many documents at the beginning.
        language: of the text.
        license: of the text.

    Returns:
        What was written and read.

    Raises:
        UserError: numbers or names are wrong, the folder is there, the text is missing, damaged or too little.
    """
    raise_faults(UserError, _faults(text, output, items, seed, skip))
    name = f"continuation_{output.name}"
    reader = DocumentReader([text], text_key)
    documents: Iterator[str] = islice(reader, skip, None)
    rows = continuation_rows(documents, items, seed)
    with atomic_directory(output) as folder:
        write_items(folder / f"{name}.jsonl", rows)
        (folder / f"{name}.yaml").write_text(_definition(name, text.name, language, license), encoding="utf-8")
    return {"output": str(output), "task": name, "items": len(rows), "seed": seed, "bad_lines": sum(reader.rejected.values())}


def _faults(text: Path, output: Path, items: int, seed: int, skip: int) -> Iterator[str]:
    if not CHOICES <= items <= 100_000:
        yield f"--items: {items}; must be between {CHOICES} and 100000; 400 have a standard error of 2.5 points"
    if not 0 <= seed < 2**63:
        yield f"--seed: {seed}; must be between 0 and 2^63 - 1; take a small number"
    if skip < 0:
        yield f"--skip: {skip}; must be 0 or a number of documents; leave it out to use all"
    if not _NAME.fullmatch(output.name):
        yield (f"--output: {output}; the folder's name becomes the task's and must consist of letters, digits, '_', '.' and "
               "'-'; choose another name")
    if output.exists():
        yield f"--output: {output}; is there already; must be a new folder; choose another name, or remove it"
    yield from input_faults([text])


def _definition(name: str, source: str, language: str, license: str) -> str:
    """Return the task's YAML; what JSON writes as a text, YAML reads as one."""
    return f"""task: {name}
output_type: multiple_choice
doc_to_text: context
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
num_fewshot: 0
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
pack:
  version: "1.0"
  definition: megatron_ttl
  language: {json.dumps(language)}
  prompt_language: {json.dumps(language)}
  source: {json.dumps(f"paragraphs of {source}, made by tools/make_packs.py", ensure_ascii=False)}
  license: {json.dumps(license, ensure_ascii=False)}
  files: {{test: {name}.jsonl}}
  rows: {{context: text, choices: texts, answer: index}}
  baseline: choices
"""
