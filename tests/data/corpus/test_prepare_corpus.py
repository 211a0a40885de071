"""A whole corpus: the exact funnel, provenance, restarts, changed settings, and what is refused."""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import planted_corpus as planted
import pytest

from megatron_ttl.data.corpus import clean, cleaning, toxicity
from megatron_ttl.data.corpus.plan import make_plan
from megatron_ttl.data.corpus.run import prepare
from megatron_ttl.data.corpus.shards import read_shard
from megatron_ttl.data.corpus.tally import Examples
from megatron_ttl.data.corpus.toxicity_training import train_toxicity
from megatron_ttl.data.documents import DocumentReader
from megatron_ttl.data.encode import EncodeSettings
from megatron_ttl.data.preprocess import preprocess
from megatron_ttl.data.zstd_file import zstd_lines
from megatron_ttl.errors import ConfigError, DataError
from megatron_ttl.tokenizer.tokenizer import Tokenizer
from megatron_ttl.tokenizer.train import train_tokenizer


def run(config: Path, workers: int = 1, **options) -> dict:
    return prepare(make_plan(config), workers, **options)


def entries(path: Path) -> list[dict]:
    return [json.loads(line) for line in zstd_lines(path)]


@pytest.fixture
def small_units(monkeypatch):
    """Cut even a small corpus into several units."""
    monkeypatch.setattr(cleaning, "UNIT_BYTES", 10_000)


def test_the_funnel_is_exact(tmp_path, repository, monkeypatch):
    monkeypatch.setattr(toxicity, "toxicity_step", lambda folder: lambda document: document.with_note(
        "toxicity", 0.9 if "PALAVRÃO" in document.text else 0.1))
    config = planted.plant(tmp_path, repository, '[toxicity]\nmodel = "x"\nkeep_below = 0.5\n')
    result = run(config)
    good = planted.GOOD_DOCUMENTS
    out = tmp_path / "out"
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert planted.lost(report) == {
        "drop_where.1": 1, "language": 1, "gopher.min_words": 1, "gopher.max_top_4_gram": 1, "toxicity": 1,
        "decontamination.questions": 1, "dedup.exact": 2, "dedup.near": 1}
    assert (report["rows"], report["blank"], report["unreadable"]) == (good + 16, 1, 3)
    assert report["read"]["documents"] == good + 12 and report["kept"]["documents"] == good + 3 == result["documents"]
    assert report["sources"][0]["unreadable"] == {"broken JSON": 1, "no key 'text'": 1, "invalid UTF-8": 1}
    assert report["sources"][0]["where"]["documents_without_the_field"] == {'meta.set == "Github"': 1}
    assert [(change["step"], change["documents"]) for change in report["changes"]] == [("mojibake", 1)]
    assert report["changes"][0]["examples"][0]["after"].startswith("A padaria da esquina abre às")
    documents = [document for path in sorted(out.glob("documents-*")) for document in read_shard(path)]
    assert len(documents) == good + 3 and len({document.id for document in documents}) == good + 3
    assert sum(len(document.text.encode()) for document in documents) == report["kept"]["bytes"]
    for document in documents:
        assert document.license == ("MIT" if document.source == "chat" else "CC0")
    first = entries(out / "documents-00000.jsonl.zst")[0]
    assert list(first) == ["text", "id", "source", "license", "file", "position", "hash", "meta", "notes"]
    assert first["meta"] == {"set": "web", "n": 0} and first["notes"]["toxicity"] == 0.1
    assert first["id"] == f"web/{tmp_path}/raw/web-0.jsonl:1"
    assert [document.text for document in documents if document.source == "chat"] == [
        "Diga uma cor.\n\nAzul.", "Conte até três.\n\nUm, dois, três."]
    aside = {path.name.removesuffix(".jsonl.zst"): entries(path) for path in (out / "dropped").iterdir()}
    assert {rule: len(found) for rule, found in aside.items()} == {**planted.lost(report), "unreadable": 3}
    assert aside["toxicity"][0]["value"] == 0.9 and aside["toxicity"][0]["limit"] == "< 0.5"
    assert aside["dedup.exact"][0]["value"] == first["id"].removesuffix("1") + "2", "which document stays"
    assert [(bad["line"], bad["byte"]) for bad in aside["unreadable"]] == places_of_bad_lines(tmp_path / "raw/web-0.jsonl")
    assert not (out / "work").exists()
    page = (out / "report.md").read_text(encoding="utf-8")
    assert f"| `gopher.min_words` | 1 | 1.9 % | {len(planted.SHORT.encode())} | web 1 |" in page
    assert len(page.splitlines()) < 60
    texts = list(DocumentReader(sorted(out.glob("documents-*"))))
    assert texts == [document.text for document in documents], "the tokenizer's trainer reads what is written"


