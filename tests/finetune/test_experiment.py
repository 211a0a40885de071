"""An experiment: what is read when, what is kept, what may not change, what may be compared."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from labelled_files import rows_of, small_request, write_rows, write_task

from megatron_ttl.errors import CheckpointError, ConfigError, DataError, UserError
from megatron_ttl.finetune import experiment
from megatron_ttl.finetune.classifier import all_logits, load_classifier
from megatron_ttl.finetune.experiment import fine_tune
from megatron_ttl.finetune.results import FineTuneRecord, compare, comparison_table, read_result
from megatron_ttl.finetune.rows import cut, read_rows
from megatron_ttl.finetune.tasks import find_task
from megatron_ttl.finetune.training import HyperParameters


@pytest.fixture
def data(tmp_path) -> Path:
    """A folder with 40 rows to learn from and 12 to be judged by."""
    return write_task(tmp_path / "data")


class Spy:
    """Notes every file that Python opens, by whatever function, and every training that ends."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.listens = True
        sys.addaudithook(self._hear)  # stays for ever: silenced by `listens`

    def _hear(self, event: str, arguments: tuple) -> None:
        if self.listens and event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            self.seen.append(f"open {os.fsdecode(arguments[0])}")


@pytest.mark.parametrize("files", [1, 2])
def test_no_byte_of_the_test_split_is_read_before_the_last_epoch_of_the_last_seed(data, model_folder, tmp_path,
                                                                                  monkeypatch, files):
    if files == 1:
        write_rows(data / "single.jsonl", rows_of(50))
        for part in ("train", "test"):
            (data / f"single.{part}.jsonl").unlink()
    output, spy, train = tmp_path / "output", Spy(), experiment.train_seed

    def spied(*arguments, **named):
        spy.seen.append("training begins")
        row = train(*arguments, **named)
        spy.seen.append(f"epoch {len(row['epochs'])} of seed {row['seed']} is over")
        return row

    monkeypatch.setattr(experiment, "train_seed", spied)
    if files == 1:  # cut before, by a step of its own
        monkeypatch.setattr(experiment, "prepare_files", lambda *a, prepare=experiment.prepare_files: (
            prepare(*a), spy.seen.append("the file is cut"))[0])
    try:
        fine_tune(small_request(data, model_folder, output, seeds=2))
    finally:
        spy.listens = False
    test = output / "data" / "test.jsonl" if files == 1 else data / "single.test.jsonl"
    begins = spy.seen.index("the file is cut" if files == 1 else "training begins")
    opened = [number for number, event in enumerate(spy.seen) if event == f"open {test}" and (files == 2 or number > begins)]
    assert opened and opened[0] > spy.seen.index("epoch 2 of seed 1 is over") > begins
    assert len(opened) == 1
    if files == 1:  # nor is the file that it was cut from
        assert not any(event == f"open {data / 'single.jsonl'}" for event in spy.seen[begins:])


def test_an_interrupted_experiment_goes_on_and_a_finished_one_is_only_read(data, model_folder, tmp_path, monkeypatch,
                                                                           capsys):
    train, calls = experiment.train_seed, []

    def interrupted(*arguments, **named):
        calls.append(arguments[6])
        if calls == [0, 1]:
            raise KeyboardInterrupt
        return train(*arguments, **named)

    whole = fine_tune(small_request(data, model_folder, tmp_path / "whole"))
    monkeypatch.setattr(experiment, "train_seed", interrupted)
    request = small_request(data, model_folder, tmp_path / "output")
    with pytest.raises(KeyboardInterrupt):
        fine_tune(request)
    assert "1 of 2 seeds are done and kept; the same command goes on" in capsys.readouterr().err
    assert not (tmp_path / "output" / "result.json").exists()
    result = fine_tune(request)
    assert calls == [0, 1, 1]
    assert result == whole
    (data / "single.test.jsonl").write_text("")  # not looked at again
    assert fine_tune(request) == result


