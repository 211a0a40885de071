"""Every format gives the same documents; what is no document is said with its place; what cannot be read is an error."""

from __future__ import annotations

import datetime
import gzip
import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import zstandard
from patience import patient

from megatron_ttl.data.corpus import hub, read
from megatron_ttl.data.corpus.document import Document
from megatron_ttl.data.corpus.inputs import Input
from megatron_ttl.data.corpus.records import Row, to_document
from megatron_ttl.data.corpus.settings import SourceSettings
from megatron_ttl.data.corpus.shards import read_shard, to_line, to_record, write_shard
from megatron_ttl.data.documents import BadLine
from megatron_ttl.errors import DataError

TEXTS = ["um", "dois\ncom uma segunda linha", "três, com vírgula, \"aspas\" e\ttabulação", "ação 👍"] * 300


def source(**settings: Any) -> SourceSettings:
    return SourceSettings(**{"name": "s", "license": "CC0", **settings})


def documents(path: Path | str, format_: str, settings: SourceSettings | None = None,
              unit_bytes: int = 1000) -> list[Document | BadLine]:
    settings = settings or source()
    wanted = Input(0, str(path), format_, (str(path),) if Path(path).is_file() else ())
    units = list(read.read_units(wanted, settings, unit_bytes))
    assert [unit.number for unit in units] == list(range(len(units)))
    found = [to_document(row, settings, format_ == "txt") for unit in units for row in unit.rows]
    return [document for document in found if document is not None]


def write_jsonl(path: Path) -> None:
    path.write_bytes(b"".join(json.dumps({"text": text, "n": f"{number}"}).encode() + b"\n"
                              for number, text in enumerate(TEXTS)))


def write_packed(path: Path) -> None:
    write_jsonl(path)
    packer = gzip.compress if path.suffix == ".gz" else zstandard.ZstdCompressor().compress
    path.write_bytes(packer(path.read_bytes()))


