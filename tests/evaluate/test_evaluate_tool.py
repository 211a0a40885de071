"""The command: figures for people, one JSON object for programs, one screen for mistakes."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from patience import patient
from task_folders import write_task_folder

from megatron_ttl.evaluate.command_line import contradictions, parser


@pytest.fixture
def run(repository):
    def call(*arguments):
        command = [sys.executable, str(repository / "tools" / "evaluate.py"), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    return call


def test_json(run, model_folder, prefix, other_prefix):
    done = run("--model", model_folder, "--perplexity", prefix, other_prefix, "--max-tokens", 200,
               "--device", "cpu", "--batch", 2, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [row["tokens"] for row in result["prefixes"]] == [199, 199] and result["total"]["tokens"] == 398


def test_people(run, model_folder, prefix, other_prefix):
    done = run("--model", model_folder, "--perplexity", prefix, other_prefix, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    header, *rows, windows = done.stdout.splitlines()[1:]
    assert header.split()[:5] == ["dataset", "nats", "per", "token", "perplexity"]
    assert [row.split()[0] for row in rows] == [str(prefix), str(other_prefix), "total"]
    assert "windows of 48 tokens, chunked, non-overlapping" in windows and "tokens/s" in windows


def test_mistakes_take_one_screen(run, tmp_path, prefix):
    done = run("--model", tmp_path / "none", "--perplexity", prefix, "--device", "cpu")
    assert done.returncode == 2 and done.stdout == ""
    assert "none: does not exist" in done.stderr and "Traceback" not in done.stderr


@pytest.fixture
def main(call_tool):
    """The tool's main in this process."""
    return partial(call_tool, "evaluate.py")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_task_folder(tmp_path_factory.mktemp("tasks"), tuple(f"toy_{number}" for number in range(6)), items=40)


@pytest.fixture
def own_model(model_folder, tmp_path):
    return shutil.copytree(model_folder, tmp_path / "own")


def of_tasks(tasks, *names):
    return "--tasks", ",".join(names), "--data", tasks / "data", "--packs", tasks / "packs", "--device", "cpu"


def test_tasks_for_people_and_for_programs(main, own_model, tasks):
    code, out, err = main("--model", own_model, *of_tasks(tasks, "toy_0", "toy_1"), "--limit", 8)
    assert (code, err) == (0, "")
    title, header, *rows, where = out.splitlines()
    assert title == "own" and header.split()[:6] == ["task", "version", "shots", "metric", "score", "n"]
    assert [row.split()[:4] for row in rows] == [[task, "1.0", "0", metric] for task in ("toy_0", "toy_1")
                                                 for metric in ("acc", "acc_norm")]
    assert all("random" in row and "±" in row and "first 8" in row for row in rows)
    assert where == f"4 scores are in {own_model / 'scores.jsonl'}"
    code, out, err = main("--model", own_model, *of_tasks(tasks, "toy_0", "toy_1"), "--limit", 8, "--json")
    result = json.loads(out)
    assert (code, len(result["records"]), result["known"], result["faults"], err) == (0, 4, 4, [], "")
    code, out, err = main("--model", own_model, *of_tasks(tasks, "toy_0", "toy_3"), "--shots", 40)
    assert code == 2 and err.startswith("2 faults:\nerror: task toy_0: 40 rows to take demonstrations from; 41 are needed")


def test_list(main, tasks):
    code, out, err = main("--list", "--data", tasks / "data", "--packs", tasks / "packs")
    assert (code, err) == (0, "")
    assert any(line.split()[:7] == ["toy_0", "1.0", "megatron_ttl", "pt", "0", "acc", "40"] for line in out.splitlines())
    assert re.search("missing for arc_pt, .*: arc_challenge_pt.jsonl is not in", out)


MISTAKES = {
    "nothing to measure; it must be one of": ["--model", "x"],
    "--tasks and --perplexity; it must be one of": ["--model", "x", "--tasks", "a", "--perplexity", "b"],
    "no model; it must be one of --model and --run": ["--tasks", "a"],
    "--model and --run; it must be one of": ["--tasks", "a", "--model", "x", "--run", "y"],
    "--perplexity: of a run": ["--run", "x", "--perplexity", "b"],
    "--every-checkpoint: without a run": ["--model", "x", "--tasks", "a", "--every-checkpoint"],
    "--step and --every-checkpoint": ["--run", "x", "--tasks", "a", "--every-checkpoint", "--step", "0"],
    "--limit: is for --tasks": ["--model", "x", "--perplexity", "b", "--limit", "3"],
    "--max-tokens: is for --perplexity": ["--model", "x", "--tasks", "a", "--max-tokens", "3"],
}


@pytest.mark.parametrize("fault", MISTAKES)
def test_what_cannot_be_meant(fault):
    assert any(found.startswith(fault) for found in contradictions(parser("").parse_args(MISTAKES[fault])))


@pytest.mark.slow
@pytest.mark.parametrize("ended_by", [
    signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_goes_on_after_a_kill_with_the_same_scores(repository, main, own_model, model_folder, tasks, tmp_path, ended_by):
    names = [f"toy_{number}" for number in range(6)]
    command = [sys.executable, repository / "tools/evaluate.py", "--model", own_model, *of_tasks(tasks, *names)]
    child = subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True)
    scores, before = own_model / "scores.jsonl", b""
    while before.count(b"\n") < 2 and child.poll() is None:
        time.sleep(0.005)
        before = scores.read_bytes() if scores.exists() else b""
    child.send_signal(ended_by)
    _, said = child.communicate(timeout=60)
    assert child.returncode in ((-9,) if ended_by == signal.SIGKILL else (130,)), said
    if ended_by == signal.SIGINT:
        assert f"what was done is kept in {scores}; the same command goes on with the rest\ninterrupted\n" == said
    kept = scores.read_bytes()
    code, out, _ = main("--model", own_model, *of_tasks(tasks, *names), "--json")
    assert code == 0 and kept and scores.read_bytes().startswith(kept[:kept.rfind(b"\n") + 1])
    result = json.loads(out)
    assert 2 <= result["known"] < 12 and len(scores.read_bytes().splitlines()) == 12
    whole = json.loads(main("--model", model_folder, *of_tasks(tasks, *names), "--scores", tmp_path / "whole.jsonl",
                            "--json")[1])
    assert [(row["task"], row["metric"], row["value"], row["request_checksum"]) for row in result["records"]] == [
        (row["task"], row["metric"], row["value"], row["request_checksum"]) for row in whole["records"]]


def test_help_is_quick(run):
    run("--help")
    started = time.monotonic()
    done = run("--help")
    assert done.returncode == 0 and "--perplexity PREFIX" in done.stdout
    assert time.monotonic() - started < patient(1.0)  # 0.3 s on an idle machine