def test_the_best_epoch_is_chosen_by_the_validation_rows_and_kept(data, model_folder, tmp_path):
    draw = random.Random(0)
    noise = write_rows(data / "single.train.jsonl", [{**row, "label": draw.randrange(2)} for row in rows_of(80)])
    training = HyperParameters(epochs=5, batch=8, learning_rate=1e-2)
    result = fine_tune(small_request(data, model_folder, tmp_path / "output", seeds=3, training=training, validation=0.25))
    task = find_task("single", [data / "tasks.toml"])
    _, validation = cut(read_rows(noise, task), 0.25, 0)
    for row in result["seeds"]:
        best = max(row["epochs"], key=lambda epoch: (epoch["accuracy"], -epoch["loss"]))
        assert row["best_epoch"] == best["epoch"] and row["validation"] == best
        classifier = load_classifier(tmp_path / "output" / f"seed-{row['seed']}" / "classifier", "cpu")
        encoded = classifier.encode([part.texts for part in validation])
        logits = all_logits(classifier.module, encoded, 3, 8, torch.device("cpu"))
        loss = F.cross_entropy(logits, torch.tensor([part.label for part in validation]))
        assert float(loss) == pytest.approx(best["loss"], abs=1e-5)
    assert min(row["best_epoch"] for row in result["seeds"]) < 5  # not simply the last one


def test_an_output_holds_one_experiment(data, model_folder, tmp_path):
    request = small_request(data, model_folder, tmp_path / "output", seeds=1, epochs=1)
    fine_tune(request)
    changed = dataclasses.replace(request, seeds=2, untrained=True,
                                  training=dataclasses.replace(request.training, learning_rate=2e-3))
    with pytest.raises(ConfigError) as caught:
        fine_tune(changed)
    assert len(caught.value.faults) == 3
    assert "training.learning_rate = 0.001, now it is 0.002" in "\n".join(caught.value.faults)
    assert "whose test split is opened once; choose another --output" in caught.value.faults[0]


def test_test_rows_that_were_learnt_from_are_left_out(data, model_folder, tmp_path):
    seen = rows_of(1)[0]
    write_rows(data / "single.test.jsonl", [*rows_of(12, first=1000), {**seen, "text": seen["text"].upper()}])
    request = small_request(data, model_folder, tmp_path / "output", seeds=1, epochs=1)
    rows = fine_tune(request)["rows"]
    assert (rows["test"], rows["test_rows_seen_in_training"], rows["train"], rows["validation"]) == (12, 1, 36, 4)
    write_rows(data / "single.test.jsonl", rows_of(3))
    with pytest.raises(DataError, match="all of its 3 rows stand in the training file too"):
        fine_tune(dataclasses.replace(request, output=str(tmp_path / "other")))


def test_records_say_all_that_a_figure_depends_on(data, model_folder, tmp_path):
    result = fine_tune(small_request(data, model_folder, tmp_path / "output", max_tokens=8))
    lines = (tmp_path / "output" / "finetune.jsonl").read_text().splitlines()
    records = [FineTuneRecord.model_validate_json(line) for line in lines]
    assert [(record.metric, record.seed) for record in records] == [
        (metric, seed) for metric in ("accuracy", "f1_macro") for seed in (0, 1, None)]
    mean = records[2]
    assert mean.value == pytest.approx((records[0].value + records[1].value) / 2) == result["summary"]["accuracy"]["mean"]
    assert mean.deviation == pytest.approx(abs(records[0].value - records[1].value) / 2**0.5)
    assert mean.baselines == {"majority": 0.5} and mean.n == 12 and not mean.sample
    assert mean.hyper_parameters["learning_rate"] == 1e-3 and mean.hyper_parameters["max_tokens"] == 8
    assert result["rows"]["cut_train"] == 36


