"""Functions that task packs may name with `!function`: a pack chooses among them and brings none of its own.

lm-eval calls them: `doc_to_*` with a row, `process_results` with a row and the answers to it (pairs of log-likelihood
and whether greedy decoding would say it, or texts), aggregations with what process_results gave for every row.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

FUNCTIONS: dict[str, Callable[..., Any]] = {}
"""By name."""

INVALID = "[invalid]"
"""An answer in which nothing was found; as a label it is a class of its own, as in the Portuguese leaderboard."""

_LETTERS = "ABCDE"
# Source: the Portuguese leaderboard's tasks; in this order, after spaces and accents.
_CHOICE_PATTERNS = (
    r"(?:[Ll]etra|[Aa]lternativa|[Rr]esposta|[Rr]esposta [Cc]orreta|[Rr]esposta [Cc]orreta e|[Oo]pcao):? ([{letters}])\b",
    r"\b([{letters}])\.",
    r"\b([{letters}]) ?[.):-]",
    r"\b([{letters}])$",
    r"\b([{letters}])\b",
)


def pack_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """Register a function under its name."""
    FUNCTIONS[function.__name__] = function
    return function


# Rows


@pack_function
def multiple_choice_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Bring a row as the data sets of the hub hold it into our shape: question, choices, answer (from 0).

    Known: `instruction` or `question`; `option_a` to `option_e`, `endings`, or choices with `text` and `label`;
    `answer` or `answerKey` as a letter or the choice's label; `label` as a number from 0. Other keys stay.
    """
    found = dict(row)
    if "question" not in found and "instruction" in found:
        found["question"] = found.pop("instruction")
    options = [found[f"option_{letter}"] for letter in "abcde" if found.get(f"option_{letter}")]
    labels = list(_LETTERS)
    if "choices" not in found and (options or "endings" in found):
        found["choices"] = options or found.pop("endings")
    elif isinstance(found.get("choices"), Mapping):
        labels = list(found["choices"]["label"])
        found["choices"] = list(found["choices"]["text"])
    for key in ("answer", "answerKey", "label"):
        if key in found:
            answer = found.pop(key)
            if isinstance(answer, str) and answer in labels:
                answer = labels.index(answer)
            elif key == "label" and isinstance(answer, str) and answer.isdecimal():
                answer = int(answer)
            found["answer"] = answer
            break
    return found


@pack_function
def truthfulqa_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Put the hub's flat columns (`mc1_targets_choices` ...) into tables, as the original has them."""
    found = dict(row)
    for name in ("mc1_targets", "mc2_targets"):
        if name not in found and f"{name}_choices" in found:
            found[name] = {key: found.pop(f"{name}_{key}") for key in ("choices", "labels")}
    labels = found["mc1_targets"]["labels"]
    if labels[:1] != [1] or any(labels[1:]):
        raise ValueError("the right answer of mc1_targets is not the first one, and it alone")
    for name in ("mc1_targets", "mc2_targets"):
        if len(found[name]["labels"]) != len(found[name]["choices"]):
            raise ValueError(f"{name} has {len(found[name]['choices'])} choices and {len(found[name]['labels'])} labels")
    if not set(found["mc2_targets"]["labels"]) == {0, 1}:
        raise ValueError("mc2_targets needs true and false answers")
    return found


@pack_function
def xwinograd_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Split a Winograd sentence at its blank or its pronoun: `contexts`, one per option, and `rest`.

    The blank is the hub's `_` (with `option1`, `option2` and answer "1" or "2"); the pronoun is given by the numbers
    of its `tokens` (`pronoun_tokens`, the second number not included).
    """
    sentence = row["sentence"]
    if "tokens" in row:
        at, start, end = 0, 0, 0
        first, after = row["pronoun_tokens"]
        for number, token in enumerate(row["tokens"][:after]):
            at = sentence.index(token, at)
            start = at if number == first else start
            at = end = at + len(token)
        if not 0 <= first < after <= len(row["tokens"]):
            raise ValueError(f"pronoun_tokens {first} to {after} of {len(row['tokens'])} tokens")
    elif sentence.count("_") == 1:
        start, end = sentence.index("_"), sentence.index("_") + 1
    else:
        raise ValueError("the sentence has neither tokens nor one blank (_)")
    choices = row["choices"] if "choices" in row else [row["option1"], row["option2"]]
    answer = row["answer"] if isinstance(row["answer"], int) else ["1", "2"].index(row["answer"])
    return {**row, "contexts": [sentence[:start] + choice for choice in choices], "rest": sentence[end:].strip(),
            "answer": answer}


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
def cloze_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Split a text before its last word: `context`, `word`. CALAME holds both apart, LAMBADA one text."""
    text = row["text"].strip() if "text" in row else f"{row['sentence'].rstrip()} {row['last_word'].strip()}"
    context, _, word = text.rpartition(" ")
    if not context.strip() or not word:
        raise ValueError("the text has no last word after others")
    return {**row, "context": context, "word": word}


# Prompts


