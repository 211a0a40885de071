"""Tasks of a few rows, and experiments of a second, for the tests of fine-tuning."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_ttl.finetune.experiment import Request
from megatron_ttl.finetune.tasks import ClassificationTask
from megatron_ttl.finetune.training import HyperParameters

PAIR = ClassificationTask(name="pair", files=("pair",), texts=("first", "second"), label="label",
                          labels=(("no", "0"), ("yes", "1")))
SINGLE = ClassificationTask(name="single", files=("single",), texts=("text",), label="label",
                            labels=(("no", "0"), ("yes", "1")))
TASK_FILE = """
[[task]]
name = "single"
files = ["single"]
texts = ["text"]
label = "label"
labels = [["no", "0"], ["yes", "1"]]
"""


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_of(count: int, first: int = 0) -> list[dict[str, Any]]:
    """Compose rows whose class a word tells."""
    return [{"text": f"a menina {'viu' if number % 2 else 'perdeu'} o trem {number}", "label": number % 2}
            for number in range(first, first + count)]


def write_task(folder: Path, train: int = 40, test: int = 12) -> Path:
    """Write a folder with the two files of the task `single`, and its description; return the folder."""
    folder.mkdir(exist_ok=True)
    write_rows(folder / "single.train.jsonl", rows_of(train))
    write_rows(folder / "single.test.jsonl", rows_of(test, first=1000))
    (folder / "tasks.toml").write_text(TASK_FILE)
    return folder


def small_request(data: Path, model: Path, output: Path, seeds: int = 2, epochs: int = 2, **changes: Any) -> Request:
    """Return a request that takes a second."""
    training = HyperParameters(epochs=epochs, batch=8, learning_rate=1e-3)
    return Request(task="single", model=str(model), data=str(data), output=str(output), seeds=seeds, device="cpu",
                   task_files=(str(data / "tasks.toml"),), **{"training": training, **changes})
