"""Scores come back as they were kept; the newest of each; what is damaged is named."""

from __future__ import annotations

import errno
import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from score_rows import score

from megatron_ttl.errors import DataError, DiskError
from megatron_ttl.evaluate.records import (
    DEPENDENCIES,
    ScoreRecord,
    append_records,
    differences,
    identity,
    newest,
    planned_identities,
    read_records,
    say,
)
from megatron_ttl.evaluate.task import Task, TaskData
from megatron_ttl.row_file import RowFile

NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
RECORDS = st.builds(
    score, task=st.sampled_from(["a", "b", "ação 🙂\n"]), value=NUMBERS, model=st.text(st.characters(codec="utf-8"), max_size=5),
    stderr=st.none() | NUMBERS, limit=st.none() | st.integers(1, 9), seed=st.integers(0, 1), main=st.booleans(),
    contaminated=st.none() | st.integers(0, 9), baselines=st.dictionaries(st.sampled_from(["random", "longest"]), NUMBERS),
    model_step=st.none() | st.integers(0, 3), model_kwh=st.none() | NUMBERS, time=st.sampled_from(["2026-01-01", "2026-01-02"]))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(st.lists(RECORDS, max_size=4), min_size=1, max_size=3))
def test_what_is_appended_is_read(tmp_path, parts):
    path = tmp_path / "scores.jsonl"
    path.unlink(missing_ok=True)
    for part in parts:
        append_records(path, part)
    assert read_records(path) == newest(sum(parts, []))


def test_the_newest_of_equal_scores_wins_and_stands_where_the_first_stood(tmp_path):
    path = tmp_path / "scores.jsonl"
    old, other, again = score(value=0.1), score("hellaswag_pt"), score(value=0.2, seconds=9.0, batch=64, device="cuda:0")
    late = score(value=0.3, time="2026-01-01T00:00:00Z")  # an older row that was copied in later
    append_records(path, [old, other, again, late])
    assert read_records(path) == [again, other]


@pytest.mark.parametrize("other", [{"shots": 0}, {"limit": 5}, {"metric": "acc"}, {"seed": 1}, {"dtype": "bfloat16"},
                                   {"prompt_checksum": "x"}, {"data_checksum": "x"}, {"sample": True}, {"version": "3"},
                                   {"definition": "ttl-paper"}, {"lm_eval": "0.4.9"}, {"model_checksum": "x"}])
def test_another_question_is_another_score(other):
    a, b = score(), score(**other)
    assert identity(a) != identity(b) and len(newest([a, b])) == 2
    names = {each.path.split(".")[-1] for each in differences(a, b)}
    assert names == set() if {"seed", "dtype", "model_checksum"} & set(other) else names == set(other)


def test_every_dependency_can_be_said():
    a, b = score(limit=3, sample=True), score(limit=None, request_checksum="", lm_eval="")
    for each in DEPENDENCIES:
        assert "{}" not in say(each, a) and "None" not in say(each, b) and "xxh3" not in say(each, a)
    assert [say(each, b) for each in differences(score(), b)] == ["lm_eval unknown"]
    assert [say(each, a) for each in differences(a, b)][:2] == ["first 3 items", "sample data"]
    apart = differences(score(request_checksum="xxh3:0123456789"), score())
    assert [say(each, score(request_checksum="xxh3:0123456789")) for each in apart] == ["questions 01234567"]


def test_a_plan_has_the_identity_of_what_it_leads_to():
    task = Task("arc_pt", "2.0", "lm-eval", "pt", "en", 25, ("acc_norm", "acc"), {}, "", "", lambda: data,
                prompt_checksum="xxh3:arc_pt")
    data = TaskData({"test": []}, "xxh3:rows of arc_pt", "arc_pt.jsonl")
    planned = planned_identities(task, data, "xxh3:pequeno", None, None, 0, "float32", "0.4.13")
    assert planned == [identity(score()), identity(score(metric="acc"))]
    assert planned_identities(task, data, "xxh3:pequeno", 0, 7, 3, "bfloat16", "0.4.13")[0] == identity(
        score(shots=0, limit=7, seed=3, dtype="bfloat16"))


def test_bad_lines_are_named_and_a_torn_last_one_is_not_lost_sight_of(tmp_path, capsys):
    path = tmp_path / "scores.jsonl"
    append_records(path, [score()])
    whole = path.read_bytes()
    lacking = json.dumps({**json.loads(whole), "n": "many"}).encode() + b"\n"
    path.write_bytes(whole + b"[1]\n" + lacking + b"\xff\n" + whole)
    with pytest.raises(DataError, match=r"scores.jsonl:2: the line: .*every line must be a score as tools/evaluate.py") as caught:
        read_records(path)
    assert [fault.split(": ")[0].split(":")[-1] for fault in caught.value.faults] == ["2", "3", "4"]
    assert "scores.jsonl:3: n: Input should be a valid integer" in caught.value.faults[1]
    path.write_bytes(whole + whole[:50])
    assert read_records(path) == [score()]
    assert "the last 50 bytes are no whole row; they are left out" in capsys.readouterr().err
    assert path.read_bytes() == whole + whole[:50], "reading changes nothing"
    append_records(path, [score("b")])
    assert read_records(path) == [score(), score("b")]
    with pytest.raises(DataError, match="nada.jsonl: cannot be read .*; it must be a file of scores"):
        read_records(tmp_path / "nada.jsonl")


def test_a_number_that_is_none_is_refused_before_anything_is_written(tmp_path):
    path = tmp_path / "scores.jsonl"
    with pytest.raises(DataError, match="arc_pt: acc_norm: value is nan; a score must be a finite number") as caught:
        append_records(path, [score(), score(value=math.nan), score(stderr=math.inf), score(baselines={"random": math.nan})])
    assert len(caught.value.faults) == 3 and "baselines random is nan" in caught.value.faults[2]
    assert not path.exists()


def test_a_full_disk_is_said(tmp_path, monkeypatch, capsys):
    class Full:
        closed = False

        def write(self, payload):
            raise OSError(errno.ENOSPC, "No space left on device")

        def fileno(self):
            return 1

        def close(self):
            pass

    monkeypatch.setattr(RowFile, "__init__", lambda self, path: self.__dict__.update(
        path=path, _handle=Full(), _waiting=b"", _warned=False))
    with pytest.raises(DiskError, match="the scores could not be written; the disk must have room"):
        append_records(tmp_path / "scores.jsonl", [score()])


def test_a_row_of_an_older_program_is_read():
    row = score().model_dump()
    for late in ("main", "value_clean"):
        del row[late]
    assert ScoreRecord.model_validate(row) == score()


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(payload=st.binary(max_size=300) | st.sampled_from([b"[" * 100_000, b'{"task":' * 50_000, b'{"n": 1' + b"0" * 9000 + b"}"]))
def test_any_bytes_give_scores_or_a_sentence(tmp_path, payload):
    path = tmp_path / "scores.jsonl"
    path.write_bytes(payload + b"\n")
    try:
        assert read_records(path) == []
    except DataError as error:
        assert len(str(error)) < 20_000
