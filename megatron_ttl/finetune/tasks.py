"""Which classification tasks there are: a table, so that another one needs no code."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from megatron_ttl.config.read import parse_toml, read_text
from megatron_ttl.config.suggest import did_you_mean, nearest_keys, nearest_words
from megatron_ttl.config.validate import validate, without_indices
from megatron_ttl.errors import ConfigError, collected, raise_faults

_MODEL = ConfigDict(strict=True, frozen=True, extra="forbid", use_attribute_docstrings=True)
_KEYS = ("name", "files", "texts", "label", "labels", "group", "separator", "metric", "language", "source")


class ClassificationTask(BaseModel):
    """One task: where its rows are and what they say."""

    model_config = _MODEL

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=60)]
    """What --task and records call it"""
    files: Annotated[tuple[str, ...], Field(min_length=1)]
    """Names of its data, without .train.jsonl, .test.jsonl, .jsonl or .sample.jsonl"""
    texts: Annotated[tuple[str, ...], Field(min_length=1, max_length=2)]
    """Key of the text, or of the two texts of a pair"""
    label: str
    """Key of the label"""
    labels: Annotated[tuple[tuple[str, ...], ...], Field(min_length=2)]
    """One list per class, in the order of the head: its name, then how else files spell it"""
    group: str = ""
    """Key of what rows share that are not independent; they stay together when a file is split"""
    separator: str = "\n"
    """Between the two texts of a pair"""
    metric: Literal["accuracy", "f1_macro"] = "accuracy"
    """Chooses the best epoch on the validation part"""
    language: str = ""
    """Of the texts"""
    source: str = ""
    """Where the rows come from"""

    @property
    def label_names(self) -> list[str]:
        """Names of the classes, in the order of the head."""
        return [spellings[0] for spellings in self.labels]

    def label_of(self, value: Any) -> int | None:
        """Return the class that a row's label means, None if it means none; numbers and booleans as JSON writes them."""
        if isinstance(value, bool):
            value = str(value).lower()
        elif isinstance(value, float) and value.is_integer():
            value = int(value)
        elif not isinstance(value, str | int):
            return None
        return next((number for number, spellings in enumerate(self.labels) if str(value) in spellings), None)


class TaskFile(BaseModel):
    """A file of tasks."""

    model_config = _MODEL

    task: Annotated[tuple[ClassificationTask, ...], Field(min_length=1)]
    """The tasks"""


def known_tasks(task_files: Sequence[str | os.PathLike[str]] = ()) -> dict[str, ClassificationTask]:
    """Return the tasks by name: those that come with the package, then those of files.

    Raises:
        ConfigError: with all faults of all files.
    """
    tasks = {task.name: task for task in _read(Path(str(resources.files(__package__) / "tasks.toml")))}
    faults: list[str] = []
    for path in map(Path, task_files):
        with collected(faults, ConfigError):
            found = _read(path)
            faults += [f"{path}: task {task.name!r} is there already; every task has a name of its own; choose another"
                       for task in found if task.name in tasks]
            tasks.update({task.name: task for task in found})
    raise_faults(ConfigError, faults)
    return tasks


def find_task(name: str, task_files: Sequence[str | os.PathLike[str]] = ()) -> ClassificationTask:
    """Return a task by its name.

    Raises:
        ConfigError: there is none, or a file of tasks is faulty.
    """
    tasks = known_tasks(task_files)
    if name not in tasks:
        near = nearest_words(name, list(tasks))
        raise ConfigError(f"--task: {name!r} is no task; it must be one of {', '.join(tasks)}; "
                          f"{did_you_mean(near) if near else 'or describe it in a file for --task-file'}")
    return tasks[name]


def _read(path: Path) -> tuple[ClassificationTask, ...]:
    text, faults = read_text(path, "a file of tasks in TOML", "--task-file")
    raise_faults(ConfigError, faults)
    raw, faults = parse_toml(text, path, "file of tasks")
    raise_faults(ConfigError, faults)
    checked = validate(TaskFile, raw, _unknown)
    found = [f"{path}: {key}: {fault}" for key, fault in checked.faults]
    if not found:
        found += [f"{path}: task {task.name!r}: {fault}" for task in checked.value.task for fault in _task_faults(task)]
        counts = Counter(task.name for task in checked.value.task)
        found += [f"{path}: task {name!r} stands there {count} times; every task has a name of its own; choose another"
                  for name, count in counts.items() if count > 1]
    raise_faults(ConfigError, found)
    return checked.value.task


def _task_faults(task: ClassificationTask) -> Iterator[str]:
    spelled = Counter(word for spellings in task.labels for word in set(spellings))
    yield from (f"labels: {word!r} means {count} classes; it must mean one; remove it from the others"
                for word, count in spelled.items() if count > 1)
    if not all(task.labels):
        yield "labels: a class has no name; the first word of each list is its name; write it"
    if len(set(task.texts)) < len(task.texts):
        yield f"texts: {task.texts[0]!r} stands there twice; a pair has two texts; name the key of the other"
    if task.label in task.texts:
        yield f"label: {task.label!r} is the key of a text; the label has a key of its own; name it"
    yield from (f"files: {name!r} names a folder; a file lies in --data itself; write its name alone"
                for name in task.files if "/" in name or name in ("", ".", ".."))


def _unknown(key: str) -> tuple[str, set[str]]:
    near = nearest_keys(without_indices(key), {f"task[].{name}" for name in _KEYS} | {"task"})
    advice = did_you_mean(near) if near else "remove it"
    return f"is no key of a task; must be one of {', '.join(_KEYS)}; {advice}", set(near)
