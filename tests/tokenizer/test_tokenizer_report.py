"""The report counts what the libraries' own encoders give, finds words by brute force, and opens nothing damaged."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import xxhash
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from megatron_ttl.data.strict_records import read_sourced_texts
from megatron_ttl.errors import DataError
from megatron_ttl.tokenizer import report
from megatron_ttl.tokenizer.foreign import open_foreign
from megatron_ttl.tokenizer.report import ALL, compare_tokenizers
from megatron_ttl.tokenizer.train import train_tokenizer

WORDS = ("A água, que não parou desde domingo, levou a ponte velha; o prefeito prometeu outra até março. Ninguém acreditou: "
         "faz três verões que a promessa é a mesma e o rio também. 2024! (cidadezinha) pão-de-queijo").split()
STRANGE = ["😡", "Ж", "日本", "—", "x" * 120, "ção", "\u00a0dura\u00a0"]


def texts(seed: int, count: int = 12) -> list[str]:
    draw = random.Random(seed)
    joints = [" "] * 8 + ["\n", "  ", "\n\n", "\t"]
    return ["".join(draw.choice([*WORDS, *WORDS, *STRANGE]) + draw.choice(joints) for _ in range(60)) for _ in range(count)]


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, str]:
    """One tokenizer of every kind, trained or written here."""
    folder = tmp_path_factory.mktemp("tokenizers")
    learnt = [text for seed in range(4) for text in texts(seed)]
    train_tokenizer([" ".join(WORDS) + "\n"] * 20, folder / "spm", 400)
    pair = tokenizers.Tokenizer(models.BPE())
    pair.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pair.train_from_iterator(learnt, trainers.BpeTrainer(vocab_size=330, show_progress=False,
                                                         initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    pair.model.save(str(folder))
    short = {word for word in WORDS if len(word) < 6}
    pieces = sorted({"[UNK]", "a", "pon", "##te", "prom", "##essa", "rio", *",.;:()!-"} | short)
    (folder / "cased_vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    vocabulary = {piece: number for number, piece in enumerate(
        ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"abcdefghijklmnopqrstuvz", "\u2581r", "io"])}
    made = tokenizers.Tokenizer(models.BPE(vocabulary, [("\u2581", "r"), ("i", "o")], unk_token="<unk>", byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.ByteFallback()
    made.enable_truncation(5)
    made.post_processor = processors.TemplateProcessing(single="<unk> $0", special_tokens=[("<unk>", 0)])
    made.save(str(folder / "tokenizer.json"))
    return {"SentencePiece": str(folder / "spm"), "byte-level BPE": f"{folder}/vocab.json+{folder}/merges.txt",
            "WordPiece": str(folder / "cased_vocab.txt"), "tokenizer.json": str(folder / "tokenizer.json")}


def words_of_several_tokens(text: str, tokens: list[tuple[str, tuple[int, int]]]) -> int:
    """Count words on which more than one token lies, by looking at every character."""
    covered: list[set[int]] = [set() for _ in text]
    for number, (_, (begin, end)) in enumerate(tokens):
        for place in range(begin, end):
            covered[place].add(number)
    count, start = 0, 0
    for word in text.split():
        start = text.index(word, start)
        count += len(set().union(*covered[start : start + len(word)])) > 1
        start += len(word)
    return count


def brute(kind: str, place: str, text: str) -> dict[str, int]:
    if kind == "SentencePiece":
        processor = sentencepiece.SentencePieceProcessor(model_file=f"{place}/tokenizer.model")
        pieces, starts = processor.encode(text, out_type=str), [0]
        for piece in pieces:
            starts.append(starts[-1] + (1 if piece.startswith("<0x") else len(piece.replace("\u2581", " ").encode())))
        character = [number for number, sign in enumerate(text) for _ in sign.encode()]
        tokens = [(piece, (character[begin], character[end - 1] + 1))
                  for piece, begin, end in zip(pieces, starts, starts[1:], strict=False)]
        unknown, spelled = 0, sum(piece.startswith("<0x") for piece in pieces)
    else:
        if kind == "WordPiece":
            vocabulary = {line: number for number, line in enumerate(Path(place).read_text(encoding="utf-8").splitlines())}
            made = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
            made.normalizer = tokenizers.normalizers.BertNormalizer(strip_accents=False, lowercase=False)
            made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        elif kind == "byte-level BPE":
            made = tokenizers.Tokenizer(models.BPE.from_file(*place.split("+")))
            made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        else:
            made = tokenizers.Tokenizer.from_file(place)
            made.no_truncation()
        found = made.encode(text, add_special_tokens=False)
        tokens = list(zip(found.tokens, found.offsets, strict=True))
        unknown = sum(piece in ("[UNK]", "<unk>") for piece, _ in tokens)
        spelled = sum(piece.startswith("<0x") for piece, _ in tokens)
        if kind == "byte-level BPE":
            spelled = sum("\ufffd" in decoders.ByteLevel().decode([piece]) for piece, _ in tokens)
    real = [token for token in tokens if token[0].strip("\u2581\u0120")]
    return {"tokens": len(tokens), "unknown": unknown, "spelled": spelled, "continued": words_of_several_tokens(text, real)}


KINDS = ("SentencePiece", "byte-level BPE", "WordPiece", "tokenizer.json")


@pytest.mark.parametrize("kind", KINDS)
def test_a_report_counts_what_the_library_gives(places, kind):
    tokenizer, documents = open_foreign(places[kind]), texts(9)
    assert tokenizer.kind == kind
    row = compare_tokenizers([tokenizer], [("a", text) for text in documents])["rows"][0]
    found = [brute(kind, places[kind], text) for text in documents]
    total = {name: sum(count[name] for count in found) for name in found[0]}
    words, size = sum(len(text.split()) for text in documents), sum(len(text.encode()) for text in documents)
    assert (row["documents"], row["words"], row["bytes"], row["tokens"]) == (len(documents), words, size, total["tokens"])
    assert row["tokens_per_word"] == pytest.approx(total["tokens"] / words, abs=1e-6)
    assert row["bytes_per_token"] == pytest.approx(size / total["tokens"], abs=1e-6)
    assert row["unknown_share"] == pytest.approx(total["unknown"] / total["tokens"], abs=1e-6)
    assert row["byte_share"] == pytest.approx(total["spelled"] / total["tokens"], abs=1e-6)
    # A word is judged as it stands behind a space: at the head of a line some vocabularies cut it otherwise.
    spaced = ["".join(f" {word}" for word in text.split()) for text in documents]
    row = compare_tokenizers([tokenizer], [("a", text) for text in spaced])["rows"][0]
    continued = sum(brute(kind, places[kind], text)["continued"] for text in spaced)
    assert row["continued_words"] == pytest.approx(continued / words, abs=1e-6) and 0 < continued < words
    assert (row["unknown_share"] > 0) == (kind == "WordPiece") and (row["byte_share"] > 0) == (kind != "WordPiece")


def test_sources_add_up_whatever_the_batches(places, monkeypatch):
    made = [open_foreign(f"{kind}={place}") for kind, place in places.items()]
    given = [(source, text) for seed, source in enumerate(["leis", "blogs", "leis", "blogs"]) for text in texts(seed, 4)]
    whole = compare_tokenizers(made, given)
    assert [row["source"] for row in whole["rows"]] == ["leis"] * 4 + ["blogs"] * 4 + [ALL] * 4
    assert [row["tokenizer"] for row in whole["rows"][:4]] == list(places) == [row["name"] for row in whole["tokenizers"]]
    for one, two, total in zip(whole["rows"][:4], whole["rows"][4:8], whole["rows"][8:], strict=True):
        for key in ("documents", "words", "bytes", "tokens"):
            assert one[key] + two[key] == total[key]
        assert total["versus_first"] == pytest.approx(total["tokens"] / whole["rows"][8]["tokens"] - 1, abs=1e-6)
        assert total["continued_words"] == pytest.approx(
            (one["continued_words"] * one["words"] + two["continued_words"] * two["words"]) / total["words"], abs=1e-5)
    monkeypatch.setattr(report, "_BATCH_CHARACTERS", 1)
    monkeypatch.setattr(report, "_REMEMBERED_CHARACTERS", 20)
    assert compare_tokenizers(made, iter(given)) == whole


def test_lower_case_is_asked_for_and_accents_stay(tmp_path):
    (tmp_path / "vocab.txt").write_text("[UNK]\nágua\nagua\n", encoding="utf-8")
    cased, lower = open_foreign(str(tmp_path)), open_foreign(str(tmp_path / "vocab.txt"), lowercase=True)
    assert (cased.encode(["Água água"]), lower.encode(["Água água"])) == ([[0, 1]], [[1, 1]])
    assert (cased.name, lower.name, open_foreign(f"meu={tmp_path}").name) == (tmp_path.name, "vocab", "meu")


def test_what_is_no_tokenizer_is_refused(tmp_path, places):
    spoiled = {"empty.model": b"", "text.model": b"nada", "text.json": b"nada", "list.json": b"[]", "none.txt": b"a\nb\n",
               "latin.txt": "[UNK]\nágua".encode("latin-1"), "a.json": b"{}", "b.json": b'{"a": -1}', "merges.txt": b"a b\n",
               "c.json": b'{"a": 99999999}', "none.bpe": b"#version: 0.2\n", "d.bin": b"x"}
    for name, payload in spoiled.items():
        (tmp_path / name).write_bytes(payload)
    (tmp_path / "folder").mkdir()
    for place in (*list(spoiled)[:6], "a.json", "a.json+merges.txt", "b.json+merges.txt", "c.json+none.bpe"):
        with pytest.raises(DataError, match=r"is no tokenizer \(.*; give a .model"):
            open_foreign("+".join(str(tmp_path / part) for part in place.split("+")))
    wrong = {"d.bin": "has an unknown suffix", "folder": "holds no tokenizer", "missing.json": "is no file"}
    for place, said in wrong.items():
        with pytest.raises(DataError, match=f"{place}: {said}"):
            open_foreign(str(tmp_path / place))
    with pytest.raises(DataError, match="names 3 files"):
        open_foreign("+".join([str(tmp_path / "a.json")] * 3))
    one = open_foreign(places["WordPiece"])
    with pytest.raises(DataError, match="2 are called 'cased_vocab'; every one needs its own name; write NAME=PATH"):
        compare_tokenizers([one, one], [("a", "b")])
    with pytest.raises(DataError, match="--text: holds no text"):
        compare_tokenizers([one], [])


def test_a_damaged_file_is_a_tokenizer_or_a_sentence(places, tmp_path):
    draw = random.Random(0)
    for kind in ("tokenizer.json", "SentencePiece"):
        whole = Path(places[kind], "tokenizer.model" if kind == "SentencePiece" else "").read_bytes()
        path = tmp_path / ("a.model" if kind == "SentencePiece" else "a.json")
        for _ in range(100):
            place = draw.randrange(len(whole))
            path.write_bytes(whole[:place] + bytes([draw.randrange(256)]) * draw.randrange(3) + whole[place + 1:])
            try:
                open_foreign(str(path)).encode(["a ponte é do rio"])
            except DataError as error:
                assert "a ponte" not in str(error) and path.name in str(error)


def test_a_tokenizer_that_cannot_say_a_text_is_named(tmp_path):
    made = tokenizers.Tokenizer(models.Unigram([("a", -1.0)]))
    made.save(str(tmp_path / "small.json"))
    with pytest.raises(DataError, match=r"small.json: cannot encode the text \(.*unk_id"):
        compare_tokenizers([open_foreign(str(tmp_path / "small.json"))], [("b", "ab")])


def test_the_tool_prints_json_where_no_person_looks(repository, tmp_path, places):
    (tmp_path / "notas.txt").write_text("O rio levou a ponte.\n", encoding="utf-8")
    rows = [{"texto": "A água parou.", "fonte": "rádio"}, {"texto": "Outra ponte?"}]
    (tmp_path / "dados.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    command = [sys.executable, str(repository / "tools" / "tokenizer_report.py"), "--tokenizers", places["SentencePiece"],
               f"bert={places['WordPiece']}", "--text", str(tmp_path / "notas.txt"), str(tmp_path / "dados.jsonl"),
               "--text-key", "texto", "--source-key", "fonte"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    rows = json.loads(done.stdout)["rows"]
    assert [(row["source"], row["tokenizer"], row["words"]) for row in rows[::2]] == [
        ("notas", "spm", 5), ("rádio", "spm", 3), ("dados", "spm", 2), (ALL, "spm", 10)]
    done = subprocess.run([*command, str(tmp_path / "fehlt.txt")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_real_text_has_the_published_counts(shared_data):
    vocabularies = shared_data / "tokenizers"
    made = [open_foreign(f"BERTimbau={vocabularies / 'bertimbau_vocab.txt'}"),
            open_foreign(f"PTT5={vocabularies / 'ptt5_spm_32000_pt.model'}"),
            open_foreign(f"GPT-2={vocabularies / 'gpt2_encoder.json'}+{vocabularies / 'gpt2_vocab.bpe'}")]
    files = {name: shared_data / "fertility" / f"fertility_{name}_7400w.txt" for name in ("wiki", "mixed")}
    rows = compare_tokenizers(made, [(name, path.read_text(encoding="utf-8")) for name, path in files.items()])["rows"]
    assert [(row["source"], row["words"], row["tokens"]) for row in rows[:6]] == [
        ("wiki", 7400, 10_344), ("wiki", 7400, 10_217), ("wiki", 7400, 16_208),
        ("mixed", 7400, 10_517), ("mixed", 7400, 10_474), ("mixed", 7400, 16_449)]


@pytest.mark.long
def test_a_tokenizer_of_ours_beats_bertimbau_on_documents_that_it_has_not_seen(shared_data, tmp_path):
    paths = sorted((shared_data / "text").glob("*.jsonl.gz"))
    documents = [text for path in paths for _, text in read_sourced_texts([path])]
    held_out = [text for text in documents if xxhash.xxh3_64_intdigest(text.encode(), 99) < 2**64 // 10]
    train_tokenizer(sorted(set(documents) - set(held_out)), tmp_path / "ours", digits="whole")
    places = (f"BERTimbau={shared_data / 'tokenizers' / 'bertimbau_vocab.txt'}", str(tmp_path / "ours"))
    made = [open_foreign(place) for place in places]
    bertimbau, ours = compare_tokenizers(made, [("held out", text) for text in held_out])["rows"]
    assert ours["versus_first"] < -0.05 and ours["unknown_share"] == 0 < bertimbau["unknown_share"]
