"""Scores are kept one by one; nothing is asked twice; what is wrong is said first, and what fails stops nothing else."""

from __future__ import annotations

import gzip
import json
import re
from functools import partial

import pytest
from small_tasks import questions
from task_folders import write_pack, write_task_folder

from megatron_ttl.errors import CheckpointError, DataError, DiskError, UserError
from megatron_ttl.evaluate import evaluate_tasks as story
from megatron_ttl.evaluate import model_places
from megatron_ttl.evaluate.evaluate_tasks import TaskSettings, evaluate_tasks, items_path
from megatron_ttl.evaluate.model_places import Place, find_places
from megatron_ttl.evaluate.open_run import ModelToScore, open_folder
from megatron_ttl.evaluate.records import read_records


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_task_folder(tmp_path_factory.mktemp("tasks"))


@pytest.fixture
def settings(folder):
    return partial(TaskSettings, data=folder / "data", packs=(folder / "packs",))


@pytest.fixture
def asked(monkeypatch):
    """Names of the tasks that a model was asked, in order."""
    names = []
    usual = story.run_task

    def spy(task, answerer, *arguments, **keywords):
        if isinstance(answerer, story.ModelAnswerer):
            names.append(task.name)
        return usual(task, answerer, *arguments, **keywords)

    monkeypatch.setattr(story, "run_task", spy)
    return names


def one_model(folder):
    return partial(find_places, folder, device="cpu")


def items_of(path, record):
    with gzip.open(items_path(path, record), "rt") as handle:
        return [json.loads(line) for line in handle]


def test_scores_are_kept_and_not_computed_twice(model_folder, settings, asked, tmp_path):
    path = tmp_path / "scores.jsonl"
    both = settings(("toy_one", "toy_two"))
    first = evaluate_tasks(one_model(model_folder), both, path)
    assert asked == ["toy_one", "toy_two"] and not first.faults and first.known == 0
    assert [(record.task, record.metric, record.main) for record in first.records] == [
        (task, metric, metric == "acc") for task in asked for metric in ("acc", "acc_norm")]
    assert read_records(path) == first.records
    record = first.records[0]
    assert record.n == 12 and record.stderr > 0 and record.model.parameters == 40992 and record.data == "questions.jsonl"
    assert set(record.baselines) == {"random", "longest", "shortest"} and record.versions["lm_eval"] == "0.4.13"
    items = items_of(path, record)
    assert [item["item"] for item in items] == list(range(12)) and len(items[1]["answers"]) == 4
    assert sum(item["acc"] for item in items) / 12 == pytest.approx(record.value)
    assert items_path(path, first.records[1]) == items_path(path, record) != items_path(path, first.records[2])

    again = evaluate_tasks(one_model(model_folder), both, path)
    assert asked == ["toy_one", "toy_two"] and again.known == 4 and again.records == first.records
    for changed in (settings(("toy_one",), again=True), settings(("toy_one",), limit=5), settings(("toy_one",), shots=1),
                    settings(("toy_one",), seed=1)):
        assert evaluate_tasks(one_model(model_folder), changed, path).known == 0
    assert asked[2:] == ["toy_one"] * 4 and len(path.read_text().splitlines()) == 12 and len(read_records(path)) == 10


def test_another_prompt_or_other_rows_are_another_score(model_folder, settings, asked, tmp_path):
    own = write_task_folder(tmp_path / "own", ("toy",))
    path, wanted = tmp_path / "scores.jsonl", TaskSettings(("toy",), own / "data", (own / "packs",))
    evaluate_tasks(one_model(model_folder), wanted, path)
    write_pack(own, "toy", "Outra pergunta")
    evaluate_tasks(one_model(model_folder), wanted, path)
    (own / "data" / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions(11)))
    evaluate_tasks(one_model(model_folder), wanted, path)
    assert asked == ["toy"] * 3
    evaluate_tasks(one_model(model_folder), wanted, path)
    assert asked == ["toy"] * 3


