"""From lines to datasets: the right ids, nothing lost, the same bytes for any number of workers, all or nothing."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
import sentencepiece
from patience import patient

from megatron_ttl.data import encode
from megatron_ttl.data import preprocess as preprocess_module
from megatron_ttl.data.encode import EncodeSettings, encode_files, is_held_out
from megatron_ttl.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from megatron_ttl.data.preprocess import preprocess
from megatron_ttl.errors import DataError, DiskError, UserError
from megatron_ttl.tokenizer.tokenizer import Tokenizer
from megatron_ttl.tokenizer.train import train_tokenizer

WORDS = "casa rua menino água pão coração João maçã três dia 1999 livro\n mesa 👍 chuva  sol".split(" ")


def make_texts(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 60))) + f" {seed}.{number}" for number in range(count)]


def write_lines(path: Path, texts: list[str]) -> Path:
    payload = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()
    path.write_bytes(gzip.compress(payload, mtime=0) if path.name.endswith(".gz") else payload)
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "small"
    train_tokenizer(make_texts(200), folder, 400)
    return folder


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "in"
    folder.mkdir()
    return [write_lines(folder / "a.jsonl", make_texts(300, 1)), write_lines(folder / "b.jsonl.gz", make_texts(200, 2))]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def documents_of(prefix: Path | str) -> list[list[int]]:
    dataset = IndexedDataset(prefix, verify=True)
    return [dataset.document(number).tolist() for number in range(dataset.document_count)]


@pytest.mark.parametrize("bos", [True, False])
def test_documents_are_bos_ids_eos_in_the_order_of_the_input(tokenizer, inputs, tmp_path, bos):
    settings = EncodeSettings(str(tokenizer), bos=bos, held_out_fraction=0.1)
    report = preprocess(inputs, tmp_path / "out" / "pt", settings, chunk_bytes=2000)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer / "tokenizer.model"))
    texts = make_texts(300, 1) + make_texts(200, 2)
    wanted = [[*([1] if bos else []), *processor.encode(text), 2] for text in texts]
    held_out = [is_held_out(text.encode(), 0.1, 0) for text in texts]
    assert documents_of(tmp_path / "out" / "pt") == [ids for ids, out in zip(wanted, held_out, strict=True) if not out]
    assert documents_of(tmp_path / "out" / "pt_heldout") == [ids for ids, out in zip(wanted, held_out, strict=True) if out]
    assert 20 < sum(held_out) < 80
    assert report["documents"] + report["held_out_documents"] == report["lines"] == 500
    assert report["tokens"] + report["held_out_tokens"] == sum(map(len, wanted))
    assert report["text_bytes"] + report["held_out_text_bytes"] == sum(len(text.encode()) for text in texts)
    assert report["rejected_lines"] == report["blank_lines"] == 0 and report["rejected_list"] is None
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "pt.bin", "pt.idx", "pt.json", "pt_heldout.bin", "pt_heldout.idx", "pt_heldout.json", "pt.tokenizer"}


def test_the_manifests_say_how_the_datasets_came_to_be(tokenizer, inputs, tmp_path):
    settings = EncodeSettings(str(tokenizer), held_out_fraction=0.1, held_out_seed=7)
    report = preprocess(inputs, tmp_path / "out" / "pt", settings)
    ours = Tokenizer.load(tokenizer)
    train, held_out = (IndexedDataset(tmp_path / "out" / name).manifest for name in ("pt", "pt_heldout"))
    for manifest, role in ((train, "train"), (held_out, "held_out")):
        assert manifest is not None
        assert (manifest.dtype, manifest.bos, manifest.held_out.role) == ("uint16", True, role)
        assert (manifest.held_out.fraction, manifest.held_out.seed) == (0.1, 7)
        record = manifest.tokenizer
        assert (record.directory, record.vocab_size, record.bos_id, record.eos_id) == ("pt.tokenizer", 400, 1, 2)
        copy = Tokenizer.load(tmp_path / "out" / record.directory)
        assert record.checksum == copy.checksum == ours.checksum
    assert [source.file for source in train.sources] == ["a.jsonl", "b.jsonl.gz"]
    pairs = zip(train.sources, held_out.sources, strict=True)
    assert [a.documents + b.documents for a, b in pairs] == [300, 200]
    assert (train.documents, train.tokens, train.text_bytes) == (
        report["documents"], report["tokens"], report["text_bytes"])
    assert files(tmp_path / "out" / "pt.tokenizer") == files(tokenizer)


def test_the_bytes_do_not_depend_on_workers_or_chunks(tokenizer, inputs, tmp_path):
    with open(inputs[0], "ab") as handle:
        handle.write(b'\n{"text": 3}\n')
    settings = EncodeSettings(str(tokenizer), held_out_fraction=0.2)
    outputs = []
    for workers, chunk_bytes in ((1, 1 << 20), (1, 1), (2, 3000), (3, 1000)):
        preprocess(inputs, tmp_path / "out" / "pt", settings, workers=workers, chunk_bytes=chunk_bytes,
                   max_bad_fraction=0.01, overwrite=True)
        outputs.append(files(tmp_path / "out"))
    assert len(outputs[0]) == 11 and all(output == outputs[0] for output in outputs[1:])


def test_the_split_follows_the_text_alone():
    texts = [f"documento {number}".encode() for number in range(20_000)]
    held_out = [is_held_out(text, 0.02, 0) for text in texts]
    assert 330 < sum(held_out) < 470
    assert held_out == [is_held_out(text, 0.02, 0) for text in texts]
    assert held_out != [is_held_out(text, 0.02, 1) for text in texts], "the seed chooses"
    assert all(is_held_out(text, 0.05, 0) for text, out in zip(texts, held_out, strict=True) if out), (
        "a larger fraction holds the smaller")
    assert not any(is_held_out(text, 0.0, 0) for text in texts)


def test_copies_fall_on_one_side_and_more_files_move_nothing(tokenizer, inputs, tmp_path):
    settings = EncodeSettings(str(tokenizer), held_out_fraction=0.3)
    copy = write_lines(tmp_path / "copy.jsonl", make_texts(300, 1)[::-1])
    more = write_lines(tmp_path / "more.jsonl", make_texts(100, 3))
    preprocess(inputs, tmp_path / "pt", settings)
    preprocess([copy, more, *inputs], tmp_path / "more_pt", settings)
    train, held_out = ({tuple(ids) for ids in documents_of(tmp_path / name)} for name in ("pt", "pt_heldout"))
    more_train, more_held_out = (
        {tuple(ids) for ids in documents_of(tmp_path / name)} for name in ("more_pt", "more_pt_heldout"))
    assert train < more_train and held_out < more_held_out and not more_train & more_held_out


BAD = [b'{"text": 3}', b"{broken", b'{"text": ""}', b'{"text": "a\xffb"}', b'{"text": "\\ud800"}', b'{"titulo": "x"}',
       b"[]", b'{"text": null}', b'{"text": "' + b"y" * 20_000]


def mixed_file(path: Path) -> tuple[bytes, int]:
    """Write 90 good lines, 9 bad ones and 3 blank ones, with a byte order mark and CRLF; give its bytes unpacked."""
    good = [json.dumps({"text": text}).encode() for text in make_texts(90, 5)]
    lines = [*good, *BAD, b"", b"  ", b"\t"]
    random.Random(0).shuffle(lines)
    payload = b"\xef\xbb\xbf" + b"\r\n".join(lines) + b"\n"
    path.write_bytes(gzip.compress(payload) if path.name.endswith(".gz") else payload)
    return payload, len(lines)


@pytest.mark.parametrize("name", ["mixed.jsonl", "mixed.jsonl.gz"])
@pytest.mark.parametrize("workers", [1, 2])
def test_bad_lines_are_listed_with_their_place(tokenizer, tmp_path, name, workers):
    payload, lines = mixed_file(tmp_path / name)
    report = preprocess([tmp_path / name], tmp_path / "pt", EncodeSettings(str(tokenizer)), max_bad_fraction=0.1,
                        workers=workers, chunk_bytes=1000)
    assert report["documents"] + report["held_out_documents"] == 90
    assert (report["rejected_lines"], report["blank_lines"], report["lines"]) == (9, 3, lines)
    listed = [json.loads(line) for line in Path(report["rejected_list"]).read_text().splitlines()]
    assert sorted(entry["reason"] for entry in listed) == sorted(
        ["the text is a number", "broken JSON", "the text is empty", "invalid UTF-8", "lone surrogate", "no key 'text'",
         "a list instead of an object", "the text is null", "broken JSON"])
    raw_lines = payload.split(b"\n")
    for entry in listed:
        assert entry["file"] == str(tmp_path / name)
        raw = raw_lines[entry["line"] - 1]
        assert payload[entry["byte"] : entry["byte"] + entry["bytes"]] == raw + b"\n"
        shown = raw.decode("utf-8", "replace").rstrip("\r")
        assert entry["raw"] == shown or (len(shown) > 10_000 and shown.startswith(entry["raw"]))
    manifest = IndexedDataset(tmp_path / "pt").manifest
    assert manifest is not None and sum(manifest.rejected.values()) == 9 and manifest.rejected["broken JSON"] == 2


def test_too_many_bad_lines_leave_nothing_but_their_list(tokenizer, tmp_path):
    (tmp_path / "out").mkdir()
    mixed_file(tmp_path / "mixed.jsonl")
    with pytest.raises(DataError, match=r"9 of 102 lines are no documents \(2 x broken JSON, .*at most 0.1 % may be; .*"
                                        r"they are listed in .*pt.rejected.jsonl"):
        preprocess([tmp_path / "mixed.jsonl"], tmp_path / "out" / "pt", EncodeSettings(str(tokenizer)))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["pt.rejected.jsonl"]
    assert len((tmp_path / "out" / "pt.rejected.jsonl").read_text().splitlines()) == 9
    write_lines(tmp_path / "mixed.jsonl", make_texts(90))
    preprocess([tmp_path / "mixed.jsonl"], tmp_path / "out" / "pt", EncodeSettings(str(tokenizer)))
    assert not (tmp_path / "out" / "pt.rejected.jsonl").exists(), "a list of an earlier try does not stay"


def test_a_corpus_of_bad_lines_is_not_read_to_its_end(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(b'{"texto": "um"}\n' * 5000)
    monkeypatch.setattr(preprocess_module, "_HOPELESS", 100)
    with pytest.raises(DataError, match=r"--input: \d{3} of \d{3} lines are no documents \(\d{3} x no key 'text'\)"):
        preprocess([tmp_path / "a.jsonl"], tmp_path / "pt", EncodeSettings(str(tokenizer)), chunk_bytes=1000)


def test_a_packed_file_cut_short_commits_nothing(tokenizer, inputs, tmp_path):
    packed = inputs[1].read_bytes()
    inputs[1].write_bytes(packed[: len(packed) // 2])
    for workers in (1, 2):
        with pytest.raises(DataError, match=r"b.jsonl.gz:\d+:\d+: the packed file ends in the middle"):
            preprocess(inputs, tmp_path / "out" / "pt", EncodeSettings(str(tokenizer)), workers=workers)
        assert not list((tmp_path / "out").iterdir())


def die(settings: EncodeSettings, chunk: encode.Chunk) -> encode.Outcome:
    if chunk.first_line > 1:
        os._exit(9)
    return encode.encode_chunk(Tokenizer.load(settings.tokenizer), settings, chunk)


def test_a_dead_worker_is_an_error_in_seconds(tokenizer, inputs):
    started = time.monotonic()
    ours = Tokenizer.load(tokenizer)
    with (pytest.raises(DataError, match="a worker process died; .*use fewer --workers"),
          closing(encode_files(inputs, ours, EncodeSettings(str(tokenizer)), 2, 1000, encode=die)) as results):
        list(results)
    assert time.monotonic() - started < patient(10)


def interrupt_oneself(settings: EncodeSettings, chunk: encode.Chunk) -> encode.Outcome:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.05)
    return encode.encode_chunk(Tokenizer.load(settings.tokenizer), settings, chunk)


def test_workers_leave_the_interrupt_to_the_parent(tokenizer, inputs):
    ours = Tokenizer.load(tokenizer)
    results = encode_files(inputs, ours, EncodeSettings(str(tokenizer)), 1, 1 << 20, encode=interrupt_oneself)
    assert sum(len(chunk.lines) for chunk, _ in results) == 500


def test_what_cannot_be_used_is_named_at_once(tokenizer, inputs, tmp_path):
    (tmp_path / "pt.bin").write_bytes(b"")
    (tmp_path / "pt.tokenizer").mkdir()
    settings = EncodeSettings(str(tmp_path / "nowhere"), text_key="", held_out_fraction=1.0, held_out_seed=-1)
    with pytest.raises(DataError) as caught:
        preprocess([tmp_path / "none.jsonl", tmp_path / "nor.jsonl.gz"], tmp_path / "pt", settings, workers=0,
                   max_bad_fraction=2.0)
    said = "\n".join(caught.value.faults)
    for fault in ("--workers: is 0; it must be at least 1", "--text-key: is empty", "--held-out-fraction: is 1.0; it must",
                  "--held-out-seed: is -1; it must", "--max-bad-fraction: is 2.0; it must", "none.jsonl: does not exist",
                  "nor.jsonl.gz: does not exist", "pt.bin: exists already; .*overwrite".split(".*")[0],
                  "pt.tokenizer: exists already", "nowhere: does not exist; it must be a tokenizer folder"):
        assert fault in said
    assert len(caught.value.faults) == 10
    for prefix in ("", f"{tmp_path}/", f"{tmp_path}/.."):
        with pytest.raises(DataError, match="--output-prefix: is .*; it must end in a name"):
            preprocess(inputs, prefix, EncodeSettings(str(tokenizer)))


def test_a_place_that_cannot_be_written_is_said(tokenizer, inputs, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file/.*: cannot be written"):
        preprocess(inputs, tmp_path / "file" / "pt", EncodeSettings(str(tokenizer)))


def test_nothing_held_out_is_said(tokenizer, inputs, tmp_path):
    report = preprocess(inputs, tmp_path / "pt", EncodeSettings(str(tokenizer), held_out_fraction=1e-9))
    assert report["held_out"] == "empty: no document fell into the held-out 1e-07 %"
    report = preprocess(inputs, tmp_path / "none", EncodeSettings(str(tokenizer), held_out_fraction=0.0))
    assert report["held_out"] == "none: --held-out-fraction is 0" and report["documents"] == 500
    assert not list(tmp_path.glob("*_heldout*"))


def test_documents_must_be_left_for_training(tokenizer, inputs, tmp_path):
    with pytest.raises(DataError, match="--held-out-fraction: leaves no document for training"):
        preprocess(inputs, tmp_path / "pt", EncodeSettings(str(tokenizer), held_out_fraction=1 - 1e-12))
    (tmp_path / "in" / "blank.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="--input: holds no documents"):
        preprocess([tmp_path / "in" / "blank.jsonl"], tmp_path / "pt", EncodeSettings(str(tokenizer)))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_dataset_is_replaced_only_when_asked_and_wholly(tokenizer, inputs, tmp_path):
    settings = EncodeSettings(str(tokenizer), held_out_fraction=0.2)
    preprocess(inputs, tmp_path / "out" / "pt", settings)
    before = files(tmp_path / "out")
    with pytest.raises(DataError, match=r"pt_heldout.idx: exists already; a dataset is not overwritten unasked; .*"
                                        "--overwrite"):
        preprocess(inputs, tmp_path / "out" / "pt", settings)
    preprocess(inputs, tmp_path / "out" / "pt", EncodeSettings(str(tokenizer), held_out_fraction=0.0), overwrite=True)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"pt.bin", "pt.idx", "pt.json", "pt.tokenizer"}
    own_copy = EncodeSettings(str(tmp_path / "out" / "pt.tokenizer"), held_out_fraction=0.2)
    preprocess(inputs, tmp_path / "out" / "pt", own_copy, overwrite=True)
    assert files(tmp_path / "out") == before


def test_a_tokenizer_may_already_lie_where_its_copy_goes(tokenizer, inputs, tmp_path):
    copy = tmp_path / "out" / "pt.tokenizer"
    shutil.copytree(tokenizer, copy)
    preprocess(inputs, tmp_path / "out" / "pt", EncodeSettings(str(copy)))
    assert files(copy) == files(tokenizer)
    shutil.copytree(tokenizer, tmp_path / "other.tokenizer")
    (tmp_path / "other.tokenizer" / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(DataError, match="other.tokenizer: exists already"):
        preprocess(inputs, tmp_path / "other", EncodeSettings(str(copy)))
    preprocess(inputs, tmp_path / "other", EncodeSettings(str(copy)), overwrite=True)
    assert files(tmp_path / "other.tokenizer") == files(tokenizer)


def test_a_full_disk_at_the_end_leaves_nothing_new(tokenizer, inputs, tmp_path, monkeypatch):
    settings = EncodeSettings(str(tokenizer), held_out_fraction=0.2)
    original = IndexedDatasetWriter.finish

    def finish(self, description):
        if self.prefix.endswith("_heldout"):
            raise OSError(28, "No space left on device", "pt_heldout.idx")
        return original(self, description)

    monkeypatch.setattr(IndexedDatasetWriter, "finish", finish)
    with pytest.raises(DiskError, match=r"pt_heldout.idx: cannot be written or read \(No space left on device\)"):
        preprocess(inputs, tmp_path / "out" / "pt", settings)
    assert not list((tmp_path / "out").iterdir())


def start_tool(repository: Path, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, str(repository / "tools" / "preprocess_data.py"), *map(str, arguments)],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_an_interrupted_run_leaves_no_dataset_and_no_worker(repository, tokenizer, tmp_path, number):
    source = write_lines(tmp_path / "a.jsonl", [text * 20 for text in make_texts(2000)] * 20)
    arguments = ("--input", source, "--tokenizer", tokenizer, "--output-prefix", tmp_path / "out" / "pt", "--workers", 2)
    tool = start_tool(repository, *arguments)
    partial = tmp_path / "out" / ".pt.bin.partial"
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not (partial.exists() and partial.stat().st_size):
        time.sleep(0.02)
    os.killpg(tool.pid, number) if number == signal.SIGINT else tool.kill()
    _, errors = tool.communicate(timeout=30)
    if number == signal.SIGINT:
        assert (tool.returncode, errors) == (130, "interrupted\n")
        assert not list((tmp_path / "out").iterdir())
    else:
        assert not [path.name for path in (tmp_path / "out").iterdir() if not path.name.endswith(".partial")]
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and alive(tool.pid):
        time.sleep(0.05)
    assert not alive(tool.pid), "workers do not outlive the parent"
    small = write_lines(tmp_path / "a.jsonl", make_texts(100))
    report = preprocess([small], tmp_path / "out" / "pt", EncodeSettings(str(tokenizer), held_out_fraction=0.0))
    assert report["documents"] == 100
    assert not [path.name for path in (tmp_path / "out").iterdir() if path.name in (".pt.bin.partial",)]


def test_the_tool_reports_and_fails_with_a_sentence(repository, tokenizer, inputs, tmp_path):
    arguments = ("--input", *inputs, "--tokenizer", tokenizer, "--output-prefix", tmp_path / "pt", "--workers", 2,
                 "--held-out-fraction", 0.1, "--no-bos")
    tool = start_tool(repository, *arguments, "--json")
    output, errors = tool.communicate(timeout=60)
    assert (tool.returncode, errors) == (0, "")
    report = json.loads(output)
    assert report["documents"] + report["held_out_documents"] == 500
    assert report["bytes_per_token"] == pytest.approx(
        (report["text_bytes"] + report["held_out_text_bytes"]) / (report["tokens"] + report["held_out_tokens"]), abs=1e-4)
    manifest = IndexedDataset(tmp_path / "pt").manifest
    assert manifest is not None and manifest.bos is False
    tool = start_tool(repository, *arguments)
    output, errors = tool.communicate(timeout=60)
    assert tool.returncode == 2 and output == "" and "6 faults" in errors and "Traceback" not in errors
    mixed_file(tmp_path / "mixed.jsonl")
    tool = start_tool(repository, "--input", tmp_path / "mixed.jsonl", "--tokenizer", tokenizer, "--output-prefix",
                      tmp_path / "bad")
    output, errors = tool.communicate(timeout=60)
    assert tool.returncode == 2 and "9 of 102 lines are no documents" in errors and "bad.rejected.jsonl" in errors
