"""Encode and decode against SentencePiece itself and Hugging Face; loading of what is no tokenizer of ours."""

from __future__ import annotations

import gzip
import io
import json
import random
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ttl.errors import DataError
from megatron_ttl.files import checksum
from megatron_ttl.tokenizer import tokenizer as tokenizer_module
from megatron_ttl.tokenizer.tokenizer import Tokenizer
from megatron_ttl.tokenizer.train import train_tokenizer

WORDS = ("casa rua menino água pão coração não é você está João avó maçã três dia noite livro mesa chuva sol rio mar "
         "vento pedra folha 12 2024 3,5 R$ (1) «sim» — começo fim. Ontem, hoje; amanhã:").split()

TRICKY = [
    "", " ", "   ", "a", " a", "  a  b ", "a\n", "\n", "\n\n a", "\r\n", "a\tb", "\t a", "0123456789", "R$ 1.234,56",
    "coração", "corac\u0327a\u0303o", "Ação É ÀS", "\u200b", "a\u200bb", "\ufeffa", "\u00a0a\u00a0", "\0", "a\0b", "👍🏽",
    "👩\u200d👩\u200d👧", "🇧🇷 ", "\U000f0000", "\ue000", "\ufdd0", "日本語", "שלום", "\u202eabc", "⁇", " ⁇ ", "<0x41>", "▅",
    "fim.\n\nComeço  da\n  linha", "x" * 5000, " " * 5000, "é" * 3000, "a b" * 2000, "\U0010ffff", "ﬁ ½ ①",
]
"""Texts without U+2581 and without spelled-out specials: ours, SentencePiece and Hugging Face must agree."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer") / "small"
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=60)) + "\n" + "  ".join(draw.choices(WORDS, k=5)) for _ in range(40)]
    train_tokenizer(texts, folder, 520)
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def processor(tokenizer: Tokenizer) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.directory / "tokenizer.model"))


def real_texts(shared_data: Path, documents: int) -> list[str]:
    texts = []
    for path in sorted((shared_data / "text").glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as handle:
            texts += [json.loads(line)["text"] for line in islice(handle, documents)]
    return texts


@pytest.mark.parametrize("text", TRICKY, ids=range(len(TRICKY)))
def test_tricky_text_is_encoded_as_sentencepiece_does_and_comes_back(text, tokenizer, processor):
    ids = tokenizer.encode(text)
    assert ids == processor.encode(text)
    assert tokenizer.decode(ids) == text


@settings(max_examples=400, deadline=None)
@given(st.text(alphabet=st.one_of(
    st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), st.sampled_from(" \n\tcasaá0é1")), max_size=80))
def test_any_text_is_encoded_as_sentencepiece_does(tokenizer, processor, text):
    assert tokenizer.encode(text) == processor.encode(text)


@settings(max_examples=400, deadline=None)
@given(st.text(alphabet=st.one_of(
    st.characters(exclude_categories=["Cs"]), st.sampled_from(" \u2581\n\0\r\t\ufeff\u2585\ue000casa<s>/")), max_size=80))
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_unicode_scalar_comes_back(tokenizer):
    scalars = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    texts = ["".join(scalars[start : start + 512]) for start in range(0, len(scalars), 512)]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert tokenizer.decode(ids) == text


def test_the_space_sign_is_spelled_in_bytes_and_not_turned_into_a_space(tokenizer, processor):
    signs = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in (0xE2, 0x96, 0x81)]
    assert tokenizer.encode("\u2581") == signs
    text = "casa\u2581casa \u2581 \u2581\u2581"
    space = processor.encode(" ")
    assert tokenizer.encode(text) == [*tokenizer.encode("casa"), *signs, *tokenizer.encode("casa"), *space, *signs,
                                      *space, *signs, *signs]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert processor.decode(processor.encode(text)) != text, "SentencePiece alone loses it: else this is needless"


def test_specials_spelled_in_the_text_are_characters(tokenizer):
    ids = tokenizer.encode("<s> </s> <unk> <pad>")
    assert not {0, 1, 2, 3} & set(ids)
    assert tokenizer.decode(ids) == "<s> </s> <unk> <pad>"
    assert tokenizer.decode([1, *ids, 2, 3]) == "<s> </s> <unk> <pad>"


def test_a_batch_equals_the_texts_one_by_one_even_when_words_are_forgotten(tokenizer, processor, monkeypatch):
    texts = [text for text in TRICKY if len(text) < 100] * 2
    wanted = [processor.encode(text) for text in texts]
    assert tokenizer.encode_batch(texts) == wanted
    monkeypatch.setattr(tokenizer_module, "_REMEMBERED_CHARACTERS", 10)
    fresh = Tokenizer.load(tokenizer.directory)
    assert [fresh.encode(text) for text in texts] == wanted
    assert fresh.encode_batch(texts) == wanted
    fresh.encode("a")
    assert len(fresh._words) <= 10, "words are forgotten when there are too many"
    assert fresh.encode("\u2581") == tokenizer.encode("\u2581")
    assert tokenizer.encode_batch([]) == []


def test_ids_are_plain_integers_and_specials_have_their_places(tokenizer):
    assert all(type(number) is int for number in tokenizer.encode("casa 12"))
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2, 3)
    assert tokenizer.vocab_size == 520
    assert tokenizer.checksum == checksum(tokenizer.directory / "tokenizer.model")
    assert tokenizer.decode(np.array(tokenizer.encode("casa"), dtype=np.uint16)) == "casa"


def test_a_cut_character_becomes_a_replacement_sign(tokenizer):
    assert tokenizer.decode(tokenizer.encode("日")[:-1]).startswith("\ufffd")


@pytest.mark.parametrize("wrong", [-1, 520, 2**31, 2**70])
def test_ids_outside_of_the_vocabulary_are_refused(tokenizer, wrong):
    with pytest.raises(DataError, match=rf"id {wrong} is not in the vocabulary; ids must be in \[0, 520\)"):
        tokenizer.decode([5, wrong])


def test_lone_surrogates_are_refused_with_their_place(tokenizer):
    with pytest.raises(DataError, match=r"text 0, character 1: is the lone surrogate U\+D800"):
        tokenizer.encode("a\ud800b")
    with pytest.raises(DataError) as caught:
        tokenizer.encode_batch(["bom", "x\udfff", "bom", "\udc00"])
    assert [fault.split(":")[0] for fault in caught.value.faults] == ["text 1, character 1", "text 3, character 0"]
    assert tokenizer.decode(tokenizer.encode("bom")) == "bom", "a refused batch leaves nothing behind"


def test_real_text_is_encoded_as_sentencepiece_does(tokenizer, processor, shared_data):
    texts = real_texts(shared_data, 6)
    assert tokenizer.encode_batch(texts) == processor.encode(texts)


def test_hugging_face_gives_the_same_ids(shared_data, tmp_path):
    transformers = pytest.importorskip("transformers")
    texts = real_texts(shared_data, 70)
    folder = tmp_path / "hf"
    train_tokenizer(texts, folder, 4000)
    ours = Tokenizer.load(folder)
    lines = [line for text in texts for line in text.split("\n") if line]
    lines = random.Random(1).sample(lines, 10_000)
    wanted = ours.encode_batch(lines)
    for kind in (transformers.AutoTokenizer, transformers.LlamaTokenizer):
        theirs = kind.from_pretrained(folder)
        assert len(theirs) == 4000
        assert [theirs.unk_token_id, theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id] == [0, 1, 2, 3]
        found = theirs(lines, add_special_tokens=False)["input_ids"]
        assert [n for n, pair in enumerate(zip(found, wanted, strict=True)) if pair[0] != pair[1]] == []
        for text in TRICKY:
            ids = ours.encode(text)
            assert theirs.encode(text, add_special_tokens=False) == ids, repr(text)
            assert theirs.decode(ids) == text
        assert theirs.encode("casa") == [1, *ours.encode("casa")], "BOS is added, EOS is not"


def foreign_model(tmp_path: Path, **options: object) -> Path:
    model = io.BytesIO()
    words = [" ".join(WORDS)] * 20
    given = dict(model_type="bpe", vocab_size=400, byte_fallback=True, normalization_rule_name="identity",
                 remove_extra_whitespaces=False, add_dummy_prefix=False, unk_id=0, bos_id=1, eos_id=2, pad_id=3,
                 minloglevel=2, hard_vocab_limit=False)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(words), model_writer=model, **{**given, **options})
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    return tmp_path


def test_a_model_with_our_options_is_accepted(tmp_path):
    assert Tokenizer.load(foreign_model(tmp_path)).encode("casa")


@pytest.mark.parametrize(("options", "fault"), [
    ({"pad_id": -1}, "<pad> has no id; it must have id 3"),
    ({"bos_id": 2, "eos_id": 1}, "<s> has id 2; it must have id 1"),
    ({"bos_piece": "<bos>"}, "id 1 is written '<bos>'; it must be '<s>'"),
    ({"byte_fallback": False, "vocab_size": 100}, "has no byte pieces"),
    ({"add_dummy_prefix": True}, "adds or removes spaces"),
    ({"remove_extra_whitespaces": True}, "adds or removes spaces"),
    ({"user_defined_symbols": ["de\u2581casa"]}, "piece 'de▁casa' reaches over a space"),
    ({"user_defined_symbols": ["a\nb"]}, r"piece 'a\\nb' reaches over a space or a newline"),
], ids=lambda value: None if isinstance(value, str) else "-".join(value))
def test_a_model_that_is_not_ours_is_refused(tmp_path, options, fault):
    with pytest.raises(DataError, match=f"tokenizer.model: .*{fault}.*tools/train_tokenizer.py"):
        Tokenizer.load(foreign_model(tmp_path, **options))


def test_all_misplaced_specials_are_named_at_once(tmp_path):
    with pytest.raises(DataError) as caught:
        Tokenizer.load(foreign_model(tmp_path, unk_id=3, bos_id=2, eos_id=1, pad_id=0))
    assert len(caught.value.faults) == 4


def test_a_missing_folder_or_file_is_said(tmp_path):
    with pytest.raises(DataError, match="nowhere: does not exist; it must be a tokenizer folder"):
        Tokenizer.load(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="file: is a file; it must be a tokenizer folder"):
        Tokenizer.load(tmp_path / "file")
    with pytest.raises(DataError, match="tokenizer.model: does not exist; a tokenizer folder holds"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("payload", [b"", b"not a model", b"\0" * 100], ids=["empty", "text", "zeros"])
def test_what_is_no_model_is_refused(tmp_path, payload):
    (tmp_path / "tokenizer.model").write_bytes(payload)
    with pytest.raises(DataError, match="tokenizer.model: is not a SentencePiece model; it may be damaged"):
        Tokenizer.load(tmp_path)


def test_a_model_cut_short_is_refused(tmp_path, tokenizer):
    payload = (tokenizer.directory / "tokenizer.model").read_bytes()
    for share in (0.1, 0.5, 0.9, 0.99):
        (tmp_path / "tokenizer.model").write_bytes(payload[: int(share * len(payload))])
        with pytest.raises(DataError, match="tokenizer.model: "):
            Tokenizer.load(tmp_path)
