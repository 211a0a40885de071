"""Every rule at its limit and one unit beyond; any text is measured, quickly; datatrove measures the same."""

from __future__ import annotations

import random
import unicodedata

import pytest
from filter_documents import cpu_seconds, document, only
from hypothesis import example, given, settings
from hypothesis import strategies as st
from patience import processor

from megatron_ttl.data.corpus.document import Dropped
from megatron_ttl.data.corpus.filter_settings import read_preset
from megatron_ttl.data.corpus.filters import build_steps, limits_of, signs_of
from megatron_ttl.data.corpus.text_rules import RULES, LanguageSigns, TextParts, measures

SIGNS = signs_of(read_preset("pt"))


def distinct(number: int, letters: int = 9) -> list[str]:
    """Return words of so many letters of which no two are the same."""
    return ["".join(chr(97 + place // 26**power % 26) for power in range(4)).ljust(letters, "x") for place in range(number)]


def of_lines(bad: int, total: int, make_bad: str, make_good: str) -> str:
    return "\n".join((make_bad if place < bad else make_good).format(word, word)
                     for place, word in enumerate(distinct(total)))


def with_duplicates(number: int, total: int, end: str) -> str:
    """Return parts of nine letters, the last `number` of which repeat the first one."""
    parts = distinct(total - number)
    return "".join(part + end for part in [*parts, *[parts[0]] * number])


def with_phrase(number: int, n: int, length: int) -> str:
    """Return a text of so many characters in which a phrase of n words stands `number` times, and nothing else twice."""
    phrase = " ".join(["wxyz"[place % 4] * 4 + chr(97 + place) for place in range(n)])
    text = " ".join(f"{phrase} {word}" for word in distinct(number, 5)) + " "
    return text + "q" * (length - len(text))


def repeated_n_gram(rule: str, preset_limit: float, n: int):
    joined = 6 * n - 1 if "top" in rule else 5 * n  # characters of the phrase: with the spaces between, or without
    at_limit = round(preset_limit * 1000)
    first = 0 if "top" in rule else 1  # the first occurrence of a duplicate is none
    return (rule, "pt", lambda k: with_phrase(k + first, n, 1000 * joined), at_limit, at_limit + 1, preset_limit)


# rule, preset, text of k units, k at the limit, k beyond it, limit
AT_LIMIT = [
    ("gopher.min_words", "pt", lambda k: " ".join(["casa"] * k) + " — !", 50, 49, 50),
    ("gopher.max_words", "pt", lambda k: " ".join(["casa"] * k), 100_000, 100_001, 100_000),
    ("gopher.min_mean_word_length", "pt", lambda k: " ".join(["não"] * 99 + ["e" * (k - 297)]), 300, 299, 3),
    ("gopher.max_mean_word_length", "pt", lambda k: " ".join(["e" * 13] * 99 + ["é" * (k - 1287)]), 1300, 1301, 13),
    ("gopher.max_hash_ratio", "pt", lambda k: "#" * k + " casa" * (100 - k), 10, 11, 0.1),
    ("gopher.max_ellipsis_ratio", "pt", lambda k: "… " * (k - 1) + "..." + " casa" * (100 - k), 10, 11, 0.1),
    ("gopher.max_bullet_lines", "pt", lambda k: of_lines(k, 100, "  • {}", "{} - {}"), 90, 91, 0.9),
    ("gopher.max_ellipsis_lines", "pt", lambda k: of_lines(k, 100, "{}...  ", "{}... {}"), 30, 31, 0.3),
    ("gopher.min_alphabetic_words", "pt", lambda k: "é 1,5 " * 186 + "não " * (k - 186) + "| " * (814 - k), 814, 813, 0.814),
    ("gopher.min_stop_words", "pt", lambda k: " ".join(["casa", "É", "DE"][:k + 1]), 2, 1, 2),
    ("gopher.max_duplicate_paragraphs", "gopher", lambda k: with_duplicates(k, 10, "\n \n"), 3, 4, 0.3),
    ("gopher.max_duplicate_paragraph_characters", "gopher", lambda k: with_duplicates(k, 100, "\n" * 9), 40, 41, 0.2),
    ("gopher.max_duplicate_lines", "pt", lambda k: with_duplicates(k, 1000, "\n"), 287, 288, 0.287),
    ("gopher.max_duplicate_line_characters", "gopher", lambda k: with_duplicates(k, 90, "\n"), 20, 21, 0.2),
    *(repeated_n_gram(f"gopher.max_top_{n}_gram", limit, n) for n, limit in ((2, 0.371), (3, 0.191), (4, 0.163))),
    *(repeated_n_gram(f"gopher.max_duplicate_{n}_gram", limit, n)
      for n, limit in ((5, 0.163), (6, 0.153), (7, 0.141), (8, 0.130), (9, 0.119), (10, 0.108))),
    ("fineweb.min_line_punctuation", "pt", lambda k: of_lines(k, 1000, "{}.", "{}. {},"), 77, 76, 0.077),
    ("fineweb.max_duplicate_line_characters", "pt", lambda k: with_duplicates(k, 100, "\n"), 10, 11, 0.1),
    ("fineweb.max_newline_ratio", "pt", lambda k: "casa\n" * k + " casa" * (1000 - k), 186, 187, 0.186),
]


def test_every_rule_stands_in_the_table():
    assert [rule.name for rule in RULES] == [row[0] for row in AT_LIMIT]


@pytest.mark.parametrize(("rule", "preset", "make", "at_limit", "beyond", "limit"), AT_LIMIT,
                         ids=[row[0] for row in AT_LIMIT])
def test_a_text_at_the_limit_stays_and_one_unit_beyond_goes(rule, preset, make, at_limit, beyond, limit):
    table, _, key = rule.partition(".")
    assert limits_of(read_preset(preset))[rule] == limit
    [(name, step)] = build_steps(only(preset, {table: {key: limit}}))
    assert name == "text_rules"
    kept, gone = document(make(at_limit)), step(document(make(beyond)))
    assert step(kept) is kept
    value = measures(make(at_limit), signs_of(read_preset(preset)), [rule])[rule]
    assert value == pytest.approx(limit, abs=1e-12)
    assert isinstance(gone, Dropped)
    assert (gone.rule, gone.limit) == (rule, limit)
    assert gone.value == pytest.approx(limit, rel=0.5)  # one unit away
    assert build_steps(only(preset, {table: {key: False}})) == []


def test_the_first_rule_that_is_broken_is_the_reason():
    [(_, step)] = build_steps(only("pt", {"gopher": {"min_words": 5, "min_mean_word_length": 5}}))
    assert step(document("a b c")).rule == "gopher.min_words"
    assert step(document("a b c d e")) == Dropped("gopher.min_mean_word_length", 1.0, 5.0)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_letters_with_accents_are_letters_in_both_forms(form):
    text = unicodedata.normalize(form, "não à é, às três da manhã; d’água e pôs-se")
    parts = TextParts(text, SIGNS)
    assert [token for token in parts.tokens if token not in ",;"] == "não à é às três da manhã d’água e pôs-se".split()
    measured = measures(text, SIGNS)
    assert measured["gopher.min_words"] == 10
    assert measured["gopher.min_alphabetic_words"] == 1
    assert measured["gopher.min_stop_words"] == 3  # é, da, e
    assert measured["gopher.min_mean_word_length"] == pytest.approx(3.1)


def test_a_word_keeps_the_marks_that_have_no_composed_form():
    assert TextParts("हिन्दी में लिखा e q̃a", SIGNS).tokens == ["हिन्दी", "में", "लिखा", "e", "q̃a"]


def test_numbers_and_rows_of_dots_are_one_token():
    assert TextParts("R$ 1.234,56 em 12/03 ........ 7, fim.Outro", SIGNS).tokens == [
        "R", "$", "1.234,56", "em", "12/03", "........", "7", ",", "fim", ".", "Outro"]


def test_overlapping_n_grams_are_counted_once():
    text = " ".join(["um", "dois"] * 20)  # 159 characters
    measured = measures(text, SIGNS)
    # counted are the five-grams at words 2, 7, 12 ... 32, by turns of 14 and 16 letters
    assert measured["gopher.max_duplicate_5_gram"] == (4 * 14 + 3 * 16) / 159
    assert measured["gopher.max_top_2_gram"] == 20 * 7 / 159


@given(st.text(max_size=200) | st.text("ab .\n-…#é", max_size=300))
@example("")
@example("\n\n \n")
@example("\u0301\u0301 \u200d")
@example("\U000e0100")
@settings(max_examples=300, deadline=None)
def test_shares_lie_between_nothing_and_all_whatever_the_text(text):
    for rule in RULES:
        value = measures(text, SIGNS, [rule.name])[rule.name]
        assert value >= 0
        assert value <= 1 or not rule.is_share, rule.name


@pytest.mark.parametrize("piece", ["a", "\n", "é", "e\u0301", "a ", "a b ", "#", ". ", "-", "a-", "a\n", " \t", "1.",
                                   "\u0301", "a b c d e f g h i j k l ", "\n\n \n", "…"])
def test_a_megabyte_of_the_same_takes_no_two_seconds(piece):
    text = piece * (1_000_000 // len(piece))
    assert any(cpu_seconds(measures, text, SIGNS) < processor(2) for _ in range(3))


@pytest.fixture(scope="module")
def datatrove_filters():
    pytest.importorskip("datatrove")
    from datatrove.pipeline.filters import gopher_quality_filter, gopher_repetition_filter
    return gopher_quality_filter, gopher_repetition_filter


def ascii_texts(number: int) -> list[str]:
    """Return texts with many repetitions: lower case, no blank lines but between paragraphs."""
    chosen = random.Random(4)
    lines = ["# " * 3 + "casa", "- um item", "- outro", "fim...", "o sol e a lua."]
    texts = []
    for _ in range(number):
        words = chosen.choices("casa de vento sol lua mar e o a barco 12 , . (".split(), k=chosen.randint(20, 150))
        made = [" ".join(words[start:start + 9]) for start in range(0, len(words), 9)]
        made += chosen.choices(lines, k=chosen.randint(0, 6))
        chosen.shuffle(made)
        texts.append("".join(line + chosen.choice(["\n", "\n", "\n\n"]) for line in made).strip())
    return texts


def test_repetitions_are_those_that_datatrove_measures(datatrove_filters):
    _, theirs = datatrove_filters
    splitter = theirs.GopherRepetitionFilter()
    for text in ascii_texts(150):
        parts, ours = TextParts(text, SIGNS), measures(text, SIGNS)
        found = splitter.paragraph_exp.split(text)
        number, characters = theirs.find_duplicates(found)
        assert ours["gopher.max_duplicate_paragraphs"] == number / len(found)
        assert ours["gopher.max_duplicate_paragraph_characters"] == characters / len(text)
        lines = text.replace("\n\n", "\n").split("\n")
        number, characters = theirs.find_duplicates(lines)
        assert ours["gopher.max_duplicate_lines"] == number / len(lines)
        assert ours["gopher.max_duplicate_line_characters"] == characters / len(text)
        for n in (2, 3, 4):
            grams = theirs.get_n_grams(parts.tokens, n)
            expected = theirs.find_top_duplicate(grams)
            if len(set(grams)) == len(grams):
                expected = 0  # datatrove calls what occurs once the most frequent
            assert ours[f"gopher.max_top_{n}_gram"] == min(1, expected / len(text))
        for n in range(5, 11):
            assert ours[f"gopher.max_duplicate_{n}_gram"] == theirs.find_all_duplicate(parts.tokens, n) / len(text)


def test_datatrove_keeps_a_text_at_the_limit_that_we_measure(datatrove_filters, monkeypatch):
    """Its filter tells no values: with our measure as its limit a text stays, with a hair less it goes."""
    from datatrove.data import Document as TheirDocument

    theirs, _ = datatrove_filters
    signs = LanguageSigns(frozenset(["casa", "sol"]), ("•", "-"), (".",))
    monkeypatch.setattr(theirs, "split_into_words", lambda text, _: TextParts(text, signs).tokens)
    off = dict.fromkeys(["min_doc_words", "max_doc_words", "min_avg_word_length", "max_avg_word_length", "min_stop_words",
                         "max_symbol_word_ratio", "max_bullet_lines_ratio", "max_ellipsis_lines_ratio",
                         "max_non_alpha_words_ratio"])
    pairs = [("min_doc_words", "gopher.min_words", 1), ("max_doc_words", "gopher.max_words", -1),
             ("min_avg_word_length", "gopher.min_mean_word_length", 1e-9),
             ("max_avg_word_length", "gopher.max_mean_word_length", -1e-9),
             ("max_bullet_lines_ratio", "gopher.max_bullet_lines", -1e-9),
             ("max_ellipsis_lines_ratio", "gopher.max_ellipsis_lines", -1e-9),
             ("min_stop_words", "gopher.min_stop_words", 1)]
    tried = dict.fromkeys((pair[0] for pair in pairs), 0)
    for text in (text.replace("\n\n", "\n") for text in ascii_texts(60)):  # it counts blank lines as lines, we do not
        ours = measures(text, signs)
        for key, rule, stricter in pairs:
            if ours[rule] <= 0:
                continue
            given = TheirDocument(text=text, id="1")
            assert theirs.GopherQualityFilter(stop_words=["casa", "sol"], **{**off, key: ours[rule]}).filter(given) is True
            assert theirs.GopherQualityFilter(stop_words=["casa", "sol"], **{**off, key: ours[rule] + stricter}
                                              ).filter(given) is not True
            tried[key] += 1
        symbols = max(ours["gopher.max_hash_ratio"], ours["gopher.max_ellipsis_ratio"])
        given = TheirDocument(text=text, id="1")
        if symbols:
            assert theirs.GopherQualityFilter(**{**off, "max_symbol_word_ratio": symbols}).filter(given) is True
            assert theirs.GopherQualityFilter(**{**off, "max_symbol_word_ratio": symbols - 1e-9}).filter(given) is not True
    assert min(tried.values()) > 10
