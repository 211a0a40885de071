"""Items planted in training text are found with their documents; nothing else is."""

from __future__ import annotations

import gzip
import json
import random

import pytest
from score_rows import score
from tiny_folder import documents, write_dataset

from megatron_ttl.data.zstd_file import zstd_writer
from megatron_ttl.errors import DataError
from megatron_ttl.evaluate import contamination
from megatron_ttl.evaluate.contamination import find_contamination, with_contamination
from megatron_ttl.evaluate.task import Measured, Task, TaskData, TaskResult

DRAW = random.Random(3)
WORDS = [f"{a}{b}{c}" for a in ("pa", "to", "li", "çã") for b in ("ra", "mo", "né") for c in ("do", "sa", "is", "a")]
CLEAN = documents(40, seed=7)


def passage(length: int = 20) -> str:
    return " ".join(DRAW.choice(WORDS) for _ in range(length))


def rows(count: int) -> TaskData:
    """Items with a question of 20 words, a choice of 9 and one of 2."""
    items = [{"id": number, "question": passage(), "choices": [passage(9), "nada disso"], "answer": 0}
             for number in range(count)]
    return TaskData({"test": [*items, {"id": count, "question": "Qual é?", "choices": ["sim", "não"], "answer": 1}]},
                    f"xxh3:{count}", "itens.jsonl")


@pytest.fixture(scope="module")
def tasks() -> dict[str, TaskData]:
    return {"um": rows(6), "dois": rows(4)}


@pytest.fixture(scope="module")
def planted(tasks) -> list[str]:
    """40 documents: 3 holds a question of the first task, 5 the same and a choice of the second, 8 too few words of one."""
    texts = list(CLEAN)
    question = tasks["um"].splits["test"][2]["question"]
    choice = tasks["dois"].splits["test"][1]["choices"][0]
    texts[3] += " " + " - ".join(question.upper().split()[4:17]) + "."
    texts[5] = f"{question}\n{texts[5]} ({choice.replace(' ', ', ')})"
    texts[8] += " " + " ".join(tasks["um"].splits["test"][0]["question"].split()[:12]) + "."
    texts[9] += " " + " ".join(choice.split()[:8])
    return texts


def found_in(result):
    return {name: {number: (item.documents, item.first) for number, item in found.items.items()}
            for name, found in result.items()}


def wanted_in(name: str, first: int) -> dict:
    three, five = f"{name}:{3 + first}", f"{name}:{5 + first}"
    return {"um": {2: (2, [three, five])}, "dois": {1: (1, [five])}}


def write_lines(path, texts) -> None:
    lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)
    if path.suffix == ".zst":
        with open(path, "wb") as handle, zstd_writer(handle) as packed:
            packed.write(lines)
    else:
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "documents-00000.jsonl.zst"])
def test_planted_items_are_found_in_files(tmp_path, tasks, planted, name):
    write_lines(tmp_path / name, planted)
    found = find_contamination(tasks, [tmp_path / name])
    assert found_in(found) == wanted_in(name, first=1)
    assert found["um"].too_short == {6} and found["dois"].too_short == {4}


def test_planted_items_are_found_in_tokens(tmp_path, tasks, planted, tokenizer_folder, monkeypatch):
    prefix = write_dataset(tmp_path / "pt", tokenizer_folder, planted)
    assert found_in(find_contamination(tasks, [prefix])) == wanted_in("pt", first=0)
    monkeypatch.setattr("megatron_ttl.evaluate.training_text._UNIT_TOKENS", 300)  # a few documents at a time
    assert found_in(find_contamination(tasks, [prefix])) == wanted_in("pt", first=0)


def test_nothing_is_found_where_nothing_is(tmp_path, tasks, tokenizer_folder):
    write_lines(tmp_path / "a.jsonl", CLEAN)
    prefix = write_dataset(tmp_path / "pt", tokenizer_folder, CLEAN)
    assert found_in(find_contamination(tasks, [tmp_path / "a.jsonl", prefix])) == {"um": {}, "dois": {}}


@pytest.mark.slow
def test_workers_find_the_same(tmp_path, tasks, planted, monkeypatch):
    write_lines(tmp_path / "a.jsonl", planted)
    monkeypatch.setattr("megatron_ttl.evaluate.training_text._UNIT_BYTES", 2000)
    monkeypatch.setattr(contamination, "_WORKER_BYTES", 100)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert found_in(find_contamination(tasks, [tmp_path / "a.jsonl"])) == wanted_in("a.jsonl", first=1)


def test_only_the_first_documents_are_named_and_all_are_counted(tmp_path, tasks):
    question = tasks["um"].splits["test"][0]["question"]
    for name in "ab":
        write_lines(tmp_path / f"{name}.jsonl", [question] * 4)
    item = find_contamination(tasks, [tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "a.jsonl"])["um"].items[0]
    assert item.documents == 8, "a source that is named twice is read once"
    assert item.first == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3", "a.jsonl:4", "b.jsonl:1"]


