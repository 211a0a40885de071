"""Shipped signal tasks: the same bytes again, and nothing that gives the answer away."""

from __future__ import annotations

import json
import math
import random
import re
import subprocess
import sys
from collections import Counter

import pytest

from megatron_ttl.errors import DataError, UserError
from megatron_ttl.evaluate.continuation import make_continuation_pack
from megatron_ttl.evaluate.packs import choose_tasks
from megatron_ttl.evaluate.signals import PACKS, read_signal_tasks
from megatron_ttl.evaluate.synthetic import write_shipped

TASKS = ("agreement_pt", "cloze_pt", "continuation_pt")


def items_of(name):
    return [json.loads(line) for line in (PACKS / f"pt/{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def accuracy(items, score):
    """Return the share of the items whose right choice has the largest score, the first among equals."""
    right = 0
    for item in items:
        scores = [score(choice) for choice in item["choices"]]
        right += scores.index(max(scores)) == item["answer"]
    return right / len(items)


def test_two_tasks_come_again_byte_for_byte(tmp_path):
    assert write_shipped(tmp_path) == {"agreement_pt": 400, "cloze_pt": 443}
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (PACKS / f"pt/{path.name}").read_bytes(), path.name


@pytest.mark.slow
def test_continuations_come_again_byte_for_byte(tmp_path, repository):
    """By the commands that the definition names."""
    source = re.search(r'source: "paragraphs of (\S+) (.*), made by tools/make_packs.py (.*)"',
                       (PACKS / "pt/continuation_pt.yaml").read_text(encoding="utf-8"))
    program, composed, made = source.groups()
    for command in ([program, *composed.split(), "--output", tmp_path / "text.jsonl"],
                    ["tools/make_packs.py", "--text", tmp_path / "text.jsonl", *made.split(), "--output", tmp_path / "pt"]):
        subprocess.run([sys.executable, *command], cwd=repository, check=True, capture_output=True)
    assert (tmp_path / "pt/continuation_pt.jsonl").read_bytes() == (PACKS / "pt/continuation_pt.jsonl").read_bytes()


def test_who_prefers_words_has_half_of_the_agreement_items():
    """Whatever each word is worth, and whether the longer or the shorter sentence is preferred."""
    items = items_of("agreement_pt")
    for seed in range(5):
        draw, worth = random.Random(seed), {}
        assert accuracy(items, lambda text, worth=worth, draw=draw: sum(
            worth.setdefault(word, draw.random()) for word in re.findall(r"\w+", text.lower()))) == 0.5
    for sign in (1, -1):
        assert accuracy(items, lambda text, sign=sign: sign * len(text)) == pytest.approx(0.5, abs=0.05)
    assert Counter(item["answer"] for item in items) == {0: 200, 1: 200}
    assert set(Counter(item["phenomenon"] for item in items).values()) == {50}


def test_agreement_items_are_minimal_pairs():
    seen = set()
    for item in items_of("agreement_pt"):
        first, second = (choice.split() for choice in item["choices"])
        assert len(first) == len(second) and sum(a != b for a, b in zip(first, second, strict=True)) == 1
        seen.add(frozenset(item["choices"]))
    assert len(seen) == 400


def test_cloze_answers_are_many_and_not_where_one_would_look():
    items = items_of("cloze_pt")
    targets = Counter(item["target"] for item in items)
    assert max(targets.values()) / len(items) < 0.025, "the most frequent word says nothing"
    assert len({item["context"] for item in items}) == len(items)
    assert all(re.fullmatch(r" [\w-]+", item["target"]) for item in items)
    stories = [item for item in items if item["kind"] == "story"]
    places = []
    for item in stories:
        words = re.findall(r"[\w-]+", item["context"])
        other = [word for word in words if f" {word}" in targets]
        assert words.count(item["target"].strip()) >= 1 and words[-1] != item["target"].strip()
        places.append(other.index(item["target"].strip()) < len(other) / 2)
    assert 0.4 < sum(places) / len(places) < 0.7, "neither the first nor the last word that fits"


def test_continuations_give_nothing_away():
    """Length, place and frequent words within three standard errors of a fourth."""
    items = items_of("continuation_pt")
    counts = Counter(word for item in items for choice in item["choices"] for word in choice.lower().split())
    bound = 3 * math.sqrt(0.25 * 0.75 / len(items))
    for score in (len, lambda text: -len(text), lambda text: sum(map(math.log, map(counts.get, text.lower().split()))),
                  lambda text: sum(math.log(counts[word]) for word in text.lower().split()) / len(text.split())):
        assert accuracy(items, score) == pytest.approx(0.25, abs=bound)
    assert set(Counter(item["answer"] for item in items).values()) == {80}
    for item in items:
        lengths = sorted(map(len, item["choices"]))
        assert lengths[-1] <= 1.5 * lengths[0] and len(set(item["choices"])) == 4


def test_packs_and_training_read_the_same_items():
    """The first few of every file, as the harness asks and as a run asks."""
    for task, signal in zip(choose_tasks(["signals"]), read_signal_tasks(TASKS), strict=True):
        assert task.name == signal.name and task.tags == ("signals",) and task.shots == 0
        rows = task.load().splits["test"]
        assert 300 <= len(rows) == len(signal.items) <= 500
        for row, item in zip(rows, signal.items, strict=True):
            assert row["context"] == item.context
            assert row.get("answer") == item.answer
            assert list(item.continuations) == (row["choices"] if signal.has_choices else [row["target"]])


def write_text_file(path, count=80):
    draw = random.Random(3)
    with open(path, "w", encoding="utf-8") as handle:
        for number in range(count):
            words = [" ".join(draw.choice(["casa", "rio", "vento", "mar", "luz"]) for _ in range(draw.randint(9, 15)))
                     for _ in range(3)]
            text = f"Título {number}.\n" + " ".join(f"{one.capitalize()} {number}." for one in words)
            handle.write(json.dumps({"body": text}) + "\n")
    return path


def test_a_pack_of_ones_own_text(tmp_path):
    text = write_text_file(tmp_path / "held.jsonl")
    report = make_continuation_pack(text, tmp_path / "mine", text_key="body", items=40, seed=5)
    assert report == {"output": str(tmp_path / "mine"), "task": "continuation_mine", "items": 40, "seed": 5, "bad_lines": 0}
    make_continuation_pack(text, tmp_path / "again" / "mine", text_key="body", items=40, seed=5)
    name = "continuation_mine.jsonl"
    assert (tmp_path / "mine" / name).read_bytes() == (tmp_path / "again/mine" / name).read_bytes()
    task, = choose_tasks(["continuation_mine"], folders=[tmp_path / "mine"])
    originals = [json.loads(line)["body"] for line in text.read_text(encoding="utf-8").splitlines()]
    for row in task.load().splits["test"]:
        assert [any(row["context"] + choice in original for original in originals) for choice in row["choices"]] == [
            place == row["answer"] for place in range(4)]
    assert len(read_signal_tasks([str(tmp_path / "mine" / name)], limit=7)[0].items) == 7


def test_mistakes_are_named(tmp_path):
    text = write_text_file(tmp_path / "held.jsonl", count=30)
    with pytest.raises(DataError, match=r"--text: has 30 documents with a paragraph .* 20 items need 36; give more text"):
        make_continuation_pack(text, tmp_path / "x", text_key="body", items=20)
    with pytest.raises(UserError) as caught:
        make_continuation_pack(tmp_path / "none.jsonl", tmp_path, items=1, seed=-1, skip=-2)
    assert [fault.split(":")[0] for fault in caught.value.faults[:4]] == ["--items", "--seed", "--skip", "--output"]
    assert "none.jsonl: does not exist" in str(caught.value)


@pytest.mark.parametrize(("lines", "fault"), [
    (['{"context": "A", "choices": [" b", " c"], "answer": 2}'], ":1: has not two or more choices, and the number"),
    (['{"context": "A", "choices": [" b", ""], "answer": 0}'], ":1: has a continuation that is no text, or an empty one"),
    (['{"context": "A ", "target": "b"}'], ":1: has a context that ends in white space, which belongs to"),
    (['{"context": "A", "target": " b"}', "[]"], ":2: is no object with a context"),
    (['{"context": "A", "target": " b"}', "{"], ":2: .*; an item is an object with id, context and either"),
    (['{"context": "A", "target": " b"}', '{"context": "A", "choices": [" b", " c"], "answer": 1}'], "holds both kinds of items")])
def test_files_that_hold_no_items_are_refused(tmp_path, lines, fault):
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=f"own.jsonl{fault}" if fault.startswith(":") else fault):
        read_signal_tasks([str(path)])