def places_of_bad_lines(path: Path) -> list[tuple[int, int]]:
    lines = path.read_bytes().splitlines(keepends=True)
    return [(number + 1, sum(map(len, lines[:number]))) for number, line in enumerate(lines) if line in planted.BAD_LINES]


@pytest.mark.parametrize("format_", ["jsonl.gz", "jsonl"])
def test_workers_do_not_change_the_bytes_and_formats_not_the_documents(tmp_path, repository, small_units, format_):
    config = planted.plant(tmp_path, repository)
    run(config)
    texts = [document.text for path in sorted((tmp_path / "out").glob("documents-*")) for document in read_shard(path)]
    (tmp_path / "out").rename(tmp_path / "plain")
    config = planted.plant(tmp_path, repository, corpus=f'shard_format = "{format_}"\nexamples = 3\n')
    run(config, workers=3)
    by_three = planted.contents(tmp_path / "out")
    assert list(DocumentReader(sorted((tmp_path / "out").glob("documents-*")))) == texts
    assert f"documents-00000.{format_}" in by_three
    assert format_ != "jsonl.gz" or by_three["documents-00000.jsonl.gz"][4:8] == bytes(4), "no time"
    (tmp_path / "out").rename(tmp_path / "by three")
    for path in (tmp_path / "raw").iterdir():  # read at another time
        os.utime(path)
    run(config, workers=1)
    assert planted.contents(tmp_path / "out") == by_three


def test_examples_are_chosen_whatever_the_order_and_the_grouping():
    ids = [f"web/a.jsonl:{number}" for number in range(300)]
    chosen = []
    for seed in (0, 0, 1):
        random.Random(len(chosen)).shuffle(ids)
        parts = [Examples(20, seed) for _ in range(3)]
        for number, id_ in enumerate(ids):
            parts[number % 3].add("rule", id_, {"id": id_})
        for part in parts[1:]:
            parts[0].merge(part.to_json())
        chosen.append(parts[0].to_json()["rule"])
    assert chosen[0] == chosen[1] != chosen[2] and len(chosen[0]) == 20
    assert parts[0].wants("rule", chosen[2][0]["id"]) and sum(parts[0].wants("rule", id_) for id_ in ids) < 25


def test_large_outputs_are_several_files(tmp_path, repository):
    (tmp_path / "raw.jsonl").write_bytes(b"".join(planted.line(f"{number} " + "x" * 99_000) for number in range(25)))
    config = tmp_path / "a.toml"
    config.write_text(f'[corpus]\noutput = "{tmp_path}/out"\nshard_megabytes = 1\n[[source]]\nname = "a"\nlicense = "x"\n'
                      f'paths = ["{tmp_path}/raw.jsonl"]\n', encoding="utf-8")
    run(config)
    counts = [len(list(read_shard(path))) for path in sorted((tmp_path / "out").glob("documents-*"))]
    assert counts == [11, 11, 3]
    manifest = json.loads((tmp_path / "out/corpus.json").read_text(encoding="utf-8"))
    assert [entry["documents"] for entry in manifest["files"]] == counts


def counted(monkeypatch) -> list[str]:
    """Count the units that are cleaned from now on."""
    cleaned: list[str] = []

    def count(job):
        cleaned.append(Path(job.stem).name)
        return clean.clean_unit(job)

    monkeypatch.setattr(cleaning, "clean_unit", count)
    return cleaned


