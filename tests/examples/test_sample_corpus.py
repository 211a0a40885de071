"""The sample corpus: the documents written by hand, and those that compose.py makes out of the grammar."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from megatron_ttl.errors import UserError

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "sample_corpus"
MARKERS = re.compile(r"[{}\[\]|~#*_]|  | //")
DEMO_DOCUMENTS = 12_000  # the default of compose.py; examples/demo.sh takes somewhat more


@pytest.fixture(scope="module")
def compose() -> ModuleType:
    """The program, imported under its own name although its folder is no package."""
    spec = importlib.util.spec_from_file_location("sample_corpus_compose", FOLDER / "compose.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(FOLDER))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FOLDER))
    return module


@pytest.fixture(scope="module")
def written() -> list[dict[str, str]]:
    """The documents written by hand."""
    lines = (FOLDER / "documents.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def composed(compose: ModuleType) -> list[dict[str, str]]:
    """What the demo reads."""
    return list(compose.compose(DEMO_DOCUMENTS, seed=1))


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, FOLDER / "compose.py", *arguments], capture_output=True, text=True)


def test_written_documents_are_a_corpus(written):
    genres = Counter(document["genre"] for document in written)
    assert all(set(document) == {"id", "genre", "text"} for document in written)
    assert len(written) >= 100 and len(genres) >= 8 and genres["instruction"] >= 25
    assert len({document["id"] for document in written}) == len(written)
    for document in written:
        assert 80 <= len(document["text"].split()) <= 250, document["id"]


def test_written_text_is_clean(written):
    paragraphs = Counter()
    for document in written:
        text = document["text"]
        assert text == unicodedata.normalize("NFC", text).strip(), document["id"]
        assert not MARKERS.search(text), document["id"]
        paragraphs.update(p for p in text.split("\n\n"))
    assert [p for p, count in paragraphs.items() if count > 1] == []


def test_instructions_have_an_answer(written, composed):
    for document in [*written, *composed]:
        if document["genre"] == "instruction":
            question, _, answer = document["text"].partition("\n\n")
            assert question and answer, document["text"]


def test_written_documents_come_first_and_once(written, composed):
    assert composed[: len(written)] == written
    texts = {document["text"] for document in written}
    assert not any(document["text"] in texts for document in composed[len(written):])


def test_composed_documents_differ(composed):
    assert len(composed) == DEMO_DOCUMENTS
    assert len({document["text"] for document in composed}) >= 0.99 * DEMO_DOCUMENTS
    assert len({document["id"] for document in composed}) == DEMO_DOCUMENTS


def test_composed_text_is_clean(composed):
    faults = {
        "slot markers, doubled blanks": MARKERS,
        "small letter at the start of a sentence": re.compile(r"(?:^|[.!?] |\n\n|\n— )[a-zà-ÿ]"),
        "blank before punctuation": re.compile(r"\s[,;:!?]|\s\.(?!\.\.)"),
        "punctuation twice": re.compile(r"[,;:]\.|,,|(?<!\.)\.\.(?!\.)|[!?][.,]"),
        "article not joined to its preposition": re.compile(
            r"\b(?:de|em|por|a) (?:o|os|as) (?!sol nascer|que\b)"),
        "a word twice": re.compile(r"\b(que|de|e|em|do|da|o|um|uma|mais) \1\b"),
        "article and noun disagree": re.compile(
            r"\b(?:[Oo] (?:menina|chave|onça|escola|tia)|[Aa] (?:menino|livro|sapo|rio|tio))\b"),
    }
    for document in composed[120:]:
        text = document["text"]
        assert text == unicodedata.normalize("NFC", text)
        for name, pattern in faults.items():
            found = pattern.search(text)
            assert not found, f"{name}: {found.group()!r} in {text}"


def test_every_list_and_every_kind_is_used(compose, composed):
    lists, kinds, _ = compose.read_grammar()
    templates = [kind["text"] for kind in kinds]
    for entries in lists.values():
        for entry in entries:
            templates += [entry] if isinstance(entry, str) else [str(v) for v in entry.fields.values()]
    used = set(re.findall(r"\{(?:\w+=)?(\w+)[}~]", "\n".join(templates)))
    assert [name for name in lists if "." not in name and name not in used] == []
    assert {kind["genre"] for kind in kinds} <= {document["genre"] for document in composed[120:]}


def test_text_is_rich(composed):
    words = Counter(word.lower() for d in composed for word in re.findall(r"[^\W\d]{4,}", d["text"]))
    assert sum(count >= 20 for count in words.values()) >= 1000


def test_demo_has_enough_tokens(composed):
    import sentencepiece

    model = io.BytesIO()
    texts = [document["text"] for document in composed]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=2048, model_type="bpe",
        byte_fallback=True, split_digits=True, normalization_rule_name="identity",
        max_sentence_length=100_000, num_threads=1, minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    assert sum(map(len, processor.encode(texts))) > 1_200_000


def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path):
    outputs = []
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        path = tmp_path / f"{name}.jsonl"
        result = run("--documents", "300", "--seed", str(seed), "--output", path, "--json")
        assert result.returncode == 0, result.stderr
        outputs.append(path.read_bytes())
        assert json.loads(result.stdout)["documents"] == 300
    assert outputs[0] == outputs[1] != outputs[2]
    assert outputs[0].count(b"\n") == 300
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "c.jsonl"]


def test_more_documents_keep_the_first_ones(compose):
    assert list(compose.compose(400, seed=2))[:300] == list(compose.compose(300, seed=2))


@pytest.mark.parametrize(("arguments", "fault"), [
    (("--documents", "3"), "--documents: 3; must be between 120 (all those written by hand) and 1000000"),
    (("--documents", "-1", "--seed", "-2"), "2 faults:"),
    (("--documents", "99999999"), "choose a number in between"),
    (("--seed", "-2"), "--seed: -2; must be between 0 and 2^63 - 1"),
    (("--output", "x.txt"), "--output: x.txt; must be a file that ends in .jsonl"),
])
def test_nonsense_is_refused(tmp_path, arguments, fault):
    result = run("--output", tmp_path / "x.jsonl", *arguments)
    assert result.returncode == 2 and fault in result.stderr and "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_faults_are_a_user_error(compose, tmp_path, monkeypatch):
    arguments = ["compose.py", "--documents", "0", "--output", str(tmp_path / "x.jsonl")]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(UserError, match=r"^--documents: 0; must be between 120 .* and 1000000; choose"):
        compose.main()


def test_the_output_is_no_folder(tmp_path):
    (tmp_path / "x.jsonl").mkdir()
    result = run("--output", tmp_path / "x.jsonl")
    assert result.returncode == 2 and "must be a file that ends in .jsonl" in result.stderr


@pytest.mark.parametrize(("singular", "plural"), [
    ("gato", "gatos"), ("botão", "botões"), ("animal", "animais"), ("anzol", "anzóis"), ("papel", "papéis"),
    ("amável", "amáveis"), ("fácil", "fáceis"), ("barril", "barris"), ("bom", "bons"), ("flor", "flores"),
    ("xadrez", "xadrezes"), ("freguês", "fregueses"), ("lápis", "lápis"),
    ("sopa de feijão", "sopas de feijão"),
    ("mesa de madeira", "mesas de madeira"), ("pequena fábrica", "pequenas fábricas"),
])
def test_plural(compose, singular, plural):
    assert compose.pluralise(singular) == plural


@pytest.mark.parametrize(("word", "gender", "plural", "form"), [
    ("o", "f", True, "as"), ("ao", "f", False, "à"), ("cansado", "f", True, "cansadas"),
    ("trabalhador", "f", False, "trabalhadora"),
    ("maior", "f", True, "maiores"), ("brincalhão", "f", False, "brincalhona"), ("azul", "f", True, "azuis"),
    ("freguês", "f", False, "freguesa"), ("dentista", "m", False, "dentista"),
    ("simples", "m", True, "simples"),
    ("ele/ela", "f", False, "ela"), ("quanto", "f", True, "quantas"), ("marrom", "f", True, "marrons"),
])
def test_agreement(compose, word, gender, plural, form):
    assert compose.inflect(word, gender, plural) == form


@pytest.mark.parametrize(("number", "gender", "words"), [
    (0, "m", "zero"), (2, "f", "duas"), (21, "f", "vinte e uma"), (100, "m", "cem"), (101, "m", "cento e um"),
    (222, "f", "duzentas e vinte e duas"), (1000, "m", "mil"), (1200, "m", "mil e duzentos"),
    (2014, "m", "dois mil e catorze"),
    (1234, "f", "mil duzentas e trinta e quatro"), (9999, "m", "nove mil novecentos e noventa e nove"),
])
def test_numbers_in_words(compose, number, gender, words):
    assert compose.spell(number, gender) == words


def test_conjugation(compose):
    assert compose.conjugate("cantar", "past") == (
        "eu cantei, você cantou, ele ou ela cantou, nós cantamos, vocês cantaram e eles ou elas cantaram")
    assert compose.conjugate("partir", "present").endswith("nós partimos, vocês partem e eles ou elas partem")


@pytest.mark.parametrize(("expression", "value"), [
    ("n + 3", "20"), ("n - 3", "14"), ("n * 3", "51"), ("n / 3", "5"), ("n % 3", "2"), ("length w", "9"),
    ("initial w", "B"), ("sorted w v", "árvore e beija-flor"), ("int 4 4", "4"),
])
def test_values(compose, expression, value):
    composer = compose.Composer(compose.Random(1), {})
    composer.names = {"n": compose.number(17), "w": compose.Word("beija-flor"), "v": compose.Word("árvore")}
    assert composer.value(expression).text == value


def test_sums_are_right(composed):
    """Every equation in the instructions holds."""
    operations = {"+": int.__add__, "-": int.__sub__, "×": int.__mul__, "÷": int.__floordiv__}
    checked = 0
    for document in composed[120:]:
        for a, sign, b, c in re.findall(r"(?<![-+×÷] )\b(\d+) ([-+×÷]) (\d+) = (\d+)", document["text"]):
            checked += 1
            assert operations[sign](int(a), int(b)) == int(c), document["text"]
    assert checked > 1000
