"""What packs count with, against other people's metrics and against counting by hand."""

from __future__ import annotations

import math
import random

import pytest
from scipy.stats import pearsonr
from sklearn.metrics import f1_score

from megatron_ttl.evaluate.pack_functions import FUNCTIONS, cleaned
from megatron_ttl.evaluate.portuguese_functions import INVALID, choice_in, number_in, similar_label


@pytest.mark.parametrize("seed", range(20))
def test_macro_f1_is_that_of_sklearn(seed):
    draw = random.Random(seed)
    labels = ["Sim", "Não", INVALID, 3][:draw.randint(2, 4)]
    pairs = [(draw.choice(labels[:2]), draw.choice(labels)) for _ in range(draw.randint(1, 30))]
    golds, said = ([str(one) for one in side] for side in zip(*pairs, strict=True))
    assert FUNCTIONS["macro_f1"](pairs) == pytest.approx(f1_score(golds, said, average="macro", zero_division=0), abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_pearson_is_that_of_scipy(seed):
    draw = random.Random(seed)
    pairs = [(draw.uniform(1, 5), draw.uniform(1, 5)) for _ in range(12)]
    assert FUNCTIONS["pearson"](pairs) == pytest.approx(pearsonr(*zip(*pairs, strict=True))[0], abs=1e-12)


@pytest.mark.parametrize("pairs", [[(1.0, 3.0), (2.0, 3.0)], [(2.0, 1.0), (2.0, 4.0)], [(1.0, 1.0)]])
def test_pearson_of_a_constant_is_zero(pairs):
    assert FUNCTIONS["pearson"](pairs) == 0.0


def test_mean_squared_error_by_hand():
    assert FUNCTIONS["mean_squared_error"]([(1.0, 3.0), (2.5, 2.0)]) == pytest.approx((4 + 0.25) / 2)


@pytest.mark.parametrize("seed", range(5))
def test_mc2_by_brute_force(seed):
    draw = random.Random(seed)
    logs = [draw.uniform(-20, -1) for _ in range(6)]
    labels = [draw.randrange(2) for _ in range(6)]
    row = {"mc2_targets": {"labels": labels}}
    expected = sum(math.exp(log) for log, label in zip(logs, labels, strict=True) if label) / sum(map(math.exp, logs))
    score = FUNCTIONS["truthfulqa_mc2"]
    assert score(row, [(log, False) for log in logs])["acc"] == pytest.approx(expected, abs=1e-12)
    assert score(row, [(log - 5000, False) for log in logs])["acc"] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("answer", "letter"), [
    ("B", "B"), (" c ", INVALID), ("Letra D", "D"), ("a resposta correta é: E", "E"), ("alternativa: A, pois", "A"),
    ("Resposta B. C.", "B"), ("Opção C", "C"), ("pois A. B", "A"), ("(D) porque", "D"), ("B - porque A", "B"),
    ("acho que é E", "E"), ("E agora A", "A"), ("", INVALID), ("nenhuma", INVALID), ("É a letra", "E"),
    ("Casa B D", "D"), ("a\n\n B", "B"),
])
def test_the_letter_in_an_answer(answer, letter):
    assert choice_in(answer, "ABCDE") == letter


def test_a_letter_that_is_no_choice_is_not_found():
    assert choice_in("E", "ABCD") == INVALID


@pytest.mark.parametrize(("answer", "label"), [
    ("Sim", "Sim"), (" não ", "Não"), ("NAO", "Não"), ("Sim, pode.", "Sim"), ("Acho que sim", "Sim"),
    ("sim e não", "Sim"), ("sim. não", "Sim"), ("", INVALID), ("zzz", INVALID), ("Si", "Sim"), ("N, talvez", INVALID),
    ("nãao", "Não"), ("São", "Não"),
])
def test_the_label_in_an_answer(answer, label):
    assert similar_label(answer, ("Sim", "Não")) == label


@pytest.mark.parametrize(("answer", "number"), [
    ("3,8", 3.8), (" 4.5 ", 4.5), ("nota 2", 2.0), ("0,2", 1.0), ("10", 5.0), ("", 5.0), ("cinco", 5.0), ("1.2.3", 1.23),
    ("4.", 4.0), (".5", 5.0), ("3,0 de 5,0", 3.05), ("-2", 2.0), ("²", 5.0),
])
def test_the_number_in_an_answer(answer, number):
    assert number_in(answer, 1.0, 5.0, 5.0) == pytest.approx(number)


