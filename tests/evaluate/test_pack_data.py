"""Rows of tasks: what is read, what is refused with file and line, what the checksum depends on."""

from __future__ import annotations

import gzip
import json

import pytest

from megatron_ttl.errors import DataError
from megatron_ttl.evaluate.pack_data import RowRules, count_rows, find_files, read_task_data, task_data_of
from megatron_ttl.evaluate.pack_functions import FUNCTIONS

ROW = {"id": "a", "question": "Onde?", "choices": ["aqui", "lá"], "answer": 1, "score": 2, "answers": {"text": ["x"]},
       "label": "sim", "more": "não conta"}
RULES = RowRules({"question": "text", "choices": "texts", "answer": "index", "score": "number",
                  "answers": {"text": "texts"}, "label": ["sim", "não"]})


def write(folder, rows, name="t.jsonl"):
    payload = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()
    (folder / name).write_bytes(gzip.compress(payload) if name.endswith(".gz") else payload)


def read(folder, rules=RULES, **names):
    return read_task_data(find_files({"test": "t.jsonl", **names}, [folder]), rules)


def test_rows_hold_what_the_task_needs(tmp_path):
    write(tmp_path, [ROW, {**ROW, "id": 7, "answer": 0}])
    data = read(tmp_path)
    assert data.splits == {"test": [{"id": "a", "question": "Onde?", "choices": ["aqui", "lá"], "answer": 1, "score": 2.0,
                                     "answers": {"text": ["x"]}, "label": "sim"},
                                    {"id": "7", "question": "Onde?", "choices": ["aqui", "lá"], "answer": 0, "score": 2.0,
                                     "answers": {"text": ["x"]}, "label": "sim"}]}
    assert (data.origin, data.sample) == ("t.jsonl", False)
    assert count_rows(tmp_path / "t.jsonl") == 2


@pytest.mark.parametrize(("change", "message"), [
    ({"question": ""}, r"t\.jsonl:2: 'question' is \"\"; must be a text that is not empty"),
    ({"question": "  "}, "'question' is"), ({"question": 3}, "'question' is 3"), ({"question": None}, "'question' is null"),
    ({"choices": []}, "'choices' is \\[\\]; must be a list of texts"), ({"choices": ["a", ""]}, "'choices' is"),
    ({"choices": "ab"}, "'choices' is"), ({"answer": 2}, "'answer' is 2; must be .* from 0 to 1, into 'choices'"),
    ({"answer": -1}, "'answer' is -1"), ({"answer": True}, "'answer' is true"), ({"answer": "1"}, "'answer' is \"1\""),
    ({"answer": 1.0}, "'answer' is 1.0"), ({"score": "2"}, "'score' is \"2\"; must be a finite number"),
    ({"score": float("nan")}, "'score' is NaN"), ({"score": True}, "'score' is true"),
    ({"label": "Sim"}, "one of 'sim', 'não'"),
    ({"answers": ["x"]}, "'answers' is .* must be a table with text"), ({"answers": {}}, "has no key 'answers.text'"),
    ({"answers": {"text": [1]}}, r"'answers.text' is \[1\]"), ({"id": "a"}, "the id 'a' is also that of .*:1"),
    ({"id": None}, "has no id, as other rows do"), ({"question": "\ud800"}, "no text or number"),
])
def test_a_bad_row_is_named_by_file_and_line(tmp_path, change, message):
    write(tmp_path, [ROW, {**ROW, "id": "b", **change}])
    with pytest.raises(DataError, match=message):
        read(tmp_path)


@pytest.mark.parametrize(("line", "message"), [
    ("{", "t.jsonl:2: broken JSON"), ("[1]", "t.jsonl:2: a list instead of an object"),
    ("{}", "t.jsonl:2: has no key 'question', 'choices'"),
    ('{"question": "a", "question": "b"}', "the key 'question' is given twice"), ("null", "null instead"),
])
def test_a_bad_line_is_named_by_file_and_line(tmp_path, line, message):
    write(tmp_path, [ROW, line])
    with pytest.raises(DataError, match=message):
        read(tmp_path)


@pytest.mark.parametrize(("payload", "name", "message"), [
    (b"", "t.jsonl", "t.jsonl: holds no rows"), (b"\n  \n", "t.jsonl", "holds no rows"),
    (b"\xff\xfe{\x00}\x00", "t.jsonl", "UTF-16"), (b'{"question": "\xe7"}', "t.jsonl", "invalid UTF-8"),
    (b"no gzip", "t.jsonl.gz", "not packed with gzip"),
    (gzip.compress(json.dumps(ROW).encode())[:-9], "t.jsonl.gz", "ends in the middle"),
])
def test_a_bad_file_is_named(tmp_path, payload, name, message):
    (tmp_path / name).write_bytes(payload)
    with pytest.raises(DataError, match=message):
        read(tmp_path)


