"""The command itself: its exit codes, and where it finds the published tables."""

from __future__ import annotations

import subprocess
import sys

import pytest
from made_runs import evaluation_rows, train_rows, write_run

pytestmark = pytest.mark.slow


def report(repository, folder, *arguments):
    return subprocess.run([sys.executable, str(repository / "tools/report.py"), *arguments], cwd=folder,
                          capture_output=True, text=True, timeout=120)


def test_a_report_from_any_folder(repository, tmp_path):
    write_run(tmp_path / "runs/a", train_rows(20) + evaluation_rows(20, 5))
    done = report(repository, tmp_path, "runs/a", "--output", "out", "--format", "csv", "--constants", "ttl-paper",
                  "--window", "5000")
    assert (done.returncode, done.stderr) == (0, "")
    assert "not saturated" in done.stdout and "6 figures: out" in done.stdout
    assert len(list((tmp_path / "out").iterdir())) == 7


def test_the_papers_figures_from_any_folder(repository, tmp_path):
    done = report(repository, tmp_path, "--paper", "--published", "ttl_table1")
    assert done.returncode == 0 and "fewer tokens than Llama 2, %" in done.stdout and "PUBLISHED" in done.stdout


@pytest.mark.parametrize("arguments, fault", [
    ((), "name a run folder, or --paper, or --published TABLE"),
    (("nowhere",), "error: nowhere/metrics.jsonl: cannot be read")])
def test_what_is_wrong_is_one_line_and_code_2(repository, tmp_path, arguments, fault):
    done = report(repository, tmp_path, *arguments)
    assert done.returncode == 2 and fault in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1
