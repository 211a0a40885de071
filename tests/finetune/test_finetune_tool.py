"""The command: a table for people, one JSON object for programs, one screen for mistakes, and Ctrl-C that loses no seed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from labelled_files import write_task
from patience import patient


@pytest.fixture
def run(call_tool):
    """The tool's main in this process."""
    return partial(call_tool, "finetune.py")


def arguments_for(data: Path, model: Path, output: Path) -> list[str]:
    return ["--task", "single", "--task-file", str(data / "tasks.toml"), "--model", str(model), "--data", str(data),
            "--output", str(output), "--device", "cpu", "--batch", "8", "--learning-rate", "1e-3"]


def test_train_compare_tabulate_predict(run, model_folder, tmp_path):
    data, ours, other = write_task(tmp_path / "data"), tmp_path / "ours", tmp_path / "other"
    code, out, _ = run(*arguments_for(data, model_folder, ours), "--epochs", 8, "--seeds", 2)
    assert code == 0 and "mean ± sd" in out and "majority class" in out
    assert "36 rows to learn from, 4 to choose the epoch, 12 to judge" in out
    code, out, _ = run(*arguments_for(data, model_folder, other), "--epochs", 8, "--seeds", 2, "--untrained",
                       "--compare", ours, "--json")
    result = json.loads(out)
    assert code == 0 and len(result["comparisons"][str(ours)]) == 3 and result["untrained"]
    code, out, _ = run("--table", ours, other, "--metric", "f1_macro")
    lines = out.splitlines()
    assert code == 0 and lines[1].split() == ["single", "average"]
    assert [line.strip().split("  ")[0] for line in lines[2:]] == ["tiny", "tiny, untrained", "majority class"]
    code, out, _ = run("--predict", data / "single.test.jsonl", "--classifier", ours / "seed-1" / "classifier",
                       "--device", "cpu")
    answers = [json.loads(line)["label"] for line in out.splitlines()]
    said = json.loads((ours / "seed-1" / "predictions.json").read_text())
    assert code == 0 and answers == [("no", "yes")[number] for number in said["predicted"]]


def test_the_tasks_are_listed_and_mistakes_are_one_screen(run, tmp_path):
    code, out, _ = run("--list")
    assert code == 0 and "faquad_nli" in out and "science and technology" in out
    code, _, err = run("--task", "hatebr", "--model", tmp_path, "--data", tmp_path, "--output", tmp_path / "x")
    assert code == 2 and "has no data of hatebr; it must have hatebr.train.jsonl with hatebr.test.jsonl" in err
    code, _, err = run("--task", "hatebr")
    assert code == 2 and "--task needs --model and --data" in err
    code, _, err = run("--predict", tmp_path / "none.jsonl", "--classifier", tmp_path)
    assert code == 2 and "is no classifier" in err and "Traceback" not in err


@pytest.mark.slow
def test_ctrl_c_keeps_the_seeds_that_are_done(repository, model_folder, tmp_path):
    data, output = write_task(tmp_path / "data"), tmp_path / "output"
    command = [sys.executable, str(repository / "tools" / "finetune.py"), *arguments_for(data, model_folder, output)]
    job = subprocess.Popen([*command, "--epochs", "30", "--seeds", "2000"], stderr=subprocess.PIPE, text=True,
                           env={**os.environ, "PYTHONPATH": str(repository)})
    end = time.monotonic() + patient(120)
    while not (output / "seed-1" / "training.json").exists():
        assert job.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    job.send_signal(signal.SIGINT)
    _, err = job.communicate(timeout=patient(60))
    assert job.returncode == 130 and "Traceback" not in err
    assert "of 2000 seeds are done and kept; the same command goes on" in err
    assert not (output / "result.json").exists()
    assert not [path for folder in output.glob("seed-*") for path in folder.iterdir() if ".tmp-" in path.name]
