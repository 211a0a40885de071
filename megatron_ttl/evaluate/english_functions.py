"""Functions that the English packs name: rows, prompts and scores that lm-eval's keys alone cannot express."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from megatron_ttl.evaluate.code_execution import PASSED, judge_completions, pass_at_k, require_runnable
from megatron_ttl.evaluate.drop_metric import best_drop_scores
from megatron_ttl.evaluate.pack_functions import multiple_choice_row, pack_function

Row = Mapping[str, Any]


@pack_function
def boolq_row(row: Row) -> dict[str, Any]:
    """Give the answer its name, and a number where it is true or false."""
    found = dict(row)
    if "answer" not in found and "label" in found:
        found["answer"] = found.pop("label")
    if isinstance(found.get("answer"), bool):
        found["answer"] = int(found["answer"])
    return found


@pack_function
def piqa_row(row: Row) -> dict[str, Any]:
    """Put the two solutions into one list."""
    found = dict(row)
    if "choices" not in found and {"sol1", "sol2"} <= found.keys():
        found["choices"] = [found.pop("sol1"), found.pop("sol2")]
    return multiple_choice_row(found)


@pack_function
def drop_row(row: Row) -> dict[str, Any]:
    """Bring a row of DROP into `passage`, `question`, `answers`: every right answer is a list of spans, none twice."""
    found = dict(row)
    if "answer" in found and "answers" not in found:
        others = found.get("validated_answers") or {}
        if isinstance(others, Mapping):  # the hub's columns
            others = [dict(zip(others, values, strict=True)) for values in zip(*others.values(), strict=True)]
        found["answers"] = list(map(list, dict.fromkeys(_spans(answer) for answer in [found["answer"], *others])))
    answers = found["answers"]
    if not answers or not all(spans and all(isinstance(span, str) for span in spans) for spans in answers):
        raise ValueError("answers must hold lists of texts, at least one with at least one")
    return found


def _spans(answer: Row) -> tuple[str, ...]:
    if answer["number"] != "":
        return (str(answer["number"]),)
    if answer["spans"]:
        return tuple(answer["spans"])
    return (" ".join(answer["date"][part] for part in ("day", "month", "year")).strip(),)


@pack_function
def drop_results(row: Row, results: Sequence[str]) -> dict[str, float]:
    """Score an answer to DROP."""
    exact, f1 = best_drop_scores(results[0], row["answers"])
    return {"em": exact, "f1": f1}


@pack_function
def single_answers(rows: Iterable[Row]) -> list[Row]:
    """Keep questions of DROP whose answers all say the same, the only ones that InstructEval asks."""
    return [row for row in rows if len({span.strip() for answer in row["answers"] for span in answer}) == 1]


@pack_function
def drop_prefix_results(row: Row, results: Sequence[str]) -> dict[str, float]:
    """Score an answer to DROP as InstructEval does, and as DROP does."""
    begins = results[0].strip().startswith(row["answers"][0][0].strip())
    return {"acc": float(begins), **drop_results(row, results)}


@pack_function
def letter_prefix_results(row: Row, results: Sequence[str]) -> dict[str, float]:
    """Whether an answer begins with the right letter."""
    return {"acc": float(results[0].strip().startswith("ABCD"[row["answer"]]))}


@pack_function
def subset_prefix_results(row: Row, results: Sequence[str]) -> dict[str, tuple[str, float]]:
    """Whether an answer begins with the right one, and to which subset the question belongs."""
    return {"acc": (row["subset"], float(results[0].strip().startswith(row["target"])))}


@pack_function
def mean_over_subsets(items: Iterable[tuple[str, float]]) -> float:
    """Return the mean of the subsets' means."""
    subsets: dict[str, list[float]] = {}
    for subset, value in items:
        subsets.setdefault(subset, []).append(value)
    return fmean(map(fmean, subsets.values()))


@pack_function
def runnable_problems(rows: Iterable[Row]) -> list[Row]:
    """Return HumanEval's problems; where programs cannot be run, say so now and not after all answers are generated."""
    found = list(rows)
    require_runnable(found)
    return found


@pack_function
def run_completions(answers: Iterable[Sequence[str]], rows: Iterable[Row]) -> list[list[str]]:
    """Run every answer to HumanEval, all items at once; what remains of an answer is how its program ended."""
    return judge_completions(list(rows), [list(own) for own in answers])


@pack_function
def run_first_paragraphs(answers: Iterable[Sequence[str]], rows: Iterable[Row]) -> list[list[str]]:
    """Run what stands before the first empty line of every answer, odd indentation made even, as InstructEval does."""
    return run_completions([[_even_indentation(answer).lstrip("\n").split("\n\n")[0] for answer in own]
                            for own in answers], rows)


def _even_indentation(text: str) -> str:
    return "\n".join(" " * ((len(line) - len(line.lstrip(" "))) % 2) + line for line in text.split("\n"))


@pack_function
def pass_results(row: Row, results: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return pass@1 of how the programs of one item ended."""
    return _passes(results[0], (1,))


@pack_function
def pass_10_results(row: Row, results: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return pass@1 and pass@10 of how the programs of one item ended."""
    return _passes(results[0], (1, 10))


def _passes(verdicts: Sequence[str], asked: Iterable[int]) -> dict[str, float]:
    return {f"pass@{k}": pass_at_k(len(verdicts), verdicts.count(PASSED), k) for k in asked}