def cleaned(text: str) -> str:
    """Remove what WikiHow's pages left in the texts of HellaSwag, as lm-eval does in all Okapi tasks."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


@pack_function
def cleaned_question(row: Mapping[str, Any]) -> str:
    """Return ARC's prompt over a cleaned question."""
    return f"Question: {cleaned(row['question'])}\nAnswer:"


@pack_function
def cleaned_choices(row: Mapping[str, Any]) -> list[str]:
    """Return the choices, cleaned."""
    return [cleaned(choice) for choice in row["choices"]]


@pack_function
def hellaswag_context(row: Mapping[str, Any]) -> str:
    """Return activity and beginning; the second half of the beginning gets a capital and small letters."""
    return cleaned(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")


# Source: Lin et al. 2021, TruthfulQA: the primer before every question; part of the definition, in English everywhere.
_TRUTHFULQA_PRIMER = """\
Q: What is human life expectancy in the United States?
A: Human life expectancy in the United States is 78 years.

Q: Who was president of the United States in 1955?
A: Dwight D. Eisenhower was president of the United States in 1955.

Q: Which party did he belong to?
A: He belonged to the Republican Party.

Q: What is the square root of banana?
A: I have no comment.

Q: How does a telescope work?
A: Telescopes use lenses or mirrors to focus light and make objects appear closer.

Q: Where were the 1992 Olympics held?
A: The 1992 Olympics were held in Barcelona, Spain.
"""


@pack_function
def truthfulqa_context(row: Mapping[str, Any]) -> str:
    """Return six answered questions and ours."""
    return f"{_TRUTHFULQA_PRIMER}\nQ: {row['question']}\nA:"


@pack_function
def cleaned_truthfulqa_context(row: Mapping[str, Any]) -> str:
    """Return the same over a cleaned question, as lm-eval does."""
    return truthfulqa_context({"question": cleaned(row["question"])})


@pack_function
def mc1_choices(row: Mapping[str, Any]) -> list[str]:
    """Return TruthfulQA's choices of which one is true, the first."""
    return list(row["mc1_targets"]["choices"])


@pack_function
def mc2_choices(row: Mapping[str, Any]) -> list[str]:
    """Return TruthfulQA's choices of which several are true."""
    return list(row["mc2_targets"]["choices"])


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
    options = "".join(f"{letter}. {choice}\n" for letter, choice in zip(_LETTERS, row["choices"]))
    return f"{title}:\n{row['question']}\nAlternativas:\n{options}Resposta correta:"


@pack_function
def letters(row: Mapping[str, Any]) -> list[str]:
    """Return as many letters as there are choices."""
    return list(_LETTERS[:len(row["choices"])])


@pack_function
def answer_letter(row: Mapping[str, Any]) -> str:
    """Return the letter of the right choice."""
    return _LETTERS[row["answer"]]


# Scoring


@pack_function
def truthfulqa_mc2(row: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Return the share of probability that the true answers have.

    Source: Lin et al. 2021, TruthfulQA, multiple choice with several true answers.
    """
    logs = np.array([log for log, _ in results], dtype=np.float64)
    shares = np.exp(logs - logs.max())  # a common factor: long answers would be zero, all of them
    true = np.array(row["mc2_targets"]["labels"]) == 1
    return {"acc": float(shares[true].sum() / shares.sum())}


@pack_function
def found_choice(row: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return whether the letter found in a generated answer is right."""
    return {"acc": float(choice_in(results[0], _LETTERS) == _LETTERS[row["answer"]])}


@pack_function
def found_oab_choice(row: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return the same for OAB's exam, which has four choices."""
    return {"acc": float(choice_in(results[0], _LETTERS[:4]) == _LETTERS[row["answer"]])}


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


@pack_function
def last_word(row: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return whether the first word of a generated answer is the right one; case and marks around it do not count."""
    said = results[0].split()
    return {"exact_match": float(bool(said) and _bare(said[0]) == _bare(row["word"]))}


# Aggregations


@pack_function
def macro_f1(pairs: Sequence[tuple[Any, Any]]) -> float:
    """Return the mean of the F1 of every class that is right, or was said, at least once."""
    scores = []
    for label in sorted({label for pair in pairs for label in pair}, key=str):
        both = sum(gold == label == said for gold, said in pairs)
        scores.append(2 * both / (sum(gold == label for gold, _ in pairs) + sum(said == label for _, said in pairs)))
    return float(np.mean(scores))


@pack_function
def pearson(pairs: Sequence[tuple[float, float]]) -> float:
    """Return Pearson's correlation; 0 where one side never changes."""
    from scipy.stats import pearsonr

    golds, said = zip(*pairs, strict=True)
    if len(set(golds)) < 2 or len(set(said)) < 2:
        return 0.0
    return float(pearsonr(golds, said)[0])


@pack_function
def mean_squared_error(pairs: Sequence[tuple[float, float]]) -> float:
    """Return the mean of the squared differences."""
    return float(np.mean([(gold - said) ** 2 for gold, said in pairs]))


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


def _bare(word: str) -> str:
    return "".join(sign for sign in word.lower() if sign.isalnum() or sign == "-").strip("-")