def test_two_models_are_compared_on_the_same_rows_alone(data, model_folder, tmp_path):
    ours, other, elsewhere = (tmp_path / name for name in ("ours", "other", "elsewhere"))
    fine_tune(small_request(data, model_folder, ours, epochs=6))
    training = HyperParameters(1, learning_rate=1e-7)
    fine_tune(small_request(data, model_folder, other, seeds=1, untrained=True, training=training))
    rows = compare(ours, other)
    assert [row["seed"] for row in rows] == [0, "vote"]
    said = [json.loads((folder / "seed-0" / "predictions.json").read_text()) for folder in (ours, other)]
    right = [[answer == target for answer, target in zip(side["predicted"], side["targets"], strict=True)] for side in said]
    assert rows[0]["only_this_right"] == sum(a and not b for a, b in zip(*right, strict=True))
    assert rows[0]["accuracy"] - rows[0]["other_accuracy"] == pytest.approx(
        (rows[0]["only_this_right"] - rows[0]["only_other_right"]) / 12)
    write_rows(data / "single.test.jsonl", rows_of(12, first=2000))
    fine_tune(small_request(data, model_folder, elsewhere, seeds=1))
    with pytest.raises(DataError, match="were judged on other test rows"):
        compare(ours, elsewhere)
    with pytest.raises(DataError, match="about the same rows; leave one of them out"):
        comparison_table([ours, elsewhere])
    header, table = comparison_table([ours, other])
    assert header == ["", "single", "average"]
    assert [row[0] for row in table] == [
        "tiny", "tiny, untrained (epochs 1, batch 16, learning_rate 1e-07)", "majority class"]
    mean = read_result(ours)["summary"]["accuracy"]
    assert table[0][1] == f"{100 * mean['mean']:.2f} ± {100 * mean['deviation']:.2f}" and table[2][1:] == ["50.00", "50.00"]
    with pytest.raises(DataError, match="is a second result of tiny on single"):
        comparison_table([ours, ours])
    with pytest.raises(CheckpointError, match=r"has no result.json; a finished fine-tuning has one"):
        comparison_table([tmp_path])


def test_an_average_stands_in_complete_rows_alone(data, model_folder, tmp_path):
    fine_tune(small_request(data, model_folder, tmp_path / "a", seeds=1, epochs=1))
    fine_tune(small_request(data, model_folder, tmp_path / "b", seeds=1, epochs=1, untrained=True))
    result = read_result(tmp_path / "a")
    result["task"]["name"] = "another"
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "result.json").write_text(json.dumps(result))
    fine_tune(small_request(data, model_folder, tmp_path / "d", seeds=1, epochs=1, pooling="mean"))
    header, table = comparison_table([tmp_path / name for name in "abcd"])
    assert header == ["", "single", "another", "average"]
    assert [row[0] for row in table] == ["tiny", "tiny, untrained", 'tiny (pooling "mean")', "majority class"]
    assert table[0][3] is not None and table[1][2:] == [None, None]


def test_all_faulty_settings_are_told(data, model_folder, tmp_path):
    training = HyperParameters(epochs=0, batch=0, learning_rate=2, clip=0, warmup=1)
    wrong = small_request(data, model_folder, tmp_path / "x", seeds=0, training=training, validation=0.9, max_tokens=3)
    nowhere = str(tmp_path / "nowhere")
    with pytest.raises(UserError) as caught:
        fine_tune(dataclasses.replace(wrong, data=nowhere, model=nowhere, device="gpu"))
    assert [fault.partition(":")[0] for fault in caught.value.faults] == [
        "--seeds", "--epochs", "--batch", "--max-tokens", "--learning-rate", "--clip", "--validation", "--warmup",
        "device", nowhere, nowhere]
    write_rows(data / "single.train.jsonl", rows_of(40)[::2])
    with pytest.raises(DataError, match="has no row of 'yes'; every class must have one"):
        fine_tune(small_request(data, model_folder, tmp_path / "x"))