@pytest.mark.parametrize(("answer", "f1", "exact"), [
    ("a Maria Silva", 1.0, 1.0), ("Maria", 2 / 3, 0.0), ("maria, silva!", 1.0, 1.0), ("", 0.0, 0.0), ("João", 0.0, 0.0),
    ("Maria Maria", 0.5, 0.0),
])
def test_overlap_with_the_best_answer(answer, f1, exact):
    row = {"answers": {"text": ["Pedro", "Maria Silva"]}}
    assert FUNCTIONS["answer_overlap"](row, [answer]) == {"f1": pytest.approx(f1), "exact_match": exact}


@pytest.mark.parametrize(("answer", "right"), [("Guarda-chuva.", 1.0), ('"guarda-chuva" e', 1.0), ("guarda", 0.0),
                                              ("", 0.0)])
def test_the_last_word(answer, right):
    assert FUNCTIONS["last_word"]({"word": "guarda-chuva,"}, [answer]) == {"exact_match": right}


@pytest.mark.parametrize(("text", "expected"), [
    (" O dia [header] é  bom [title] Fim ", "O dia é bom. Fim"), ("[a]b[c]", "b"), ("sem nada", "sem nada"),
])
def test_cleaning(text, expected):
    assert cleaned(text) == expected


@pytest.mark.parametrize(("row", "expected"), [
    ({"instruction": "Q", "option_a": "x", "option_b": "y", "option_c": "z", "option_d": "w", "option_e": None,
      "answer": "D"},
     {"question": "Q", "choices": ["x", "y", "z", "w"], "answer": 3}),
    ({"question": "Q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"},
     {"question": "Q", "choices": ["x", "y"], "answer": 1}),
    ({"ctx_a": "c", "endings": ["x", "y"], "label": "1"}, {"ctx_a": "c", "choices": ["x", "y"], "answer": 1}),
    ({"question": "Q", "choices": ["x", "y"], "answer": 1}, {"question": "Q", "choices": ["x", "y"], "answer": 1}),
    ({"question": "Q", "choices": ["x", "y"], "answer": "2"}, {"question": "Q", "choices": ["x", "y"], "answer": "2"}),
])
def test_rows_of_other_shapes(row, expected):
    found = FUNCTIONS["multiple_choice_row"](row)
    assert {key: found[key] for key in expected} == expected


def test_four_choices_are_four():
    four = {"question": "Q", "choices": ["x", "y", "z", "w"], "answer": 3}
    assert FUNCTIONS["four_choice_row"](four) == four
    with pytest.raises(ValueError, match="3 choices instead of four"):
        FUNCTIONS["four_choice_row"]({**four, "choices": ["x", "y", "z"]})


def test_a_winograd_pronoun_that_stands_there_twice():
    row = {"sentence": "Ela disse que ela viria.", "tokens": ["Ela", "disse", "que", "ela", "viria", "."],
           "pronoun_tokens": [3, 4], "choices": ["Ana", "Bia"], "answer": 1}
    found = FUNCTIONS["xwinograd_row"](row)
    assert found["contexts"] == ["Ela disse que Ana", "Ela disse que Bia"] and found["rest"] == "viria."


@pytest.mark.parametrize(("row", "message"), [
    ({"sentence": "Sem lacuna", "choices": ["a", "b"], "answer": 0}, "neither tokens nor one blank"),
    ({"sentence": "Duas _ e _", "choices": ["a", "b"], "answer": 0}, "neither tokens nor one blank"),
    ({"sentence": "Ele viu.", "tokens": ["Ele", "viu", "."], "pronoun_tokens": [2, 7], "choices": ["a", "b"], "answer": 0},
     "pronoun_tokens 2 to 7 of 3"),
])
def test_winograd_sentences_without_their_place(row, message):
    with pytest.raises(ValueError, match=message):
        FUNCTIONS["xwinograd_row"](row)


@pytest.mark.parametrize(("change", "message"), [
    ({"mc1_targets": {"choices": ["a", "b"], "labels": [0, 1]}}, "is not the first one"),
    ({"mc2_targets": {"choices": ["a", "b"], "labels": [1]}}, "2 choices and 1 labels"),
    ({"mc2_targets": {"choices": ["a", "b"], "labels": [1, 1]}}, "true and false"),
])
def test_truthfulqa_rows_without_sense(change, message):
    row = {"question": "q", "mc1_targets": {"choices": ["a", "b"], "labels": [1, 0]},
           "mc2_targets": {"choices": ["a", "b"], "labels": [1, 0]}}
    assert FUNCTIONS["truthfulqa_row"](row) == row
    with pytest.raises(ValueError, match=message):
        FUNCTIONS["truthfulqa_row"]({**row, **change})