def test_batches_and_neighbours_change_nothing(model_folder, settings, tmp_path):
    found = []
    for batch in (1, 3, 32):
        path = tmp_path / f"{batch}.jsonl"
        scores = evaluate_tasks(one_model(model_folder), settings(("toy_two",), batch=batch, shots=2), path)
        found.append((scores.records, items_of(path, scores.records[0])))
    for records, items in found[1:]:
        for record, expected in zip(records, found[0][0], strict=True):
            assert (record.value, record.stderr, record.request_checksum, record.truncated) == (
                expected.value, expected.stderr, expected.request_checksum, expected.truncated)
        for item, expected in zip(items, found[0][1], strict=True):
            assert item["answers"] == pytest.approx(expected["answers"], abs=1e-4)


def test_what_fails_does_not_stop_the_others(model_folder, settings, folder, tmp_path):
    write_pack(folder, "toy_broken", "{{nothing}}")
    scores = evaluate_tasks(one_model(model_folder), settings(("toy_broken", "toy_one")), tmp_path / "s.jsonl")
    assert {record.task for record in scores.records} == {"toy_one"}
    assert len(scores.faults) == 1 and "task toy_broken: its definition does not fit its rows" in scores.faults[0]


def test_a_prompt_that_is_fixed_gets_no_shots_and_says_so(model_folder, settings, folder, tmp_path, capsys):
    write_pack(folder, "toy_fixed", more="num_fewshot: 0")
    for _ in range(2):
        scores = evaluate_tasks(one_model(model_folder), settings(("toy_fixed", "toy_one"), shots=2), tmp_path / "s.jsonl")
        assert [record.shots for record in scores.records] == [0, 0, 2, 2]
        assert capsys.readouterr().err == "toy_fixed: --shots is not for these: what they show is part of their prompt\n"
    assert scores.known == 4


def test_every_checkpoint_and_one_that_is_damaged(model_folder, settings, asked, tmp_path):
    def checkpoint(step):
        if step == 20:
            raise CheckpointError("step-20: is damaged; ...")
        chosen = open_folder(model_folder, "cpu")
        weights = {"step": step, "checksum": f"xxh3:{step}"}
        return ModelToScore(chosen.opened, chosen.scored.model_copy(update=weights))

    def find():
        return [Place(f"step {step}: ", partial(checkpoint, step)) for step in (10, 20, 30)]

    scores = evaluate_tasks(find, settings(("toy_one",)), tmp_path / "scores.jsonl")
    assert [record.model.step for record in scores.records] == [10, 10, 30, 30] and asked == ["toy_one", "toy_one"]
    assert scores.faults == ["step-20: is damaged; ..."]
    assert len({items_path(scores.path, record) for record in scores.records}) == 2
    evaluate_tasks(find, settings(("toy_one",)), tmp_path / "scores.jsonl")
    assert len(asked) == 2


