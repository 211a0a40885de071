"""Find a task's files, and cut one file into a training and a test part before anything is trained."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ttl.checkpoint.bounded_json import read_json_object
from megatron_ttl.errors import DataError, raise_faults
from megatron_ttl.files import atomic_directory, checksum, write_json
from megatron_ttl.finetune.rows import Row, class_faults, cut, read_rows, without_repeats
from megatron_ttl.finetune.tasks import ClassificationTask

_PACKINGS = ("", ".gz", ".zst")


@dataclass(frozen=True)
class TaskFiles:
    """Where the rows of a task are."""

    train: Path
    test: Path
    origin: str
    """Names of the files they come from, without folders."""
    sample: bool
    """Whether these are only a sample of the real data (`*.sample.jsonl`)."""
    split: dict[str, object] | None = None
    """How one file was cut into two; None where the data came in two files."""


def find_files(task: ClassificationTask, folder: str | os.PathLike[str]) -> tuple[Path, Path | None, bool]:
    """Return the training file, the test file (None: it is the same one), and whether it is a sample.

    X.train.jsonl with X.test.jsonl is taken before X.jsonl, and that before X.sample.jsonl. No file is opened.

    Raises:
        DataError: there is none.
    """
    folder = Path(folder)
    for name in task.files:
        train, test = (_first(folder, f"{name}.{part}.jsonl") for part in ("train", "test"))
        if train and test:
            return train, test, False
        if train or test:
            there, missing = (train, "test") if train else (test, "train")
            raise DataError(f"{there}: stands alone; {name}.{missing}.jsonl must be beside it; put it there, or all rows "
                            f"into {name}.jsonl, which is then split")
    for suffix in (".jsonl", ".sample.jsonl"):
        for name in task.files:
            if found := _first(folder, f"{name}{suffix}"):
                return found, None, suffix == ".sample.jsonl"
    wanted = ", ".join(f"{name}.train.jsonl with {name}.test.jsonl, or {name}.jsonl" for name in task.files)
    raise DataError(f"{folder}: has no data of {task.name}; it must have {wanted}, or a .sample.jsonl (each also packed, "
                    ".gz or .zst); correct --data")


def _first(folder: Path, name: str) -> Path | None:
    return next((folder / f"{name}{packing}" for packing in _PACKINGS if (folder / f"{name}{packing}").is_file()), None)


def prepare_files(task: ClassificationTask, folder: str | os.PathLike[str], output: Path, fraction: float,
                  seed: int) -> TaskFiles:
    """Return the files of a task; where there is only one, cut it into two under `output` first.

    The cut is by a keyed hash of the texts: see `cut`. Repeated texts are left out before, so that none stands on both
    sides. A cut that is there already is taken as it is, if it was made from the same file in the same way.

    Raises:
        DataError: the data are missing or wrong, or the cut that is there is another one.
    """
    train, test, sample = find_files(task, folder)
    if test is not None:
        return TaskFiles(train, test, f"{train.name}, {test.name}", sample)
    parts = output / "data"
    asked = {"file": train.name, "checksum": checksum(train), "test_fraction": fraction, "seed": seed}
    if parts.is_dir():
        split = read_json_object(parts / "split.json")
        if any(split.get(key) != value for key, value in asked.items()):
            raise DataError(f"{parts}: was cut from another file, or in another way; the test rows of an output must stay "
                            "the same; choose another --output")
    else:
        kept, left_out = without_repeats(read_rows(train, task))
        train_rows, test_rows = cut(kept, fraction, seed)
        raise_faults(DataError, [*class_faults(train_rows, task, f"{train}: its training part"),
                                 *class_faults(test_rows, task, f"{train}: its test part")])
        split = {**asked, "train": len(train_rows), "test": len(test_rows), **left_out}
        with atomic_directory(parts) as temporary:
            _write_rows(temporary / "train.jsonl", train_rows)
            _write_rows(temporary / "test.jsonl", test_rows)
            write_json(temporary / "split.json", split)
    return TaskFiles(parts / "train.jsonl", parts / "test.jsonl", train.name, sample, split)


def _write_rows(path: Path, rows: Sequence[Row]) -> None:
    path.write_bytes(b"".join(row.line + b"\n" for row in rows))
