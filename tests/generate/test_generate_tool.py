"""The command: plain text in a pipe, a stream on a terminal, one JSON object, one screen for mistakes."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import time

import pytest
from patience import patient
from tiny_folder import write_model_folder

from megatron_ttl.generate.text_stream import printable


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, tokenizer_folder):
    """One model is enough for a command."""
    return write_model_folder(tmp_path_factory.mktemp("model") / "one", tokenizer_folder)


@pytest.fixture
def command(repository):
    tool = repository / "tools" / "generate.py"
    return lambda *arguments: [sys.executable, str(tool), *map(str, arguments)]


def run(command) -> tuple[int, str, str]:
    """Return exit code, output and errors; a carriage return of the model stays one."""
    done = subprocess.run(command, capture_output=True, timeout=120)
    return done.returncode, done.stdout.decode("utf-8"), done.stderr.decode("utf-8")


def on_a_terminal(command) -> str:
    """Run a command whose standard output is a terminal; return what it shows."""
    parent, child = pty.openpty()
    with subprocess.Popen(command, stdout=child, stderr=subprocess.DEVNULL) as process:
        os.close(child)
        shown = b""
        while True:
            try:
                piece = os.read(parent, 65536)
            except OSError:  # the other side has closed
                break
            if not piece:
                break
            shown += piece
        process.wait(timeout=120)
    os.close(parent)
    return shown.decode("utf-8").replace("\r\n", "\n")


def test_same_seed_same_text_everywhere(command, model_folder):
    given = ("--model", model_folder, "--prompt", "a menina", "--max-new-tokens", 20, "--seed", 3)
    code, plain, note = run(command(*given, "--device", "cpu"))
    assert code == 0 and "tokens/s (float32 on cpu)" in note, note
    code, output, note = run(command(*given, "--device", "cpu", "--json"))
    assert code == 0, note
    result = json.loads(output)
    assert plain == "a menina" + result["samples"][0]["text"] + "\n"
    assert result["tokens_per_s"] > 0
    assert on_a_terminal(command(*given, "--device", "cpu")) == printable(plain)


def test_several_samples(command, model_folder):
    code, output, note = run(command("--model", model_folder, "--num-samples", 2, "--max-new-tokens", 5,
                                     "--device", "cpu"))
    assert code == 0, note
    assert "--- 1 of 2\n" in output and "\n--- 2 of 2\n" in output


def test_all_mistakes_at_once(command, model_folder):
    code, output, note = run(command("--model", model_folder, "--temperature", "-1", "--top-p", 2,
                                     "--max-new-tokens", 0))
    assert code == 2 and output == "" and "Traceback" not in note
    assert note.startswith("3 faults:\nerror: temperature: -1; it must be 0")


def test_missing_folder(command, tmp_path):
    code, _, note = run(command("--model", tmp_path / "none", "--device", "cpu"))
    assert code == 2 and "none: does not exist" in note and "Traceback" not in note


def test_help_is_quick(command):
    run(command("--help"))
    started = time.monotonic()
    code, output, _ = run(command("--help"))
    assert code == 0 and "--max-new-tokens" in output
    assert time.monotonic() - started < patient(1.0)  # 0.3 s on an idle machine
