"""The English packs ask and count what lm-eval's own tasks ask and count, and what InstructEval's code asks."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import harness_tasks
import pytest
from english_items import DROP, ITEMS, MMLU, PROBLEMS

from megatron_ttl.errors import ConfigError, DataError
from megatron_ttl.evaluate import english_functions
from megatron_ttl.evaluate.packs import find_tasks
from megatron_ttl.evaluate.task import Task

PLACES = {"hellaswag": "hellaswag/hellaswag", "openbookqa": "openbookqa/openbookqa", "winogrande": "winogrande/default",
          "arc_easy": "arc/arc_easy", "arc_challenge": "arc/arc_challenge", "boolq": "super_glue/boolq/default",
          "piqa": "piqa/piqa", "drop": "drop/default", "humaneval": "humaneval/humaneval",
          "mmlu": "mmlu/default/mmlu_high_school_physics", "bbh_fewshot": "bbh/fewshot/boolean_expressions"}
UNFETCHED = {"functions": False, "unsafe_code": False, "metric_list": None, "filter_list": None}
"""Without what lm-eval's humaneval fetches from the hub when it is only looked at: its metric."""
RENAMED = {"question_stem": "question"}


def written(folder: Path, **files: list[dict[str, Any]]) -> dict[str, Task]:
    """Write data files (`__` in a name stands for a dot) and return the tasks over them."""
    for name, rows in files.items():
        text = "".join(json.dumps({RENAMED.get(key, key): value for key, value in row.items()}) + "\n" for row in rows)
        (folder / f"{name.replace('__', '.')}.jsonl").write_text(text)
    return find_tasks(data=folder)


def ours(task: Task) -> Any:
    process = task.config.get("process_docs", list)
    config = {key: value for key, value in task.config.items() if key != "process_docs"}
    splits = {name: process(rows) for name, rows in task.load().splits.items()}
    return harness_tasks.ours(config, splits, task.demonstrations_column)


def theirs(name: str, rows: list[dict[str, Any]], demonstrations: list[dict[str, Any]] | None = None, **changes: Any) -> Any:
    """Return lm-eval's own task over the same rows, wherever it looks for them."""
    pool = demonstrations or rows
    splits = {"test": rows, "validation": rows, "train": pool, "dev": pool}
    return harness_tasks.theirs(f"{PLACES[name]}.yaml", splits, **changes)


def requests(task: Any, shots: int) -> list[list[Any]]:
    return harness_tasks.asked(task, shots, seed=7)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """All tasks, over all rows, without files of demonstrations where the task needs none."""
    files = {**ITEMS, "mmlu": MMLU, "mmlu__dev": MMLU[::-1], "humaneval": PROBLEMS, "drop": DROP,
             "drop_instructeval": DROP, "drop_instructeval__first": DROP[2:]}
    return written(tmp_path_factory.mktemp("whole"), **files)


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """The seven tasks: half of the rows are asked about, the others are demonstrations."""
    files = {name: rows[:10] for name, rows in ITEMS.items()} | {f"{name}__train": rows[10:] for name, rows in ITEMS.items()}
    return written(tmp_path_factory.mktemp("halves"), **files)


@pytest.mark.parametrize("name", ITEMS)
def test_the_seven_tasks_are_lm_evals_word_for_word(tasks, halves, name):
    rows, task = ITEMS[name], tasks[name]
    assert len(rows) == 20
    mine, right = ours(task), theirs(name, rows)
    assert (task.definition, task.version, task.shots) == ("lm-eval", str(version_of(name)), 0)
    asked = requests(mine, 0)
    assert asked == requests(right, 0)
    draw, metrics = random.Random(1), set()
    for own, other, one in zip(mine.eval_docs, right.eval_docs, asked, strict=True):
        answers = [(-draw.random() * 9, False) for _ in one]
        scores = mine.process_results(own, answers)
        assert scores == right.process_results(other, answers)
        metrics |= set(scores)
    assert set(task.metrics) == metrics == set(right.aggregation())
    assert requests(ours(halves[name]), 2) == requests(theirs(name, rows[:10], rows[10:]), 2)