def test_only_what_changed_is_done_again(tmp_path, repository, monkeypatch, small_units):
    config = planted.plant(tmp_path, repository)
    cleaned = counted(monkeypatch)
    run(config, keep_work=True)
    everything = len(cleaned)
    assert everything > 4
    before = planted.contents(tmp_path / "out")
    cleaned.clear()
    assert run(config, keep_work=True)["documents"] == planted.GOOD_DOCUMENTS + 4
    assert cleaned == [], "a finished corpus is left alone"
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace("[dedup]", "[dedup]\nnear = false"), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"corpus.output: '.*out' holds a corpus of other settings or inputs, or one "
                                          "that was changed; a corpus is not overwritten unasked; choose another"):
        run(config)
    run(config, overwrite=True, keep_work=True)
    assert cleaned == [], "the units do not depend on [dedup]"
    config.write_text(text.replace('"MIT"', '"Apache-2.0"'), encoding="utf-8")
    run(config, overwrite=True, keep_work=True)
    assert len(cleaned) == 1, "one source changed"
    cleaned.clear()
    config.write_text(text, encoding="utf-8")
    chat = tmp_path / "raw/chat.jsonl"
    os.utime(chat, ns=(1, 1))
    run(config, overwrite=True, keep_work=True)
    assert len(cleaned) == 1, "one input changed"
    chat.write_bytes(chat.read_bytes() + b'{"instruction": "Diga outra.", "output": "Verde."}\n')
    cleaned.clear()
    run(config, overwrite=True)
    assert len(cleaned) == 1
    assert planted.contents(tmp_path / "out").keys() == {name for name in before if not name.startswith("work/")}


def test_too_many_bad_lines_end_with_an_error_and_a_list(tmp_path, repository):
    config = planted.plant(tmp_path, repository)
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace("max_bad_fraction = 0.1", "max_bad_fraction = 0.01"), encoding="utf-8")
    with pytest.raises(DataError, match=r"corpus.max_bad_fraction: 3 of 56 lines and rows are no documents \(1 x .*\); at "
                                        "most 1 % may be; repair them") as caught:
        run(config)
    assert len(caught.value.faults) == 4
    assert "raw/web-0.jsonl:5:" in caught.value.faults[0]
    assert "broken JSON; every line or row must be" in caught.value.faults[0]
    assert len(entries(tmp_path / "out/dropped/unreadable.jsonl.zst")) == 3
    assert not (tmp_path / "out/corpus.json").exists()
    config.write_text(text, encoding="utf-8")
    assert run(config)["unreadable"] == 3, "more may be bad: what is cleaned is not cleaned again"


def test_an_input_that_changes_while_it_is_read_is_an_error(tmp_path, repository, monkeypatch):
    config = planted.plant(tmp_path, repository)
    original = cleaning.read_units

    def changing(wanted, source, unit_bytes):
        yield from original(wanted, source, unit_bytes)
        os.utime(wanted.paths[0], ns=(1, 1))

    monkeypatch.setattr(cleaning, "read_units", changing)
    with pytest.raises(DataError, match="web-0.jsonl: changed while it was read; it must stay as it is; start the same"):
        run(config)


def test_one_run_at_a_time(tmp_path, repository):
    config = planted.plant(tmp_path, repository)
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out/prepare.lock", "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="corpus.output: '.*out' is in use by another run; it must have one at a time"):
            run(config)
    with pytest.raises(ConfigError, match="--workers: is 0; it must be at least 1"):
        run(config, workers=0)


def test_tokens_are_counted_where_a_tokenizer_is_given(tmp_path, repository):
    train_tokenizer(planted.good_texts(repository) * 2, tmp_path / "tokenizer", vocab_size=400)
    config = planted.plant(tmp_path, repository, corpus=f'tokenizer = "{tmp_path}/tokenizer"\n')
    result = run(config)
    tokenizer = Tokenizer.load(tmp_path / "tokenizer")
    documents = [document for path in (tmp_path / "out").glob("documents-*") for document in read_shard(path)]
    counts = [len(ids) for ids in tokenizer.encode_batch([document.text for document in documents])]
    assert [document.notes["tokens"] for document in documents] == counts and result["tokens"] == sum(counts)
    encoded = preprocess(sorted((tmp_path / "out").glob("documents-*")), tmp_path / "pt",
                         EncodeSettings(str(tmp_path / "tokenizer"), held_out_fraction=0))
    assert encoded["tokens"] == sum(counts) + 2 * len(counts), "with <s> and </s>"
    report = json.loads((tmp_path / "out/report.json").read_text(encoding="utf-8"))
    assert report["read"]["tokens"] == sum(counts) + sum(rule["tokens"] for rule in report["rules"])


