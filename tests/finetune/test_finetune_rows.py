"""Rows are checked, parts are cut by a hash of the text alone, and the test split is shut until the end."""

from __future__ import annotations

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from labelled_files import PAIR, SINGLE, rows_of, write_rows

from megatron_ttl.errors import DataError
from megatron_ttl.finetune.rows import Row, TestSplit, cut, read_rows, row_key, without_repeats
from megatron_ttl.finetune.sources import find_files, prepare_files
from megatron_ttl.finetune.tasks import find_task


def row(text: str, label: int = 0, group: str | None = None) -> Row:
    return Row((text,), label, text.encode(), group or row_key((text,)))


def test_faulty_rows_are_named_all_at_once(tmp_path):
    path = tmp_path / "pair.jsonl"
    path.write_bytes(b"\n".join([b'{"first": "a", "second": "b", "label": 1}', b'{"first": "a", "label": 1}', b"[1]", b"",
                                 b'{"first": "a", "second": "  ", "label": "maybe"}', b'{"first": "\xff"}',
                                 b'{"first": 3, "second": "b"}']))
    with pytest.raises(DataError) as caught:
        read_rows(path, PAIR)
    faults = "\n".join(caught.value.faults)
    for expected in ("jsonl:2: no key 'second'", "jsonl:3: a list instead of an object", 
                     "jsonl:5: 'second': the text is empty",
                     'jsonl:5: the label is "maybe", which is none of no/0, yes/1', "jsonl:6: invalid UTF-8",
                     "jsonl:7: 'first': the text is a number", "jsonl:7: no key 'label'"):
        assert expected in faults, expected
    assert len(caught.value.faults) == 7


def test_an_empty_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="has no rows"):
        read_rows(write_rows(tmp_path / "x.jsonl", []), SINGLE)


def test_repeats_are_left_out_and_contradictions_wholly():
    rows = [row("A b"), row("c", 1), row("a  B"), row("d", 0), row("D", 1), row("d", 0)]
    kept, counts = without_repeats(rows)
    assert [kept_row.texts[0] for kept_row in kept] == ["A b", "c"]
    assert counts == {"repeated": 1, "contradictory": 3}


@given(st.permutations(range(60)), st.integers(0, 5))
def test_a_cut_depends_on_texts_alone_and_keeps_the_shares_of_the_classes(order, seed):
    rows = [row(f"text {number}", label=number % 3 == 0) for number in range(60)]
    shuffled = [rows[number] for number in order]
    rest, share = cut(shuffled, 0.2, seed)
    assert {part.key for part in share} == {part.key for part in cut(rows, 0.2, seed)[1]}
    assert sorted(map(shuffled.index, rest)) == [shuffled.index(part) for part in rest]  # in their order
    assert (len(share), sum(part.label for part in share), len(rest)) == (12, 4, 48)


def test_rows_of_a_group_stay_together():
    rows = [row(f"answer {number}", label=number % 5 == 0, group=f"question {number // 5}") for number in range(100)]
    rest, share = cut(rows, 0.2, 0)
    assert not {part.group for part in rest} & {part.group for part in share}
    assert (len(rest), len(share)) == (80, 20)


def test_one_file_becomes_two_before_anything_else(tmp_path):
    data, output = tmp_path / "data", tmp_path / "output"
    data.mkdir()
    write_rows(data / "single.sample.jsonl", [*rows_of(50), *rows_of(5)])
    files = prepare_files(SINGLE, data, output, 0.2, 0)
    lines = [path.read_text().splitlines() for path in (files.train, files.test)]
    assert [len(part) for part in lines] == [40, 10]
    assert sorted(lines[0] + lines[1]) == sorted(map(json.dumps, rows_of(50)))
    assert (files.sample, files.split["repeated"]) == (True, 5)
    before = files.test.stat().st_mtime_ns
    assert prepare_files(SINGLE, data, output, 0.2, 0) == files
    assert files.test.stat().st_mtime_ns == before
    with pytest.raises(DataError, match="in another way; the test rows of an output must stay the same"):
        prepare_files(SINGLE, data, output, 0.2, 1)


def test_where_the_rows_are_looked_for(tmp_path):
    with pytest.raises(DataError, match=r"single.train.jsonl with single.test.jsonl, or single.jsonl"):
        find_files(SINGLE, tmp_path)
    write_rows(tmp_path / "single.sample.jsonl", rows_of(4))
    assert find_files(SINGLE, tmp_path) == (tmp_path / "single.sample.jsonl", None, True)
    (tmp_path / "single.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a", "label": 1}\n'))
    assert find_files(SINGLE, tmp_path) == (tmp_path / "single.jsonl.gz", None, False)
    assert read_rows(tmp_path / "single.jsonl.gz", SINGLE)[0].texts == ("a",)
    write_rows(tmp_path / "single.train.jsonl", rows_of(4))
    with pytest.raises(DataError, match=r"stands alone; single.test.jsonl must be beside it"):
        find_files(SINGLE, tmp_path)
    write_rows(tmp_path / "single.test.jsonl", rows_of(4))
    assert find_files(SINGLE, tmp_path)[1] == tmp_path / "single.test.jsonl"


def test_the_test_split_opens_after_all_trainings_and_once(tmp_path):
    test = TestSplit(write_rows(tmp_path / "x.jsonl", rows_of(4)), SINGLE, ["seed 0", "seed 1"])
    test.finished("seed 1")
    with pytest.raises(RuntimeError, match="stays shut: seed 0 not finished"):
        test.open_once("a look")
    test.finished("seed 0")
    assert len(test.open_once("the score")) == 4
    with pytest.raises(RuntimeError, match="was opened before, for the score"):
        test.open_once("another look")


@pytest.mark.parametrize(("name", "classes"), [
    ("hatebr", 2), ("assin2", 2), ("faquad_nli", 2), ("sst2_pt", 2), ("inferbr", 3)])
def test_the_real_samples_are_read(shared_data, name, classes):
    task = find_task(name)
    path, test, sample = find_files(task, shared_data / "tasks")
    rows = read_rows(path, task)
    assert sample and test is None and len(rows) >= 300
    assert {part.label for part in rows} == set(range(classes))
