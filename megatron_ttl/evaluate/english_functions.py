"""Functions that the English packs name: rows, prompts and scores that lm-eval's keys alone cannot express."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from megatron_ttl.evaluate.code_execution import PASSED, judge_completions, pass_at_k
from megatron_ttl.evaluate.drop_metric import best_drop_scores

Row = Mapping[str, Any]


def lettered_choices(row: Row) -> dict[str, Any]:
    """Bring a row of ARC or OpenBookQA into `question`, `choices`, `answer`, from its authors' file or from the hub."""
    found = dict(row)
    asked = found.get("question", found.get("question_stem"))
    if isinstance(asked, Mapping):  # the authors' file
        found["question"], offered = asked.get("stem"), asked.get("choices")
    else:
        found["question"], offered = asked, found.get("choices")
    if isinstance(offered, Mapping):
        offered = [{"label": label, "text": text} for label, text in zip(offered["label"], offered["text"], strict=True)]
    if "answerKey" in found and isinstance(offered, Sequence):
        found["choices"] = [one["text"] for one in offered]
        found["answer"] = [one["label"] for one in offered].index(found["answerKey"].strip())
    return found


def whole_label(row: Row) -> dict[str, Any]:
    """Turn a label that is a text or true and false into a number."""
    found = dict(row)
    label = found.get("label", found.pop("answer", None))
    if isinstance(label, (bool, str)) and label != "":
        found["label"] = int(label)
    return found


def drop_answers(row: Row) -> dict[str, Any]:
    """Bring a row of DROP into `passage`, `question`, `answers`: every right answer is a list of spans, none twice."""
    found = dict(row)
    if "answer" in found and "answers" not in found:
        others = found.get("validated_answers") or {}
        if isinstance(others, Mapping):  # the hub's columns
            others = [dict(zip(others, values, strict=True)) for values in zip(*others.values(), strict=True)]
        found["answers"] = list(map(list, dict.fromkeys(_spans(answer) for answer in [found["answer"], *others])))
    return found


def _spans(answer: Row) -> tuple[str, ...]:
    if answer["number"] != "":
        return (str(answer["number"]),)
    if answer["spans"]:
        return tuple(answer["spans"])
    return (" ".join(answer["date"][part] for part in ("day", "month", "year")).strip(),)


def winogrande_option(row: Row) -> int:
    """Return which option is right; lm-eval then takes the choices as contexts."""
    return int(row["answer"]) - 1


def winogrande_contexts(row: Row) -> list[str]:
    """Return the sentence up to the gap, filled with either option."""
    before = row["sentence"][: row["sentence"].index("_")]
    return [before + row["option1"], before + row["option2"]]


def winogrande_suffix(row: Row) -> str:
    """Return the sentence after the gap, which is what is scored (partial evaluation, Trinh and Le 2018)."""
    return row["sentence"][row["sentence"].index("_") + 1:].strip()


def drop_results(row: Row, results: Sequence[str]) -> dict[str, float]:
    """Score an answer to DROP."""
    exact, f1 = best_drop_scores(results[0], row["answers"])
    return {"em": exact, "f1": f1}


def single_answers(rows: Iterable[Row]) -> list[Row]:
    """Keep questions of DROP whose answers all say the same, the only ones that InstructEval asks."""
    return [row for row in rows if len({span.strip() for answer in row["answers"] for span in answer}) == 1]


def drop_prefix_results(row: Row, results: Sequence[str]) -> dict[str, float]:
    """Score an answer to DROP as InstructEval does, and as DROP does."""
    begins = results[0].strip().startswith(row["answers"][0][0].strip())
    return {"acc": float(begins), **drop_results(row, results)}


def letter_prefix_results(row: Row, results: Sequence[str]) -> dict[str, float]:
    """Whether an answer begins with the right letter."""
    return {"acc": float(results[0].strip().startswith("ABCD"[row["answer"]]))}


def subset_prefix_results(row: Row, results: Sequence[str]) -> dict[str, tuple[str, float]]:
    """Whether an answer begins with the right one, and to which subset the question belongs."""
    return {"acc": (row["subset"], float(results[0].strip().startswith(row["target"])))}


def mean_over_subsets(items: Iterable[tuple[str, float]]) -> float:
    """Return the mean of the subsets' means."""
    subsets: dict[str, list[float]] = {}
    for subset, value in items:
        subsets.setdefault(subset, []).append(value)
    return fmean(map(fmean, subsets.values()))


def run_completions(answers: Iterable[Sequence[str]], rows: Iterable[Row]) -> list[list[str]]:
    """Run every answer to HumanEval, all items at once; what remains of an answer is how its program ended."""
    return judge_completions(list(rows), [list(own) for own in answers])


def run_first_paragraphs(answers: Iterable[Sequence[str]], rows: Iterable[Row]) -> list[list[str]]:
    """Run what stands before the first empty line of every answer, odd indentation made even, as InstructEval does."""
    return run_completions([[_even_indentation(answer).lstrip("\n").split("\n\n")[0] for answer in own]
                            for own in answers], rows)


def _even_indentation(text: str) -> str:
    return "\n".join(" " * ((len(line) - len(line.lstrip(" "))) % 2) + line for line in text.split("\n"))


def pass_results(row: Row, results: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return pass@1 of how the programs of one item ended."""
    return _passes(results[0], (1,))


def pass_10_results(row: Row, results: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return pass@1 and pass@10 of how the programs of one item ended."""
    return _passes(results[0], (1, 10))


def _passes(verdicts: Sequence[str], asked: Iterable[int]) -> dict[str, float]:
    return {f"pass@{k}": pass_at_k(len(verdicts), verdicts.count(PASSED), k) for k in asked}


ENGLISH_FUNCTIONS: dict[str, Callable[..., Any]] = {function.__name__: function for function in (
    lettered_choices, whole_label, drop_answers, winogrande_option, winogrande_contexts, winogrande_suffix, drop_results,
    single_answers, drop_prefix_results, letter_prefix_results, subset_prefix_results, mean_over_subsets, run_completions,
    run_first_paragraphs, pass_results, pass_10_results)}
