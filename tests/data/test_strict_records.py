"""Curated files: every line is a text with its record, or all that are none are named; plain text keeps its line ends."""

from __future__ import annotations

import gzip
import json

import pytest

from megatron_ttl.data.strict_records import read_records, read_sourced_texts
from megatron_ttl.errors import DataError


def test_records_come_with_their_place_and_all_that_they_say(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "um", "label": 1}\r\n\n{"text": "dois", "n": {"a": NaN}}\n')
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "tr\xc3\xaas"}\n'))
    seen: list[float] = []
    records = list(read_records([path, tmp_path / "b.jsonl.gz"], "text", seen.append))
    assert [(record.where.rpartition("/")[2], record.text) for record in records] == [
        ("a.jsonl:1", "um"), ("a.jsonl:3", "dois"), ("b.jsonl.gz:1", "três")]
    assert records[0].fields == {"text": "um", "label": 1}
    assert seen[-1] == sum(file.stat().st_size for file in tmp_path.iterdir())


def test_every_line_that_is_none_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "um"}\n{"text": 3}\nnada\n{"corpo": "x"}\n' + "[]\n" * 200)
    with pytest.raises(DataError) as caught:
        list(read_records([path], "text"))
    assert [fault.split(";")[0].rpartition("/")[2] for fault in caught.value.faults[:4]] == [
        "a.jsonl:2: the text is a number", "a.jsonl:3: broken JSON", "a.jsonl:4: no key 'text'",
        "a.jsonl:5: a list instead of an object"]
    assert len(caught.value.faults) == 100


def test_sources_are_named_by_files_and_by_documents(tmp_path):
    (tmp_path / "livro.v2.txt").write_bytes("\ufeffO rio.\r\n\r\nA ponte.\n".encode())
    rows = [{"text": "um", "source": "rádio"}, {"text": "dois", "source": 7}, {"text": "três", "source": ""}]
    (tmp_path / "b.x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    seen: list[float] = []
    found = list(read_sourced_texts([tmp_path / "b.x.jsonl", tmp_path / "livro.v2.txt"], on_progress=seen.append))
    assert found == [("rádio", "um"), ("b", "dois"), ("b", "três"), ("livro.v2", "O rio.\r\n\r\nA ponte.\n")]
    assert seen == sorted(seen) and seen[-1] == sum(file.stat().st_size for file in tmp_path.iterdir())


def test_paths_that_are_wrong_are_named_before_anything_is_read(tmp_path):
    (tmp_path / "c.csv").write_text("a")
    with pytest.raises(DataError) as caught:
        next(read_sourced_texts([tmp_path / "a.txt", tmp_path / "b.jsonl", tmp_path / "c.csv"]))
    assert [fault.split(";")[0].rpartition("/")[2] for fault in caught.value.faults] == [
        "a.txt: is no file", "b.jsonl: does not exist", "c.csv: has an unknown suffix"]
    (tmp_path / "a.txt").write_bytes("água".encode("latin-1"))
    with pytest.raises(DataError, match="a.txt: byte 0 is no UTF-8; text must be; convert it"):
        list(read_sourced_texts([tmp_path / "a.txt"]))
