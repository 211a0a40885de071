"""The scripts of the papers' tables: what they start with what there is, and say of what there is not."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.slow

TASKS = {
    "table4": "arc_pt_ttl hellaswag_pt_ttl mmlu_pt_ttl truthfulqa_pt_mc2_ttl",
    "tinyllama_table2": "hellaswag openbookqa winogrande arc_easy arc_challenge boolq piqa",
    "tinyllama_table3": "mmlu_instructeval bbh_instructeval humaneval_instructeval drop_instructeval"}
SCRIPTS = {
    "table1": "ttl_table1", "table4": "ttl_table4", "table5": "ttl_table5", "table6": "ttl_table6",
    "figure1": "ttl_figure1b", "figure2": "ttl_figure2",
    "tinyllama_table2": "tinyllama_table2", "tinyllama_table3": "tinyllama_table3"}
WANT_DATA = ("table4", "table5", "tinyllama_table2", "tinyllama_table3", "figure2")

# python: notes how it was called, leaves what the tool would leave, and fails where the scenario wants it.
STUB = """#!/bin/bash
printf '%s\\n' "$*" >> calls.txt
case " ${FAILS:-} " in *" $(basename "$1" .py) "*) [ "$2" = "--published" ] || exit "${CODE:-2}";; esac
arguments=("$@")
for place in "${!arguments[@]}"; do
    next=${arguments[place + 1]:-}
    case "$1 ${arguments[place]}" in
        "tools/evaluate.py --model" | "tools/evaluate.py --run")
            for task in $SCORED; do echo "{\\"task\\": \\"$task\\"}" >> "$next/scores.jsonl"; done;;
        "tools/finetune.py --output") mkdir -p "$next" && touch "$next/result.json";;
    esac
done
"""


class Clone:
    """A folder with the examples and a python that only takes notes."""

    def __init__(self, repository: Path, folder: Path) -> None:
        self.folder = folder
        (folder / "examples").symlink_to(repository / "examples")
        (folder / "bin").mkdir()
        stub = folder / "bin" / "python"
        stub.write_text(STUB)
        stub.chmod(0o755)

    def run(self, script: str, code: int, **variables: str) -> tuple[list[str], str]:
        """Run a script from another folder; return the commands that it started and what it said was missing."""
        environment = {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "SCORED": TASKS.get(script, "arc_pt"),
                       **variables}
        done = subprocess.run(["bash", str(self.folder / "examples/paper" / f"{script}.sh")], cwd="/", env=environment,
                              capture_output=True, text=True, timeout=60)
        assert done.returncode == code, done.stderr
        calls = self.folder / "calls.txt"
        started = calls.read_text().splitlines() if calls.exists() else []
        calls.unlink(missing_ok=True)
        return started, done.stderr


@pytest.fixture
def clone(repository, tmp_path):
    return Clone(repository, tmp_path)


@pytest.fixture
def full(clone):
    """A clone with two models, two runs, data, a tokenizer and a text."""
    for path in ("models/a/config.json", "models/b/config.json", "runs/x/metrics.jsonl", "runs/y/metrics.jsonl",
                 "tasks/t.jsonl", "tokenizers/ttl/tokenizer.model", "data/a.jsonl", "data/b.jsonl"):
        place = clone.folder / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
    return clone


def test_every_script_is_a_program_that_bash_can_read(repository):
    scripts = sorted((repository / "examples/paper").glob("*.sh"))
    assert {path.stem for path in scripts} == {"begin", *SCRIPTS}
    for path in scripts:
        subprocess.run(["bash", "-n", str(path)], check=True, timeout=60)
        if path.stem != "begin":
            assert os.access(path, os.X_OK) and path.read_text().splitlines()[:1] == ["#!/usr/bin/env bash"]
            assert "set -euo pipefail" in path.read_text()


@pytest.mark.parametrize("script, table", SCRIPTS.items())
def test_with_nothing_there_it_says_what_is_missing_and_fails(clone, script, table):
    """One line for what is missing; the paper's rows come all the same, and do not count as something done."""
    calls, said = clone.run(script, 2)
    assert calls == [f"tools/report.py --published {table}"]
    missing, end = said.splitlines()
    assert missing.startswith("missing: a ") and "; " in missing and end == "nothing was done; see what is missing above"