def test_winogrande_scores_the_rest_after_each_option(tasks):
    mine = ours(tasks["winogrande"])
    box = [("The cup did not fit into the box because the cup", " was too big."),
           ("The cup did not fit into the box because the box", " was too big.")]
    assert requests(mine, 0)[0] == box
    first, second = mine.eval_docs[0], mine.eval_docs[1]
    assert mine.process_results(first, [(-1.0, False), (-2.0, False)]) == {"acc": 1.0}
    assert mine.process_results(second, [(-1.0, False), (-2.0, False)]) == {"acc": 0.0}


def test_mmlu_is_lm_evals_57_tasks_in_one(tasks):
    import lm_eval.tasks

    mine, physics = ours(tasks["mmlu"]), [row for row in MMLU if row["subject"] == "high_school_physics"]
    count = len(physics)
    assert requests(mine, 5)[:count] == requests(theirs("mmlu", physics, physics[::-1]), 5)
    descriptions = {}
    for path in sorted((Path(lm_eval.tasks.__file__).parent / "mmlu" / "default").glob("mmlu_*.yaml")):
        read = yaml_of(path)
        descriptions[read["dataset_name"]] = read["description"]
    assert len(descriptions) == 57
    for subject, text in descriptions.items():
        assert mine.fewshot_context({**MMLU[0], "subject": subject}, 0).startswith(text)
    context = requests(ours(tasks["mmlu_instructeval"]), 1)[0][0][0]
    assert context.startswith("The following are multiple choice questions (with answers) about  high school physics.\n\n ")
    assert context.endswith("\nD. a window\nAnswer:") and context.count("\nAnswer: ") == 1


def yaml_of(path: Path) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(path, resolve_func=False)


def version_of(name: str) -> Any:
    import lm_eval.tasks

    return yaml_of(Path(lm_eval.tasks.__file__).parent / f"{PLACES[name]}.yaml")["metadata"]["version"]


def test_missing_demonstrations_of_a_subject_are_named(tmp_path):
    task = ours(written(tmp_path, mmlu=MMLU, mmlu__dev=MMLU[:11])["mmlu"])
    with pytest.raises(DataError, match="0 demonstrations with subject 'world_religions'; 2 are needed"):
        requests(task, 2)


def test_bbh_shows_each_subset_its_own_demonstrations(tmp_path):
    right = theirs("bbh_fewshot", [{"input": "True and False is", "target": "False"}])
    prompts = [{**sample, "subset": "boolean_expressions", "description": right.config.description.rstrip("\n")}
               for sample in right.fewshot_docs()]
    others = [{"input": f"Sort: {word}", "target": word, "subset": "word_sorting", "description": "Sort."} for word in "abc"]
    rows = [{**prompts[0], "input": "True and False is", "target": "False"}, {**others[0], "input": "Sort: z"}]
    found = written(tmp_path, bbh=rows, bbh__prompts=others + prompts, bbh_instructeval=rows,
                    bbh_instructeval__first=others + prompts)
    mine = requests(ours(found["bbh_fewshot"]), 3)
    expected = requests(right, 3)[0]
    assert mine[0][0][0] == expected[0][0]
    assert {**mine[0][0][1]} == expected[0][1]
    assert mine[1][0][0] == "Sort.\n\nQ: Sort: a\nA: a\n\nQ: Sort: b\nA: b\n\nQ: Sort: c\nA: c\n\nQ: Sort: z\nA:"
    task = ours(found["bbh_instructeval"])
    assert requests(task, 3)[1][0][0] == "Sort: a\nAnswer: a\n\nSort: b\nAnswer: b\n\nSort: c\nAnswer: c\n\nSort: z\nAnswer:"
    scores = [task.process_results(row, [answer]) for row, answer in zip(rows, [" Falsehood", "b"], strict=True)]
    assert scores == [{"acc": ("boolean_expressions", 1.0)}, {"acc": ("word_sorting", 0.0)}]
    assert english_functions.mean_over_subsets([("a", 1.0), ("a", 0.0), ("a", 0.0), ("b", 1.0)]) == pytest.approx(2 / 3)