def write_table(path: Path) -> None:
    import csv

    with open(path, "w", newline="", encoding="utf-8-sig") as handle:
        writer = csv.writer(handle, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writerow(["n", "text"])
        writer.writerows((number, text) for number, text in enumerate(TEXTS))


def table() -> dict[str, list[str]]:
    return {"text": TEXTS, "n": [str(number) for number in range(len(TEXTS))]}


def write_parquet(path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(table()), path, row_group_size=500)


@pytest.mark.parametrize(("name", "write"), [
    ("a.jsonl", write_jsonl), ("a.jsonl.gz", write_packed), ("a.jsonl.zst", write_packed), ("a.csv", write_table),
    ("a.tsv", write_table), ("a.parquet", write_parquet)])
def test_every_format_gives_the_same_documents(tmp_path, name, write):
    write(tmp_path / name)
    format_ = name.split(".")[1]
    found = documents(tmp_path / name, format_)
    assert [document.text for document in found] == TEXTS
    assert [document.meta for document in found] == [{"n": str(number)} for number in range(len(TEXTS))]
    positions = [document.position for document in found]
    if format_ in ("csv", "tsv"):  # lines, as an editor shows them: the second text has two
        assert positions[:6] == [2, 3, 5, 6, 7, 8]
    else:
        assert positions == list(range(1, len(TEXTS) + 1))
    assert {document.file for document in found} == {str(tmp_path / name)}
    assert documents(tmp_path / name, format_, unit_bytes=1 << 30) == found, "units do not matter"


def test_a_dataset_folder_gives_the_same_documents(tmp_path):
    import datasets

    made = datasets.Dataset.from_dict(table())
    made.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": made, "test": made.select(range(3))}).save_to_disk(str(tmp_path / "splits"))
    (tmp_path / "files").mkdir()
    write_parquet(tmp_path / "files/train.parquet")
    for name in ("one", "splits", "files"):
        found = documents("x", "dataset", source(dataset=str(tmp_path / name)))
        assert [document.text for document in found] == TEXTS and found[7].meta == {"n": "7"}
    assert len(documents("x", "dataset", source(dataset=str(tmp_path / "splits"), split="test"))) == 3
    with pytest.raises(DataError, match="source 's': split: 'dev' is not in .*; it must be one of train, test; choose one"):
        documents("x", "dataset", source(dataset=str(tmp_path / "splits"), split="dev"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="source 's': dataset: '.*empty' cannot be read .*; it must be a folder written by"):
        documents("x", "dataset", source(dataset=str(tmp_path / "empty")))
    with pytest.raises(DataError, match="x: has no column 'texto'; its columns are 'text', 'n'; set text_key or join_keys"):
        documents("x", "dataset", source(dataset=str(tmp_path / "one"), text_key="texto"))


def test_a_hub_that_does_not_answer_is_an_error_and_no_wait(monkeypatch):
    import huggingface_hub

    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never says a word
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        original = huggingface_hub.HfApi
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: original(endpoint=endpoint))
        monkeypatch.setattr(hub, "_HUB_TIMEOUT_S", 0.5)
        since = time.monotonic()
        with pytest.raises(DataError, match="source 's': dataset: 'nobody/nothing' is no folder here, and the hub does not "
                                            r"give it \(.*\); it must be a folder, or a dataset on the hub and a network;"):
            documents("x", "dataset", source(dataset="nobody/nothing"))
        assert time.monotonic() - since < patient(8)


@pytest.mark.parametrize(("unit", "texts", "positions"), [
    ("file", ["um\ndois\n\n\ntrês\n  \nquatro"], [1]),
    ("paragraph", ["um\ndois", "três", "quatro"], [1, 5, 7]),
    ("line", ["um", "dois", "três", "quatro"], [1, 2, 5, 7])])
def test_text_files(tmp_path, unit, texts, positions):
    (tmp_path / "a.txt").write_text("\ufeffum\ndois\n\n\ntrês\n  \nquatro\n", encoding="utf-8")
    found = documents(tmp_path / "a.txt", "txt", source(document=unit))
    assert [document.text for document in found] == texts and [document.position for document in found] == positions
    (tmp_path / "a.txt").write_bytes(b"\xff\n")
    assert documents(tmp_path / "a.txt", "txt", source(document=unit)) == [BadLine("invalid UTF-8")]


def test_bad_rows_of_a_table_are_named(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'n,text\n1,um\n2\n3,a,b\n\n4,"x"y\n5,\n6,a\xffb\n7,' + "três\n".encode())
    wanted = Input(0, str(path), "csv", (str(path),))
    rows = [row for unit in read.read_units(wanted, source(), 1 << 20) for row in unit.rows]
    found = [(row.position, row.byte, to_document(row, source(), False)) for row in rows]
    assert [(line, byte, what.reason) for line, byte, what in found if isinstance(what, BadLine)] == [
        (3, 12, "1 fields instead of 2"), (4, 14, "3 fields instead of 2"),
        (6, 21, "broken row (',' expected after '\"')"), (7, 28, "the text is empty"), (8, 31, "invalid UTF-8")]
    assert [what.text for _, _, what in found if isinstance(what, Document)] == ["um", "três"]


@pytest.mark.parametrize(("payload", "message"), [
    (b'n,text\n1,um\n2,"dois\n3,tr\n', r"a.csv:3: is no row \(unexpected end of data\); a quote that is opened must be"),
    (b"n,texto\n1,um\n", r"a.csv: has no column 'text'; its columns are 'n', 'texto'; set text_key or join_keys of"),
    (b"text,text\n1,um\n", r"a.csv:1: names the column 'text' twice; a name must stand for one column"),
    ('n,text\n'.encode("utf-16"), "a.csv.*: is UTF-16; it must be UTF-8"),
])
def test_tables_that_cannot_be_read(tmp_path, payload, message):
    (tmp_path / "a.csv").write_bytes(payload)
    with pytest.raises(DataError, match=message):
        documents(tmp_path / "a.csv", "csv")


def test_parquet_that_cannot_be_read(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path)
    whole = path.read_bytes()
    for damaged in (whole[:len(whole) // 2], b"", whole[:200] + bytes(200) + whole[400:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"a.parquet:\d+: cannot be read \(.*\); it must be a whole Parquet file"):
            documents(path, "parquet")


def test_parquet_rows_that_are_no_documents(tmp_path):
    import pyarrow
    from pyarrow import parquet

    broken = pyarrow.array([b"um", b"a\xff", b"tr\xc3\xaas", None, b" "]).cast(pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": broken}), tmp_path / "a.parquet")
    found = documents(tmp_path / "a.parquet", "parquet")
    assert [what.reason if isinstance(what, BadLine) else what.text for what in found] == [
        "um", "a value that cannot be read", "três", "the text is null", "the text is empty"]


def record(payload: dict[str, Any], **settings: Any) -> Document | BadLine | None:
    return to_document(Row("f", 1, None, payload), source(**settings), False)


def test_turns_are_joined_by_an_empty_line():
    keys = {"join_keys": ("instruction", "input", "output")}
    turns = {"instruction": "Some.", "input": "", "output": "Três.", "id": 4}
    assert record(turns, **keys) == Document("Some.\n\nTrês.", "s", "CC0", "f", 1, {"id": 4})
    chat = [{"role": "user", "content": "Oi."}, {"from": "gpt", "value": "Olá."}, "Tchau."]
    assert record({"turns": chat}, join_keys=("turns",)).text == "Oi.\n\nOlá.\n\nTchau."
    assert record({**turns, "input": None}, **keys).text == "Some.\n\nTrês."
    assert record({"instruction": "a", "output": "b"}, **keys) == BadLine("no key 'input'")
    assert record({**turns, "input": 3}, **keys) == BadLine("the text is a number under 'input'")
    assert record({"turns": [{"role": "user"}, ""]}, join_keys=("turns",)) == BadLine("the text is empty")


def test_meta_is_what_json_can_hold():
    strange = {"text": "um", "nan": float("nan"), "half": "a\ud800", "when": datetime.datetime(2024, 5, 1, 12),
               "raw": b"123", "deep": [{"x": (1, None, True)}], "licence": "MIT"}
    document = record(strange, license_key="licence")
    assert document.license == "MIT" and document.meta == {
        "nan": None, "half": "a\ufffd", "when": "2024-05-01T12:00:00", "raw": "<3 bytes>", "deep": [{"x": [1, None, True]}]}
    assert json.loads(to_line(to_record(document)))["meta"] == document.meta
    assert record({"text": "um", "licence": " "}, license_key="licence").license == "CC0"
    nested: Any = 1
    for _ in range(70):
        nested = [nested]
    assert record({"text": "um", "nested": nested}) == BadLine("nested more than 64 deep")


def test_shards_hold_documents_and_a_damaged_one_is_an_error(tmp_path):
    written = [Document(text, "s", "CC0", "f", number, {"n": number}, {"mojibake": 1})
               for number, text in enumerate(TEXTS, 1)]
    write_shard(tmp_path / "a.zst", written)
    assert list(read_shard(tmp_path / "a.zst")) == written
    whole = (tmp_path / "a.zst").read_bytes()
    for damaged in (whole[:-10], whole[:100] + bytes([whole[100] ^ 1]) + whole[101:]):
        (tmp_path / "a.zst").write_bytes(damaged)
        with pytest.raises(DataError, match=r"a.zst: is damaged \(.*\); it must be whole; delete it and start"):
            list(read_shard(tmp_path / "a.zst"))