def test_many_items_keep_their_numbers(tmp_path):
    """More than a byte can count; two hold the same words."""
    many = rows(400)
    many.splits["test"][390]["question"] = many.splits["test"][300]["question"]
    write_lines(tmp_path / "a.jsonl", [many.splits["test"][300]["question"], many.splits["test"][257]["choices"][0]])
    assert list(find_contamination({"t": many}, [tmp_path / "a.jsonl"])["t"].items) == [257, 300, 390]


def test_what_was_found_is_kept(tmp_path, tasks, planted, monkeypatch):
    cache, sources = tmp_path / "cache", [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for source in sources:
        write_lines(source, planted if source.name == "a.jsonl" else CLEAN)
    searched = []
    search = contamination._search
    monkeypatch.setattr(contamination, "_search", lambda source, missing, *rest: (
        searched.append((source.name, sorted(missing))), search(source, missing, *rest))[1])
    first = find_contamination({"um": tasks["um"]}, sources[:1], cache)
    assert searched == [("a.jsonl", ["um"])]
    both = find_contamination(tasks, sources, cache)
    assert searched[1:] == [("a.jsonl", ["dois"]), ("b.jsonl", ["dois", "um"])]
    assert both["um"].items == first["um"].items and found_in(both) == wanted_in("a.jsonl", first=1)
    assert find_contamination(tasks, sources, cache) == both and len(searched) == 3

    reordered = TaskData({"test": tasks["um"].splits["test"][::-1]}, tasks["um"].checksum, "itens.jsonl")
    assert list(find_contamination({"um": reordered}, sources[:1], cache)["um"].items) == [4], "items have other numbers now"
    for file in cache.iterdir():
        file.write_bytes(file.read_bytes()[:40])
    assert find_contamination(tasks, sources, cache) == both, "damaged files are searched again"
    write_lines(sources[1], planted)
    assert find_contamination(tasks, sources, cache)["dois"].items[1].documents == 2, "another file of the same name"


def test_an_interruption_keeps_the_sources_before_it(tmp_path, tasks, planted, monkeypatch):
    cache, sources = tmp_path / "cache", [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for source in sources:
        write_lines(source, planted)
    look = contamination._look

    def interrupted(index, source, unit):
        if source.name == "b.jsonl":
            raise KeyboardInterrupt
        return look(index, source, unit)

    monkeypatch.setattr(contamination, "_look", interrupted)
    with pytest.raises(KeyboardInterrupt):
        find_contamination(tasks, sources, cache)
    assert len(list(cache.iterdir())) == 2
    assert find_contamination(tasks, sources[:1], cache)["um"].items[2].documents == 2


def test_sources_that_cannot_be_used_are_named_at_once(tmp_path, tasks, tokenizer_folder):
    (tmp_path / "ruim.jsonl").write_text('{"text": "um"}\n[1]\n{"texto": "dois"}\n')
    with pytest.raises(DataError, match=r"ruim.jsonl: 2 of 3 lines are no documents \(1 x a list instead of an object, 1 x no "
                                        r"key 'text'\); at most 0.1 % may be"):
        find_contamination(tasks, [tmp_path / "ruim.jsonl"])
    prefix = write_dataset(tmp_path / "pt", tokenizer_folder, CLEAN)
    (tmp_path / "pt.json").unlink()
    (tmp_path / "a.docx").write_text("nada")
    with pytest.raises(DataError) as caught:
        find_contamination(tasks, [prefix, tmp_path / "none", tmp_path / "a.docx"])
    text = str(caught.value)
    assert "pt: has no manifest, so its tokenizer is unknown; it must have one to be decoded" in text
    assert "none.bin: does not exist" in text and "a.docx: has an unknown suffix" in text


def test_a_record_says_how_many_and_what_is_left(tasks, tmp_path):
    data = tasks["um"]
    task = Task("um", "1", "megatron_ttl", "pt", "pt", 0, ("acc", "f1"), {}, "", "", lambda: data)
    items = [{"item": number, "target": 0, "answers": [], "acc": float(number != 2), "f1": [0, 1]} for number in range(7)]
    result = TaskResult(task, 0, None, {"acc": Measured(6 / 7, None), "f1": Measured(0.5, None)}, items, data, "")
    write_lines(tmp_path / "a.jsonl", [data.splits["test"][2]["question"]])
    found = find_contamination({"um": data}, [tmp_path / "a.jsonl"])["um"]
    record = with_contamination(score(metric="acc", value=6 / 7, n=7), result, found)
    assert (record.contaminated, record.value_clean) == (1, 1.0)
    record = with_contamination(score(metric="f1", value=0.5, n=7), result, found)
    assert (record.contaminated, record.value_clean) == (1, None), "F1 is no mean over items"
    shorter = TaskResult(task, 0, 2, {"acc": Measured(1.0, None)}, items[:2], data, "")
    assert with_contamination(score(metric="acc", value=1.0, n=2), shorter, found).contaminated == 0
    filtered = TaskResult(task, 0, None, {"acc": Measured(1.0, None)}, items[:2], data, "")
    assert with_contamination(score(metric="acc"), filtered, found).contaminated is None, "nobody knows which rows they are"