def test_drop_asks_and_counts_as_lm_eval(tasks, tmp_path):
    mine, right = ours(tasks["drop"]), theirs("drop", DROP)
    assert requests(mine, 0) == requests(right, 0)
    for own, other in zip(mine.eval_docs, right.eval_docs, strict=True):
        for answer in ("2", " two", "Ana, Rui", "3 May 1901", "May 1901", ""):
            assert mine.process_results(own, [answer]) == right.process_results(other, [answer])
    shown = right.fewshot_context(right.eval_docs[0], 1)
    assert "number,date" in shown or "number,spans" in shown  # why drop is asked without demonstrations
    task = ours(tasks["drop_instructeval"])
    assert [row["question"] for row in task.eval_docs] == ["When did it open?"]  # the others have several answers
    assert task.process_results(task.eval_docs[0], [" 3 May 1901, they say"])["acc"] == 1.0
    bad = written(tmp_path, drop=[{"passage": "p", "question": "q", "answers": [[]]}])["drop"]
    with pytest.raises(DataError, match="drop.jsonl:1: .*answers must hold lists of texts"):
        bad.load()


RIGHT = ["    return 2 * x\n", "    return [sign for sign in text if sign in 'aeiou']\n", "    return min(numbers)\n"]


def test_humaneval_asks_as_lm_eval_and_runs_what_comes_back(tasks):
    mine, right = ours(tasks["humaneval"]), theirs("humaneval", PROBLEMS, **UNFETCHED)
    assert requests(mine, 0) == requests(right, 0)
    assert mine.get_config("repeats") == 1 and tasks["humaneval"].metrics == ("pass@1",)
    assert counted(mine, [RIGHT[:1], ["    return []\n"], RIGHT[2:]]) == [{"pass@1": 1.0}, {"pass@1": 0.0}, {"pass@1": 1.0}]


def test_humaneval_is_refused_before_anything_is_asked(tasks, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ConfigError, match="cannot be shut in on darwin"):
        ours(tasks["humaneval"])


def test_several_answers_give_pass_at_k(tasks):
    task = ours(tasks["humaneval_pass10"])
    assert task.get_config("repeats") == 20
    assert task.get_config("generation_kwargs")["temperature"] == 0.6
    (scores,) = counted(task, [RIGHT[:1] * 2 + ["    return 0\n"] * 18])
    assert scores == {"pass@1": pytest.approx(0.1), "pass@10": pytest.approx(1 - (10 / 20) * (9 / 19))}


def test_instructeval_runs_the_first_paragraph(tasks):
    task = ours(tasks["humaneval_instructeval"])
    assert requests(task, 0)[0][0][0].startswith("Please complete the following Python code without ")
    assert counted(task, [["\n   return 2 * x\n\nthis is no Python"]]) == [{"pass@1": 1.0}]


def counted(task: Any, answers: list[list[str]]) -> list[dict[str, float]]:
    """Give answers to a task as lm-eval does: filters over all rows, then scores row by row."""
    rows = list(task.eval_docs)[: len(answers)]
    instances = []
    for number, (row, own) in enumerate(zip(rows, answers, strict=True)):
        instance = task.construct_requests(row, "", metadata=("", number, 1))
        instance.resps = own
        instances.append(instance)
    task._instances = instances
    task.apply_filters()
    return [task.process_results(row, [instance.filtered_resps["verdicts"]])
            for row, instance in zip(rows, instances, strict=True)]
