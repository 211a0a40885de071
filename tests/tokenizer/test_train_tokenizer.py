"""Training: the same bytes each time, nothing skipped, a sample that depends on the texts alone, whole folders."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ttl.errors import ConfigError, DataError, DiskError
from megatron_ttl.files import checksum
from megatron_ttl.tokenizer import train
from megatron_ttl.tokenizer.tokenizer import Tokenizer
from megatron_ttl.tokenizer.train import cut, draw_sample, train_tokenizer

SYLLABLES = "ca sa me ni no pa to ra ção lha do da de ri vé pé mar sol".split()


def make_texts(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    words = ["".join(draw.choices(SYLLABLES, k=draw.randint(1, 4))) for _ in range(300)]
    return [" ".join(draw.choices(words, k=80)) + f" {draw.randint(0, 9999)}\n" for _ in range(count)]


def pieces(folder: Path) -> list[str]:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return [processor.id_to_piece(number) for number in range(processor.vocab_size())]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_folder_says_what_it_is(tmp_path):
    texts = make_texts(30)
    inputs = [{"file": "a.jsonl", "bytes": 7, "documents": 30, "rejected": 0}]
    result = train_tokenizer(texts, tmp_path / "t", 600, inputs=inputs)
    assert {path.name for path in (tmp_path / "t").iterdir()} == {
        "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "training.json"}
    size = sum(len(text.encode()) for text in texts)
    assert (result["documents_used"], result["bytes_seen"], result["bytes_used"]) == (30, size, size)
    record = json.loads((tmp_path / "t" / "training.json").read_text())
    assert record["checksum"] == result["checksum"] == checksum(tmp_path / "t" / "tokenizer.model")
    assert (record["vocab_size"], record["normalization"], record["inputs"]) == (600, "identity", inputs)
    assert record["specials"] == {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3}
    assert record["versions"]["sentencepiece"] == sentencepiece.__version__
    config = json.loads((tmp_path / "t" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "LlamaTokenizer" and config["legacy"] is False
    assert (config["add_bos_token"], config["add_eos_token"], config["clean_up_tokenization_spaces"]) == (
        True, False, False)
    assert list(tmp_path.iterdir()) == [tmp_path / "t"], "no temporary folder is left"


def test_the_same_text_gives_the_same_bytes_in_any_order(tmp_path):
    texts = make_texts(60)
    train_tokenizer(texts, tmp_path / "a", 700)
    train_tokenizer(iter(texts), tmp_path / "b", 700)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    train_tokenizer(random.Random(3).sample(texts, len(texts)), tmp_path / "c", 700)
    assert contents(tmp_path / "a") == contents(tmp_path / "c")
    code = ("import json, sys; from megatron_ttl.tokenizer.train import train_tokenizer; "
            "train_tokenizer(json.load(sys.stdin), sys.argv[1], 700)")
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "d")], input=json.dumps(texts), text=True, check=True)
    assert contents(tmp_path / "a") == contents(tmp_path / "d")


def test_the_number_of_threads_does_not_change_the_pieces(tmp_path, monkeypatch):
    texts = make_texts(60)
    train_tokenizer(texts, tmp_path / "four", 700)
    original = sentencepiece.SentencePieceTrainer.train
    monkeypatch.setattr(sentencepiece.SentencePieceTrainer, "train",
                        lambda **options: original(**{**options, "num_threads": 1}))
    train_tokenizer(texts, tmp_path / "one", 700)
    assert pieces(tmp_path / "four") == pieces(tmp_path / "one")


def test_pieces_split_digits_and_never_hold_a_newline(tmp_path):
    texts = [f"ano {2000 + number % 3}\nfim 2001\r\n" for number in range(300)] + make_texts(20)
    train_tokenizer(texts, tmp_path / "t", 500)
    found = pieces(tmp_path / "t")
    assert found[:4] == ["<unk>", "<s>", "</s>", "<pad>"]
    assert found[4:260] == [f"<0x{byte:02X}>" for byte in range(256)]
    learned = found[260:]
    assert not [piece for piece in learned if re.search(r"\d", piece) and len(piece) > 1]
    assert not [piece for piece in learned if re.search(r"[\n\r\0]", piece)]
    assert "\u2581fim" in learned or "fim" in learned


@pytest.mark.parametrize("space", [" ", ""], ids=["spaces", "no_spaces"])
def test_the_end_of_a_long_document_is_learned_too(tmp_path, space):
    draw = random.Random(0)
    filler = space.join(draw.choice("abcdefgh") + draw.choice("ijklm") for _ in range(20_000))
    text = filler + space + space.join(["zyxwv"] * 3000)
    assert len(text.encode()) > 4192, "more than SentencePiece takes as one sentence"
    train_tokenizer([text], tmp_path / "t", 320)
    assert any("zyxwv" in piece for piece in pieces(tmp_path / "t"))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["palavra", " ", "  ", "\n", "\0", "\r", "\u2581", "\u2585", "á" * 700, "x" * 1500, "\U0001f600" * 999,
                                 "a b " * 300]), max_size=12))
def test_cutting_loses_nothing_but_the_reserved_characters(parts):
    text = "".join(parts)
    found = list(cut(text))
    assert "".join(found) == re.sub("[\0\n\r\u2581\u2585]", "", text)
    assert all(0 < len(piece.encode()) <= 4192 for piece in found)


def test_long_lines_are_cut_at_spaces():
    line = " ".join(f"palavra{number}" for number in range(2000))
    found = list(cut(line))
    assert len(found) > 10
    assert all(piece.startswith(" ") for piece in found[1:]) and not any(piece.endswith(" ") for piece in found)


def test_a_corpus_too_small_for_the_vocabulary_is_told_the_possible_maximum(tmp_path):
    texts = make_texts(5)
    with pytest.raises(DataError, match=r"--vocab-size: is 32,000; this corpus gives at most [\d,]+ pieces") as caught:
        train_tokenizer(texts, tmp_path / "t", 32_000)
    most = int(re.search(r"at most ([\d,]+)", str(caught.value))[1].replace(",", ""))
    assert not list(tmp_path.iterdir())
    with pytest.raises(DataError, match=f"gives at most {most:,} pieces"):
        train_tokenizer(texts, tmp_path / "t", most + 1)
    train_tokenizer(texts, tmp_path / "t", most)
    assert Tokenizer.load(tmp_path / "t").vocab_size == most


def test_a_vocabulary_too_small_for_the_characters_is_told_the_minimum(tmp_path):
    texts = ["".join(chr(0x4E00 + number) for number in range(500))]
    with pytest.raises(DataError, match="--vocab-size: is 300; .* alone need 760"):
        train_tokenizer(texts, tmp_path / "t", 300)


@pytest.mark.parametrize("texts", [[], [""], ["\n\0\n", "\u2581"]], ids=["none", "empty", "reserved"])
def test_a_corpus_without_text_is_refused(tmp_path, texts):
    with pytest.raises(DataError, match=f"the corpus: {len(texts)} documents with no text to learn from"):
        train_tokenizer(texts, tmp_path / "t", 300)


def test_wrong_settings_are_named_at_once(tmp_path):
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "old").write_text("x")
    with pytest.raises(ConfigError) as caught:
        train_tokenizer([], tmp_path / "t", 100, character_coverage=0.5, max_documents=0, max_bytes=-1, seed=-1)
    said = "\n".join(caught.value.faults)
    for fault in ("--vocab-size: is 100; it must be at least 261", "--character-coverage: is 0.5; it must be from 0.98",
                  "--max-documents: is 0; it must be at least 1", "--max-bytes: is -1; it must be", "--seed: is -1; it",
                  "t: exists and is not empty; a tokenizer is not overwritten unasked"):
        assert fault in said
    assert len(caught.value.faults) == 6
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="file: is a file; the output must be a folder"):
        train_tokenizer([], tmp_path / "file", 300, overwrite=True)


def test_a_folder_is_replaced_only_when_asked_and_only_by_a_whole_one(tmp_path, monkeypatch):
    train_tokenizer(make_texts(20), tmp_path / "t", 400)
    before = contents(tmp_path / "t")
    with pytest.raises(DataError):
        train_tokenizer(make_texts(20), tmp_path / "t", 40_000, overwrite=True)
    monkeypatch.setattr(train.json, "dumps", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_tokenizer(make_texts(20, seed=1), tmp_path / "t", 400, overwrite=True)
    assert contents(tmp_path / "t") == before and list(tmp_path.iterdir()) == [tmp_path / "t"]
    monkeypatch.undo()
    train_tokenizer(make_texts(20, seed=1), tmp_path / "t", 400, overwrite=True)
    assert contents(tmp_path / "t") != before and list(tmp_path.iterdir()) == [tmp_path / "t"]
    (tmp_path / "empty").mkdir()
    train_tokenizer(make_texts(20), tmp_path / "empty", 400)
    assert contents(tmp_path / "empty") == before


def test_a_place_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DiskError, match="cannot be written .*; its folder must be writable"):
        train_tokenizer(make_texts(20), tmp_path / "file" / "t", 400)


def test_nfkc_is_a_choice(tmp_path):
    texts = ["ﬁm ½ ﬁ " * 50] + make_texts(20)
    train_tokenizer(texts, tmp_path / "nfkc", 400, normalization="nfkc")
    train_tokenizer(texts, tmp_path / "identity", 400)
    folded, kept = Tokenizer.load(tmp_path / "nfkc"), Tokenizer.load(tmp_path / "identity")
    assert folded.decode(folded.encode("ﬁm ½")) == "fim 1⁄2"
    assert kept.decode(kept.encode("ﬁm ½")) == "ﬁm ½"
    assert folded.decode(folded.encode("  a\n\n b  ")) == "  a\n\n b  ", "spaces and lines stay"


def test_whole_numbers_are_a_choice(tmp_path):
    texts = [f"em {year} e em {year + 1} " * 20 for year in range(1990, 2000)] + make_texts(20)
    for digits in ("split", "whole"):
        train_tokenizer(texts, tmp_path / digits, 500, digits=digits)
        assert json.loads((tmp_path / digits / "training.json").read_text())["digits"] == digits
        loaded = Tokenizer.load(tmp_path / digits)
        assert loaded.decode(loaded.encode("em 1995, 007 e\n19951")) == "em 1995, 007 e\n19951"
    assert not any(re.search(r"\d\d|\d\D|\D\d", piece) for piece in pieces(tmp_path / "split")[260:])
    assert any("1995" in piece for piece in pieces(tmp_path / "whole"))


def test_errors_of_the_input_come_through(tmp_path):
    def texts():
        yield "um"
        raise DataError("a.jsonl:2: broken")

    with pytest.raises(DataError, match="a.jsonl:2: broken"):
        train_tokenizer(texts(), tmp_path / "t", 300)
    assert not list(tmp_path.iterdir())


def test_a_sample_depends_on_seed_and_texts_and_not_on_their_order():
    texts = [f"texto {number} " * (1 + number % 7) for number in range(500)]
    sample = draw_sample(texts, 50, None, seed=1)
    assert len(sample.texts) == 50 and sample.documents_seen == 500
    assert sample.texts == [text for text in texts if text in set(sample.texts)], "in the order they came"
    shuffled = draw_sample(random.Random(0).sample(texts, 500), 50, None, seed=1)
    assert set(shuffled.texts) == set(sample.texts)
    assert set(draw_sample(texts, 50, None, seed=2).texts) != set(sample.texts)
    assert set(sample.texts) <= set(draw_sample(texts, 80, None, seed=1).texts), "a larger sample holds the smaller"
    share = sum(int(text.split()[1]) for text in draw_sample(texts, 250, None, seed=1).texts) / 250
    assert 220 < share < 280, "drawn from everywhere"


def test_a_sample_by_bytes_stays_within_its_limit_and_reports_what_it_took():
    texts = [f"ação {number} " * (1 + number % 7) for number in range(500)]
    sample = draw_sample(texts, None, 5000, seed=1)
    used = sum(len(text.encode()) for text in sample.texts)
    assert sample.texts == [text for text in texts if text in set(sample.texts)]
    assert sample.bytes_used == used and 4800 < used <= 5000
    assert sample.bytes_seen == sum(len(text.encode()) for text in texts)
    assert set(draw_sample(texts[::-1], None, 5000, seed=1).texts) == set(sample.texts)
    assert draw_sample(texts, 3, 5000, seed=1).bytes_used <= 5000
    everything = draw_sample(texts, None, None, seed=1)
    assert everything.texts == texts and everything.bytes_used == everything.bytes_seen


def run_tool(repository: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(repository / "tools" / "train_tokenizer.py"), *map(str, arguments)],
                          capture_output=True, text=True, timeout=60)


def test_the_tool_trains_and_reports(repository, tmp_path):
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"corpo": text}) + "\n" for text in make_texts(40)) + "\n")
    done = run_tool(repository, "--input", source, "--output", tmp_path / "t", "--vocab-size", 500, "--text-key",
                    "corpo", "--max-documents", 30, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    assert (result["documents_seen"], result["documents_used"], result["rejected_lines"]) == (40, 30, 0)
    record = json.loads((tmp_path / "t" / "training.json").read_text())
    assert record["inputs"] == [
        {"file": "a.jsonl", "bytes": source.stat().st_size, "documents": 40, "rejected": 0}]
    assert record["sample"]["documents_used"] == 30
    again = run_tool(repository, "--input", source, "--output", tmp_path / "t", "--text-key", "corpo")
    assert again.returncode == 2 and "--overwrite" in again.stderr and "Traceback" not in again.stderr


def test_the_tool_names_all_missing_files_and_bad_lines(repository, tmp_path):
    done = run_tool(repository, "--input", tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz", "--output", tmp_path / "t")
    assert done.returncode == 2 and done.stdout == ""
    assert "2 faults" in done.stderr and "a.jsonl: does not exist" in done.stderr and "b.jsonl.gz" in done.stderr
    (tmp_path / "a.jsonl").write_text('{"text": "um"}\n{"text": 3}\n{broken\n')
    done = run_tool(repository, "--input", tmp_path / "a.jsonl", "--output", tmp_path / "t")
    assert done.returncode == 2 and not (tmp_path / "t").exists()
    assert "a.jsonl:2: the text is a number" in done.stderr and "a.jsonl:3: broken JSON" in done.stderr
    assert "2 of 3 lines are no documents" in done.stderr
