"""Streamed text is the text: in pieces, in order, without half characters."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ttl.generate.text_stream import TextStream, printable
from megatron_ttl.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)


def stream(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> list[str]:
    one = TextStream(tokenizer.decode, prompt)
    return [one.add(token) for token in ids] + [one.finish()]


@pytest.mark.parametrize("text", ["Era uma vez", " dois  espaços ", "日本 🙂 é", "a\n\nb", "👩‍👩‍👧", ""])
def test_pieces_make_the_text(tokenizer, text):
    ids = tokenizer.encode(text)
    pieces = stream(tokenizer, [tokenizer.bos_id], ids)
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)


def test_a_character_comes_whole_or_not_yet(tokenizer):
    ids = tokenizer.encode("🙂")
    assert len(ids) == 4, "the emoji must be spelled in bytes for this test"
    assert stream(tokenizer, tokenizer.encode("a"), ids) == ["", "", "", "🙂", ""]
    assert stream(tokenizer, [], ids[:2])[:2] == ["", ""]
    assert stream(tokenizer, [], ids[:2])[2].strip("\ufffd") == ""
    assert stream(tokenizer, [], ids[:2])[2] != ""


def test_text_comes_with_its_token(tokenizer):
    ids = tokenizer.encode("a menina viu o rio.")
    pieces = stream(tokenizer, tokenizer.encode("Era"), ids)
    assert all(pieces[:-1]) and pieces[-1] == ""
    assert len(pieces) == len(ids) + 1 > 4


@settings(max_examples=300, deadline=None)
@given(prompt=st.lists(st.integers(0, 349), max_size=6), ids=st.lists(st.integers(0, 349), max_size=30))
def test_any_tokens_give_what_decoding_all_gives(tokenizer, prompt, ids):
    # Half characters of the prompt are not given out again.
    before = tokenizer.decode(prompt)
    if before.endswith("\ufffd"):
        return
    assert "".join(stream(tokenizer, prompt, ids)) == tokenizer.decode(prompt + ids)[len(before) :]


def test_long_texts_do_not_cost_more_per_token():
    longest = 0

    def decode(ids):
        nonlocal longest
        longest = max(longest, len(ids))
        return "".join(map(chr, ids))

    one = TextStream(decode, [65] * 10)
    assert "".join(one.add(97 + number % 26) for number in range(52)) == "abcdefghijklmnopqrstuvwxyz" * 2
    assert longest <= 11


def test_control_characters_do_not_reach_the_terminal():
    assert printable("olá\n\t\x1b[31mrubro\x07\x9b") == "olá\n\t\ufffd[31mrubro\ufffd\ufffd"