def test_all_faults_before_a_model_is_opened(model_folder, settings, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(model_places, "open_folder", lambda *_: pytest.fail("a model was opened"))
    path = tmp_path / "scores.jsonl"
    with pytest.raises(UserError) as caught:
        evaluate_tasks(partial(find_places, tmp_path / "none", device="cuda:9", dtype="float8"),
                       settings(("toy_on",), limit=0, batch=0, shots=-1, seed=-1), path)
    text = "\n".join(caught.value.faults)
    for fault in ("--limit: 0", "--batch: 0", "--shots: -1", "--seed: -1", "none: does not exist", "cuda:9", "float8",
                  "toy_on: is no task and no group.*did you mean .*toy_one"):
        assert re.search(fault, text), fault
    write_pack(folder, "toy_elsewhere", file="elsewhere.jsonl")
    with pytest.raises(UserError, match="(?s)toy_on: is no task.*toy_elsewhere: elsewhere.jsonl is not in"):
        evaluate_tasks(one_model(model_folder), settings(("toy_elsewhere", "toy_on")), path)
    (folder / "data" / "bad.jsonl").write_text('{"question": "?", "choices": ["a", "b"], "answer": 2}\n')
    write_pack(folder, "toy_bad", file="bad.jsonl")
    with pytest.raises(UserError, match="bad.jsonl:1: 'answer' is 2"):
        evaluate_tasks(one_model(model_folder), settings(("toy_bad",)), path)
    assert not path.exists()


def test_a_run_has_the_step_or_says_which(tmp_path, monkeypatch):
    monkeypatch.setattr(model_places, "checkpoint_steps", lambda run: [5, 10])
    assert [place.label for place in find_places(run=tmp_path, every_checkpoint=True)] == ["step 5: ", "step 10: "]
    with pytest.raises(UserError, match="--step: 7; .* has 5, 10; choose one"):
        find_places(run=tmp_path, step=7)


def test_interrupted_between_tasks(model_folder, settings, asked, tmp_path, monkeypatch, capsys):
    path = tmp_path / "scores.jsonl"
    spy = story.run_task

    def interrupted(task, answerer, *arguments, **keywords):
        if task.name == "toy_two":
            raise KeyboardInterrupt
        return spy(task, answerer, *arguments, **keywords)

    monkeypatch.setattr(story, "run_task", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate_tasks(one_model(model_folder), settings(("toy_one", "toy_two")), path)
    assert "the same command goes on with the rest" in capsys.readouterr().err
    assert {record.task for record in read_records(path)} == {"toy_one"}
    monkeypatch.setattr(story, "run_task", spy)
    scores = evaluate_tasks(one_model(model_folder), settings(("toy_one", "toy_two")), path)
    assert asked == ["toy_one", "toy_two"] and scores.known == 2 and len(scores.records) == 4


def test_a_torn_line_is_cut_and_a_damaged_one_refused(model_folder, settings, asked, tmp_path, capsys):
    path = tmp_path / "scores.jsonl"
    evaluate_tasks(one_model(model_folder), settings(("toy_one", "toy_two")), path)
    path.write_bytes(path.read_bytes()[:-40])
    scores = evaluate_tasks(one_model(model_folder), settings(("toy_one", "toy_two")), path)
    assert "were not a whole row; they are cut" in capsys.readouterr().err
    assert asked == ["toy_one", "toy_two", "toy_two"] and scores.known == 2 and len(read_records(path)) == 4
    path.write_text("damage\n" + path.read_text())
    with pytest.raises(DataError, match="scores.jsonl:1: "):
        evaluate_tasks(one_model(model_folder), settings(("toy_one",)), path)


def test_no_place_for_scores_is_said_before_the_work(model_folder, settings, asked, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError):
        evaluate_tasks(one_model(model_folder), settings(("toy_one",)), tmp_path / "file" / "scores.jsonl")
    assert asked == []


def test_contaminated_items_are_counted_once_they_are_asked_for(model_folder, settings, asked, tmp_path):
    path, training = tmp_path / "scores.jsonl", tmp_path / "training.jsonl"
    words = " ".join(f"palavra{number}" for number in range(14))
    rows = [dict(questions(6)[number], question=words if number == 2 else f"O quê, {number}?") for number in range(6)]
    own = write_task_folder(tmp_path / "own", ("toy",))
    (own / "data" / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    training.write_text(json.dumps({"text": f"Antes {words} depois."}) + "\n")
    wanted = TaskSettings(("toy",), own / "data", (own / "packs",))
    assert evaluate_tasks(one_model(model_folder), wanted, path).records[0].contaminated is None
    looked = story.replace(wanted, contamination=(str(training),))
    for _ in range(2):
        record = evaluate_tasks(one_model(model_folder), looked, path).records[0]
        assert record.contaminated == 1 and record.value_clean is not None
    assert asked == ["toy", "toy"]