@pytest.mark.parametrize("script", WANT_DATA)
def test_without_data_it_says_where_they_belong(clone, script):
    calls, said = clone.run(script, 2, MODEL=str(clone.folder / "bin"), RUN=str(clone.folder / "bin"))
    assert len(calls) == 1 and "missing: the folder tasks; tools/" in said and "--list says what belongs there" in said


def test_the_tables_of_scores(full):
    for script, tasks in TASKS.items():
        calls, said = full.run(script, 0)
        *asked, table, published = calls
        assert asked == [f"tools/evaluate.py --model models/{name} --tasks {task} --data tasks" for name in "ab"
                         for task in tasks.split()]
        assert table == f"tools/scores.py models/a models/b --tasks {tasks.replace(chr(32), chr(44))} --format markdown"
        assert (published, said) == (f"tools/report.py --published {SCRIPTS[script]}", "")
    calls, _ = full.run("table4", 0, MODEL="models/b", DATA="data", LIMIT="10")
    assert calls[0] == "tools/evaluate.py --model models/b --tasks arc_pt_ttl --data data --limit 10"


@pytest.mark.parametrize("script, group", [("table4", "ttl_table4"), ("tinyllama_table2", "tinyllama_table2"),
                                           ("tinyllama_table3", "tinyllama_table3")])
def test_the_tasks_of_those_tables_are_the_groups_of_the_packs(repository, script, group):
    """A script names the tasks of its group for the table; both must say the same."""
    groups = {}
    for path in (repository / "megatron_ttl/evaluate/packs").glob("*/groups.yaml"):
        groups |= yaml.safe_load(path.read_text())
    assert TASKS[script].split() == groups[group]


def test_a_table_has_the_tasks_that_there_are(full):
    calls, _ = full.run("table4", 0, SCORED="arc_pt_ttl mmlu_pt_ttl")
    assert calls[-2] == "tools/scores.py models/a models/b --tasks arc_pt_ttl,mmlu_pt_ttl --format markdown"


def test_one_model_that_fails_does_not_keep_the_others(full):
    calls, said = full.run("table4", 2, FAILS="evaluate")
    assert len(calls) == 9 and said.count("missing: the command above ended with code 2") == 8
    (full.folder / "models/b/scores.jsonl").write_text('{"task": "arc_pt_ttl"}')
    calls, _ = full.run("table4", 0, FAILS="evaluate")
    assert calls[-2] == "tools/scores.py models/b --tasks arc_pt_ttl --format markdown"


def test_ctrl_c_ends_a_script(full):
    calls, _ = full.run("table4", 130, FAILS="evaluate", CODE="130")
    assert len(calls) == 1


def test_fine_tuning(full):
    calls, _ = full.run("table5", 0, TASKS="hatebr assin2", SEEDS="2", OUT="out")
    assert calls[0] == "tools/finetune.py --task hatebr --model models/a --data tasks --seeds 2 --output out/table5/hatebr/a"
    assert calls[4] == "tools/finetune.py --table " + " ".join(f"out/table5/{task}/{model}" for task in ("hatebr", "assin2")
                                                               for model in "ab")
    assert len(full.run("table5", 0)[0]) == 5 * 2 + 2


def test_tokenizers_energy_and_figures(full):
    assert full.run("table1", 0)[0][0] == "tools/tokenizer_report.py --tokenizers tokenizers/ttl --text data/a.jsonl"
    calls, _ = full.run("table1", 0, TOKENIZERS="A=x B=y", TEXT="data/b.jsonl")
    assert calls[0].endswith("--tokenizers A=x B=y --text data/b.jsonl")
    assert full.run("table6", 0)[0][0] == "tools/report.py runs/x runs/y"
    calls, _ = full.run("figure1", 0, RUN="runs/y")
    assert calls[0].startswith("tools/report.py runs/y --output report/paper/figure1 --constants ttl-paper")
    calls, _ = full.run("figure2", 0, TASKS="arc_pt", LIMIT="5")
    assert calls[0] == "tools/evaluate.py --run runs/x --every-checkpoint --tasks arc_pt --data tasks --limit 5"
    assert calls[2] == "tools/report.py runs/x runs/y --output report/paper/figure2"
