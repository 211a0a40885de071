"""Text of evaluation packs in documents: found where it is, and only there."""

from __future__ import annotations

import gzip
import json
import random
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from megatron_ttl.data.corpus.decontaminate import (
    DecontaminateSettings,
    PackSettings,
    build_decontaminator,
    read_packs,
)
from megatron_ttl.data.corpus.document import Document, Dropped
from megatron_ttl.errors import DataError

# Twenty-one words, of which a document must hold thirteen that follow one another.
QUESTION = ("Um trem sai de Santos às sete da manhã e outro sai de São Paulo meia hora mais tarde, nesse dia")
SHORT = "Quantos ovos cabem em três dúzias e meia?"  # eight words
TINY = "Qual é a capital do Acre?"


def document(text: str) -> Document:
    return Document(text, "web", "CC0", "a.jsonl", 1)


def pack(path: Path, name: str, records: list[dict], *keys: str) -> PackSettings:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return PackSettings(name=name, path=str(path), keys=keys)


@pytest.fixture
def packs(tmp_path) -> tuple[PackSettings, ...]:
    other = " ".join(f"termo{number}" for number in range(30))
    return (pack(tmp_path / "trens.jsonl", "trens", [{"question": QUESTION, "choices": [SHORT, TINY], "id": other}],
                 "question", "choices"),
            pack(tmp_path / "termos.jsonl", "termos", [{"q": {"text": [other]}}, {"q": QUESTION.lower()}], "q"))


def test_thirteen_words_are_found_through_case_and_punctuation(packs):
    step = build_decontaminator(DecontaminateSettings(packs=packs))
    words = QUESTION.replace(",", "").upper().split()
    assert len(words) == 21
    held = document("Começo. " + " - ".join(words[4:17]) + "... e fim.")
    assert step(held) == Dropped("decontamination.trens", 1, "fewer than 1 shared n-grams")
    twelve = document("Começo. " + " ".join([*words[4:16], "outro", *words[17:]]) + " e fim.")
    assert step(twelve) is twelve
    assert step(document(QUESTION)).value == 21 - 12


def test_the_note_says_which_pack_and_how_many(packs):
    step = build_decontaminator(DecontaminateSettings(packs=packs, action="report"))
    noted = step(document(f"{QUESTION}. termo1 {' '.join(f'termo{number}' for number in range(4, 20))} {QUESTION}"))
    assert noted.notes == {"decontamination": {"trens": 9, "termos": 9 + 4}} and noted.text.startswith("Um trem")
    strict = build_decontaminator(DecontaminateSettings(packs=packs, min_ngrams=10))
    assert strict(document(QUESTION)).notes == {"decontamination": {"trens": 9, "termos": 9}}
    terms = document(" ".join(f"termo{number}" for number in range(30)))
    assert strict(terms) == Dropped("decontamination.termos", 18, "fewer than 10 shared n-grams")


def test_short_texts_are_found_whole(packs):
    step = build_decontaminator(DecontaminateSettings(packs=packs))
    assert step(document(f"Ela perguntou: {SHORT} Ninguém sabia.")).rule == "decontamination.trens"
    for harmless in (SHORT.replace("três", "duas"), " ".join(SHORT.split()[:-1]), f"E então: {TINY}", "", "ovos"):
        assert isinstance(step(document(harmless)), Document)
    contents = read_packs(DecontaminateSettings(packs=packs)).contents
    assert contents["trens"].model_dump() == {"texts": 3, "ngrams": 10, "too_short": 1}
    assert build_decontaminator(DecontaminateSettings())(document(QUESTION)).notes == {}


def test_counts_are_those_of_a_plain_loop(tmp_path):
    """Random texts over few words, so that there are chance overlaps of every length."""
    draw = random.Random(4)

    def text(length: int) -> list[str]:
        return [draw.choice("ab") for _ in range(length)]

    items = {name: [text(draw.randint(1, 14)) for _ in range(12)] for name in ("um", "dois", "tres")}
    packs = tuple(pack(tmp_path / f"{name}.jsonl", f"p{number}", [{"t": " ".join(item)} for item in some], "t")
                  for number, (name, some) in enumerate(items.items()))
    step = read_packs(DecontaminateSettings(packs=packs, words=7, short_words=4))
    wanted = {f"p{number}": {tuple(item[place:place + 7]) for item in some if len(item) >= 4
                             for place in range(max(1, len(item) - 6))} for number, some in enumerate(items.values())}
    hits = 0
    for _ in range(200):
        words = text(draw.randint(0, 40))
        runs = {tuple(words[place:place + size]) for size in range(4, 8) for place in range(len(words) - size + 1)}
        expected = {name: len(runs & some) for name, some in wanted.items() if runs & some}
        assert dict(step.shared(" ".join(words))) == expected
        hits += len(expected)
    assert hits > 100
    hashes = step.index.hashes
    assert np.array_equal(hashes, np.unique(hashes)) and len(hashes) == len(set.union(*wanted.values()))


def test_the_step_can_be_sent_to_a_worker(packs):
    step = build_decontaminator(DecontaminateSettings(packs=packs))
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        assert pool.submit(step, document(QUESTION)).result() == step(document(QUESTION))


def test_packs_that_cannot_be_used_are_named(tmp_path, packs):
    (tmp_path / "mau.jsonl").write_text('{"question": "sim"}\n[1]\n\n{"texto": 1}\n')
    bad = PackSettings(name="mau", path=str(tmp_path / "mau.jsonl"), keys=("question",))
    with pytest.raises(DataError, match="(?s)mau.jsonl:2: is no object with one of the keys question.*mau.jsonl:4: "):
        build_decontaminator(DecontaminateSettings(packs=(*packs, bad)))
    (tmp_path / "curto.jsonl.gz").write_bytes(gzip.compress(b'{"q": "sim", "id": 3}\n'))
    short = PackSettings(name="curto", path=str(tmp_path / "curto.jsonl.gz"), keys=("q", "id"))
    with pytest.raises(DataError, match="curto.jsonl.gz: has no text of 8 words or more under q, id"):
        build_decontaminator(DecontaminateSettings(packs=(short,)))
    with pytest.raises(DataError, match="nada.jsonl: does not exist"):
        build_decontaminator(DecontaminateSettings(packs=(PackSettings(name="n", path="nada.jsonl", keys=("q",)),)))
    for fault, words in (({"packs": (*packs, packs[0])}, "two have the same name"), ({"short_words": 14}, "at most words")):
        with pytest.raises(ValidationError, match=words):
            DecontaminateSettings(**fault)
    with pytest.raises(ValidationError, match="String should match pattern"):
        PackSettings(name="a/b", path="a", keys=("q",))


def test_real_packs_are_found_in_real_text(shared_data):
    """Examination questions quote novels and laws: those documents, and no others, hold some."""
    keys = {"bluex": "question", "oab": "question", "enem": "question", "faquad": "context", "hatebr": "text"}
    packs = tuple(PackSettings(name=name, path=str(shared_data / "tasks" / f"{name}.sample.jsonl"), keys=(key,))
                  for name, key in keys.items())
    step = build_decontaminator(DecontaminateSettings(packs=packs))
    found = {}
    for name in ("literatura_br", "porttinari", "common_voice", "redacoes"):
        with gzip.open(shared_data / "text" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
            results = [step(document(json.loads(line)["text"])) for line in lines]
        found[name] = [(result.rule, result.value) for result in results if isinstance(result, Dropped)]
    assert found == {"literatura_br": [("decontamination.bluex", 90)], "porttinari": [], "common_voice": [], "redacoes": []}