def test_folders_of_text_files_are_read_file_by_file(tmp_path):
    (tmp_path / "books").mkdir()
    for number in range(30):
        text = f"Livro {number}.\n\nFim.\n" if number != 7 else ""
        (tmp_path / f"books/{number:02}.txt").write_text(text, encoding="utf-8")
    config = tmp_path / "a.toml"
    config.write_text(f'[corpus]\noutput = "{tmp_path}/out"\n[[source]]\nname = "books"\nlicense = "PD"\n'
                      f'paths = ["{tmp_path}/books/*.txt"]\n', encoding="utf-8")
    assert [(wanted.name, wanted.format) for wanted in make_plan(config).inputs] == [("30 text files", "txt")]
    assert run(config)["documents"] == 29
    documents = list(read_shard(tmp_path / "out/documents-00000.jsonl.zst"))
    assert documents[0].text == "Livro 0.\n\nFim." and documents[-1].id == f"books/{tmp_path}/books/29.txt:1"


@pytest.mark.slow
def test_real_text_goes_through_all_stages(tmp_path, shared_data):
    train_toxicity([shared_data / "tasks/hatebr.sample.jsonl"], tmp_path / "toxicity", recall=0.5)
    names = ("porttinari", "react_docs", "lener_juridico")
    lines = gzip.decompress((shared_data / "text/porttinari.jsonl.gz").read_bytes()).splitlines(keepends=True)
    (tmp_path / "copies.jsonl").write_bytes(b"".join(lines[:20]))
    texts = ", ".join(f'"{shared_data}/text/{name}.jsonl.gz"' for name in names)
    config = tmp_path / "a.toml"
    config.write_text(f'''
[corpus]
output = "{tmp_path}/out"
[[source]]
name = "text"
license = "mixed"
license_key = "license"
paths = [{texts}]
[[source]]
name = "copies"
license = "mixed"
paths = ["{tmp_path}/copies.jsonl"]
filters = false
[filters]
[toxicity]
model = "{tmp_path}/toxicity"
[dedup]
[[decontamination.packs]]
name = "itself"
path = "{shared_data}/tasks/faquad.sample.jsonl"
keys = ["context"]
''', encoding="utf-8")
    run(config, workers=2)
    report = json.loads((tmp_path / "out/report.json").read_text(encoding="utf-8"))
    text, copies = report["sources"]
    assert text["read"]["documents"] == 279 and text["kept"]["documents"] > 0.8 * 279, "well-edited text mostly stays"
    assert copies["lost"]["dedup.exact"]["documents"] + copies["kept"]["documents"] == 20
    assert copies["lost"]["dedup.exact"]["documents"] >= 15, "but for those whose first copy a filter dropped"
    notes = [document.notes["toxicity"] for path in (tmp_path / "out").glob("documents-*") for document in read_shard(path)]
    assert all(0 <= note <= 1 for note in notes) and len(set(notes)) > 50


def test_the_sample_file_runs_as_shipped(tmp_path, repository):
    config = repository / "configs/corpus/sample.toml"
    text = config.read_text(encoding="utf-8")
    (tmp_path / "sample.toml").write_text(text.replace("examples/", f"{repository}/examples/").replace(
        'output = "data/corpus/sample"', f'output = "{tmp_path}/out"'), encoding="utf-8")
    arguments = [sys.executable, str(repository / "tools/prepare_corpus.py"), "--config", str(tmp_path / "sample.toml"),
                 "--json"]
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    listed = subprocess.run([*arguments, "--dry-run"], capture_output=True, text=True, env=environment, check=True)
    assert [entry[0] for entry in json.loads(listed.stdout)["inputs"]] == ["sample", "sample-instructions"]
    assert not (tmp_path / "out").exists()
    result = json.loads(subprocess.run(arguments, capture_output=True, text=True, env=environment, check=True).stdout)
    assert result["documents_read"] == 240 and 100 < result["documents"] <= 120
    again = json.loads(subprocess.run(arguments, capture_output=True, text=True, env=environment, check=True).stdout)
    assert again == result
