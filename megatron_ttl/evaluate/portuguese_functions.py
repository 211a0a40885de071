"""Functions for Portuguese packs: ASSIN 2, exams that are answered with a letter, answers that are searched for a label."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_ttl.evaluate.pack_functions import LETTERS, pack_function

INVALID = "[invalid]"
"""An answer in which nothing was found; as a label it is a class of its own, as in the Portuguese leaderboard."""

# Source: the Portuguese leaderboard's tasks; in this order, after spaces and accents.
_CHOICE_PATTERNS = (
    r"(?:[Ll]etra|[Aa]lternativa|[Rr]esposta|[Rr]esposta [Cc]orreta|[Rr]esposta [Cc]orreta e|[Oo]pcao):? ([{letters}])\b",
    r"\b([{letters}])\.",
    r"\b([{letters}]) ?[.):-]",
    r"\b([{letters}])$",
    r"\b([{letters}])\b",
)


@pack_function
def assin2_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Give the judgement its name, which is a number on the hub (0 none, 1 entailment), and the pair its id."""
    found = dict(row)
    if "id" not in found and "sentence_pair_id" in found:
        found["id"] = found["sentence_pair_id"]
    judgement = found.get("entailment_judgment")
    if type(judgement) is int:
        found["entailment_judgment"] = ("None", "Entailment")[judgement] if judgement in (0, 1) else judgement
    return found


@pack_function
def assin2_sentences(row: Mapping[str, Any]) -> list[str]:
    """Return the two sentences of which lm-eval asks which is likelier: without and with entailment."""
    return [f"{row['premise']}, certo? {word}, {row['hypothesis']}" for word in ("Não", "Sim")]


@pack_function
def decimal_comma(row: Mapping[str, Any]) -> str:
    """Return ASSIN 2's similarity as Portuguese writes it: 3,8."""
    return str(row["relatedness_score"]).replace(".", ",")


@pack_function
def lettered_question(row: Mapping[str, Any]) -> str:
    """Return question and lettered options as the Portuguese leaderboard asks for a letter."""
    return _lettered("Pergunta", row)


@pack_function
def lettered_bar_question(row: Mapping[str, Any]) -> str:
    """Return the same under the word that OAB's exam uses."""
    return _lettered("Questão", row)


def _lettered(title: str, row: Mapping[str, Any]) -> str:
    options = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, row["choices"]))
    return f"{title}:\n{row['question']}\nAlternativas:\n{options}Resposta correta:"


@pack_function
def found_choice(row: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return whether the letter found in a generated answer is right."""
    return {"acc": float(choice_in(results[0], LETTERS) == LETTERS[row["answer"]])}


@pack_function
def found_oab_choice(row: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return the same for OAB's exam, which has four choices."""
    return {"acc": float(choice_in(results[0], LETTERS[:4]) == LETTERS[row["answer"]])}


def choice_in(answer: str, letters: str) -> str:
    """Return the letter that a generated answer chooses, or INVALID."""
    text = without_accents(" ".join(answer.split()))
    if len(text) == 1 and text in letters:
        return text
    for pattern in _CHOICE_PATTERNS:
        if match := re.search(pattern.replace("{letters}", letters), text):
            return match[1]
    return INVALID


@pack_function
def found_yes_or_no(row: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Compare Sim or Não in a generated answer with the row: `label`, or ASSIN 2's judgement."""
    right = row["label"] == 1 if "label" in row else row["entailment_judgment"] == "Entailment"
    gold, said = "Sim" if right else "Não", similar_label(results[0], ("Sim", "Não"))
    return {"f1_macro": (gold, said), "acc": float(gold == said)}


@pack_function
def portuguese_sentiment(row: Mapping[str, Any]) -> str:
    """Return TweetSentBR's label in Portuguese."""
    return {"Positive": "Positivo", "Negative": "Negativo"}.get(row["label"], "Neutro")


@pack_function
def found_sentiment(row: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Compare Positivo, Neutro or Negativo in a generated answer with the row's label."""
    gold, said = portuguese_sentiment(row), similar_label(results[0], ("Positivo", "Neutro", "Negativo"))
    return {"f1_macro": (gold, said), "acc": float(gold == said)}


def similar_label(answer: str, labels: Sequence[str]) -> str:
    """Return the label that a generated answer names or nearly names, or INVALID.

    Case and accents do not count. First the whole answer, then the one label inside of it, then the label that
    is nearest to its beginning, if half of the letters agree.
    """
    plain = [without_accents(label.strip().lower()) for label in labels]
    text = without_accents(answer.strip().lower())
    if not text:
        return INVALID
    if text in plain:
        return labels[plain.index(text)]
    inside = [number for number, label in enumerate(plain) if label in text]
    if len(inside) == 1:
        return labels[inside[0]]
    beginning = re.split(r"[.,;:()\[\]\n]", text)[0][:max(map(len, plain))]
    near = [1 - _changes(beginning, label) / max(len(beginning), len(label)) for label in plain]
    return labels[near.index(max(near))] if max(near) >= 0.5 else INVALID


@pack_function
def found_number(row: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Compare the number in a generated answer with ASSIN 2's similarity, as the Portuguese leaderboard does."""
    pair = (float(row["relatedness_score"]), number_in(results[0], 1.0, 5.0, fallback=5.0))
    return {"pearson": pair, "mse": pair}


def number_in(answer: str, least: float, most: float, fallback: float) -> float:
    """Return the number that the digits of a generated answer make, within bounds; a comma or a dot parts decimals."""
    digits = re.sub(r"[^0-9.]", "", answer.replace(",", "."))
    whole, dot, decimals = digits.partition(".")
    if match := re.search(r"[0-9]\.[0-9]", digits):  # the first dot between digits counts, other dots do not
        whole, dot, decimals = digits[:match.start() + 1], ".", digits[match.start() + 2:]
    elif dot:
        whole, decimals = digits, ""
    whole, decimals = whole.replace(".", ""), decimals.replace(".", "")
    return min(max(float(f"{whole}.{decimals or 0}"), least), most) if whole else fallback


@pack_function
def first_number(row: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Compare the first number from 1 to 5 in a generated answer with ASSIN 2's similarity, as lm-eval does; 3 if none."""
    match = re.search(r"\b[1-5](?:[.,]\d+)?\b", results[0].strip())
    said = min(float(match[0].replace(",", ".")), 5.0) if match else 3.0
    return {"pearsonr": (float(row["relatedness_score"]), said)}


@pack_function
def answer_overlap(row: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return exact match and F1 over words against the best of the given answers.

    Source: Rajpurkar et al. 2016, SQuAD; articles of Portuguese instead of English ones do not count.
    """
    said = _words(results[0])
    golds = [_words(text) for text in row["answers"]["text"]]
    return {"f1": max(_overlap(said, gold) for gold in golds), "exact_match": float(said in golds)}


def without_accents(text: str) -> str:
    """Return a text without its accents."""
    return "".join(sign for sign in unicodedata.normalize("NFKD", text) if not unicodedata.combining(sign))


def _changes(a: str, b: str) -> int:
    """Count the letters changed, added or dropped (Levenshtein's distance)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def _words(text: str) -> list[str]:
    bare = "".join(sign for sign in text.lower() if not unicodedata.category(sign).startswith("P"))
    return [word for word in bare.split() if word not in {"o", "a", "os", "as", "um", "uma", "uns", "umas"}]


def _overlap(said: Sequence[str], gold: Sequence[str]) -> float:
    shared = sum(min(said.count(word), gold.count(word)) for word in set(said))
    return 2 * shared / (len(said) + len(gold)) if said or gold else 1.0
