"""The command: figures for people, one JSON object for programs, one screen for mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
from patience import patient


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


def test_help_is_quick(run):
    run("--help")
    started = time.monotonic()
    done = run("--help")
    assert done.returncode == 0 and "--perplexity PREFIX" in done.stdout
    assert time.monotonic() - started < patient(1.0)  # 0.3 s on an idle machine