def test_many_faults_take_one_screen(tmp_path):
    write(tmp_path, [{**ROW, "id": str(number), "answer": 9} for number in range(500)])
    with pytest.raises(DataError) as caught:
        read(tmp_path)
    assert len(caught.value.faults) == 21 and "480 more rows" in caught.value.faults[-1]


def test_ids_may_repeat_where_the_pack_says_so(tmp_path):
    write(tmp_path, [ROW, ROW])
    assert len(read(tmp_path, RowRules(RULES.kinds, unique=False)).splits["test"]) == 2


def test_the_checksum_is_of_the_rows_alone(tmp_path):
    folders = [tmp_path / str(number) for number in range(6)]
    for folder in folders:
        folder.mkdir()
    rows = [ROW, {**ROW, "id": "b", "answer": 0}]
    write(folders[0], rows)
    write(folders[1], [dict(reversed(row.items())) for row in rows])
    write(folders[2], [{**row, "more": 1, "score": 2.0} for row in rows], "t.jsonl.gz")
    write(folders[3], ["", *map(json.dumps, rows)], "t.sample.jsonl")
    write(folders[4], rows[::-1])
    write(folders[5], rows[:1])
    same = [read(folder).checksum for folder in folders]
    other_order = RowRules(dict(reversed(RULES.kinds.items())))
    same.insert(0, read(folders[0], other_order).checksum)
    assert len(set(same[:5])) == 1 and len(set(same[4:])) == 3
    write(folders[0], rows[:1], "t.dev.jsonl")
    assert read(folders[0], fewshot="t.dev.jsonl").checksum != same[0]


def test_a_sample_says_that_it_is_one(tmp_path):
    write(tmp_path, [ROW], "other.jsonl")
    assert read(tmp_path, stand_in="other.jsonl").sample
    write(tmp_path, [ROW, {**ROW, "id": "b"}], "t.sample.jsonl")
    data = read(tmp_path, stand_in="other.jsonl")
    assert data.sample and data.origin == "t.sample.jsonl" and len(data.splits["test"]) == 2
    write(tmp_path, [ROW], "t.jsonl.gz")
    data = read(tmp_path, stand_in="other.jsonl")
    assert not data.sample and data.origin == "t.jsonl.gz"


def test_demonstrations_of_their_own(tmp_path):
    write(tmp_path, [ROW])
    write(tmp_path, [{**ROW, "answer": 0}], "t.dev.jsonl")
    data = read(tmp_path, fewshot="t.dev.jsonl")
    assert [row["answer"] for row in data.splits["fewshot"]] == [0] and data.origin == "t.jsonl + t.dev.jsonl"


@pytest.mark.parametrize(("ids", "numbers", "pool", "test", "fewshot"), [
    (("3", "1"), (), False, "024", "31"),  # taken out of the test rows
    (("X_3", "9"), (), False, "01234", None),  # one is missing: nothing moves
    (("3", "9"), (), True, "01234", "30124"),  # their own file: those that are there come first
    ((), (4, 0), True, "01234", "40123"),
    ((), (4, 0), False, "01234", None),
    ((), (4, 77), True, "01234", "01234"),
])
def test_demonstrations_that_a_pack_names(tmp_path, ids, numbers, pool, test, fewshot):
    rows = [{**ROW, "id": f"X_{number}"} for number in range(5)]
    write(tmp_path, rows)
    if pool:
        write(tmp_path, rows, "t.dev.jsonl")
    splits = read(tmp_path, RowRules(RULES.kinds, ids=ids, numbers=numbers), fewshot="t.dev.jsonl").splits
    found = {name: "".join(row["id"][2:] for row in some) for name, some in splits.items()}
    assert found == {"test": test} | ({"fewshot": fewshot} if fewshot else {})


def test_what_cannot_be_prepared_is_a_bad_row(tmp_path):
    write(tmp_path, [{"sentence": "sem lacuna", "choices": ["a", "b"], "answer": 0}])
    rules = RowRules({"contexts": "texts", "rest": "text"}, FUNCTIONS["xwinograd_row"])
    with pytest.raises(DataError, match=r"t\.jsonl:1: is not a row of this task \(ValueError: the sentence has neither"):
        read(tmp_path, rules)


def test_rows_from_elsewhere_are_checked_alike():
    assert task_data_of({"test": [ROW]}, RULES, "a/b on the hub").origin == "a/b on the hub"
    with pytest.raises(DataError, match="a/b on the hub: test: row 1: 'answer' is 5"):
        task_data_of({"test": [ROW, {**ROW, "id": "b", "answer": 5}]}, RULES, "a/b on the hub")
