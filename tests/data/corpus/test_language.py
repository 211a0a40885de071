"""Portuguese is told from Spanish and Galician, offline, quietly, whatever the text."""

from __future__ import annotations

import gzip
import json
import logging
import socket
from pathlib import Path

import pytest
from filter_documents import cpu_seconds, document
from hypothesis import example, given, settings
from hypothesis import strategies as st
from patience import processor

from megatron_ttl.data.corpus.document import Dropped
from megatron_ttl.data.corpus.filter_settings import read_preset
from megatron_ttl.data.corpus.language import LONGEST_READ, LanguageDetector, language_step

HERE = Path(__file__).parent
PORTUGUESE = "A padaria da esquina abre antes de o sol nascer, e o cheiro do pão quente chega às janelas dos vizinhos."
MIN_SCORE = float(read_preset("pt").language.min_score)


@pytest.fixture(scope="module")
def keep_portuguese():
    return language_step(["pt"], MIN_SCORE)


def paragraphs(language: str) -> list[str]:
    return (HERE / f"paragraphs_{language}.txt").read_text(encoding="utf-8").splitlines()


def test_the_language_is_noted(keep_portuguese):
    note = keep_portuguese(document(PORTUGUESE)).notes["language"]
    assert list(note) == ["pt"]
    assert 0.9 < note["pt"] <= 1


def test_what_is_dropped_says_which_language_it_is(keep_portuguese):
    gone = keep_portuguese(document(paragraphs("es")[0]))
    assert isinstance(gone, Dropped)
    assert gone.rule == "language"
    assert gone.value.startswith("es 0.9")
    assert gone.limit == "pt >= 0.65"


def test_the_limit_is_the_score_itself():
    score = LanguageDetector().scores(PORTUGUESE)["pt"]
    assert not isinstance(language_step(["pt"], score)(document(PORTUGUESE)), Dropped)
    assert isinstance(language_step(["pt"], score + 1e-6)(document(PORTUGUESE)), Dropped)


def test_of_thirty_short_paragraphs_no_spanish_and_at_most_two_galician_ones_pass(keep_portuguese):
    passed = {language: sum(not isinstance(keep_portuguese(document(text)), Dropped) for text in paragraphs(language))
              for language in ("es", "gl")}
    assert passed["es"] == 0
    assert passed["gl"] <= 2
    assert [len(paragraphs(language)) for language in ("es", "gl")] == [30, 30]


def test_several_languages_are_kept_by_their_sum():
    both = language_step(["pt", "gl"], 0.8)
    kept = [both(document(text)) for text in paragraphs("gl")]
    assert sum(not isinstance(result, Dropped) for result in kept) >= 15
    assert {"pt", "gl"} <= set(next(result for result in kept if not isinstance(result, Dropped)).notes["language"])


def test_lines_and_capitals_do_not_matter(keep_portuguese):
    for text in (PORTUGUESE.upper(), PORTUGUESE.replace(" ", "\n"), PORTUGUESE.replace(" ", "\r\n\u2028")):
        assert not isinstance(keep_portuguese(document(text)), Dropped)


def test_a_long_text_is_judged_by_beginning_middle_and_end(keep_portuguese):
    portuguese, spanish = " ".join([PORTUGUESE] * 80), " ".join(paragraphs("es") * 3)
    detect = LanguageDetector().scores
    assert min(len(portuguese), len(spanish)) > LONGEST_READ / 2
    scores = [detect(" ".join(parts))["pt"] for parts in
              ([spanish, portuguese, portuguese], [portuguese, spanish, portuguese], [portuguese, portuguese, spanish])]
    assert max(scores) < 0.9 < detect(" ".join([portuguese] * 3))["pt"]
    assert isinstance(keep_portuguese(document(" ".join([spanish, portuguese, spanish]))), Dropped)


def test_nothing_is_fetched_and_nothing_is_said(monkeypatch, capfd, caplog):
    def refuse(*_):
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with caplog.at_level(logging.DEBUG):
        language_step(["pt"], 0.5)(document(PORTUGUESE * 300))
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


@given(st.text(max_size=200))
@example("")
@example("\n")
@example("\x00\x00")
@settings(max_examples=150, deadline=None)
def test_any_text_has_a_language(keep_portuguese, text):
    result = keep_portuguese(document(text))
    assert isinstance(result, Dropped) or "pt" in result.notes["language"]


def test_a_long_line_takes_no_time(keep_portuguese):
    assert cpu_seconds(keep_portuguese, document("a" * 1_000_000)) < processor(2)


def test_real_portuguese_passes(shared_data, keep_portuguese):
    kept = total = 0
    for file in sorted((shared_data / "text").glob("*.jsonl.gz")):
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            for line, _ in zip(lines, range(30), strict=False):
                total += 1
                kept += not isinstance(keep_portuguese(document(json.loads(line)["text"])), Dropped)
    assert kept >= 0.99 * total
