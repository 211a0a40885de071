"""The table of tasks: what comes with the package, what a file may add, and what is refused."""

from __future__ import annotations

import pytest
from labelled_files import SINGLE, TASK_FILE

from megatron_ttl.errors import ConfigError
from megatron_ttl.finetune.tasks import find_task, known_tasks


def test_the_tasks_of_the_paper_are_there():
    tasks = known_tasks()
    assert {"hatebr", "assin2", "faquad_nli", "imdb", "agnews"} <= tasks.keys()
    assert [len(tasks[name].labels) for name in ("assin2", "agnews", "inferbr")] == [2, 4, 3]
    assert [len(tasks[name].texts) for name in ("hatebr", "assin2", "faquad_nli")] == [1, 2, 2]


def test_another_task_is_a_few_lines(tmp_path):
    (tmp_path / "more.toml").write_text(TASK_FILE)
    assert find_task("single", [tmp_path / "more.toml"]) == SINGLE


def test_labels_are_read_as_json_writes_them():
    assert [SINGLE.label_of(value) for value in (0, 1, "1", "yes", 1.0, True, None, 2, [1], 0.5)] == [
        0, 1, 1, 1, 1, None, None, None, None, None]
    assert find_task("assin2").label_of(None) is None  # and not the class called None


def test_every_fault_of_every_file_is_told(tmp_path):
    (tmp_path / "a.toml").write_text(TASK_FILE.replace("texts", "text").replace('"single"\n', '"Two Words"\n'))
    (tmp_path / "b.toml").write_text(TASK_FILE.replace('"single"]', '"../single"]').replace('["yes", "1"]', '["yes", "0"]'))
    (tmp_path / "c.toml").write_text(TASK_FILE.replace('name = "single"', 'name = "hatebr"'))
    with pytest.raises(ConfigError) as caught:
        known_tasks([tmp_path / "a.toml", tmp_path / "b.toml", tmp_path / "c.toml", tmp_path / "d.toml"])
    for place, fault in (("a.toml: task[0].text: is no key", "did you mean"), ("a.toml: task[0].name", "Two Words"),
                         ("b.toml: task 'single': labels", "'0' means 2 classes"), ("b.toml", "names a folder"),
                         ("c.toml: task 'hatebr'", "is there already"), ("d.toml", "does not exist")):
        assert any(place in line and fault in line for line in caught.value.faults), (place, fault, caught.value.faults)


def test_a_misspelt_task_is_guessed():
    with pytest.raises(ConfigError, match="did you mean 'hatebr'"):
        find_task("hatbr")
