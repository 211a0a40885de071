"""Checkpoints written behind the training: the same bytes, no waiting, no overtaking, nothing lost at the end."""

from __future__ import annotations

import json
import threading
import time

import pytest
import torch
from layout_runs import Case, deepspeed_settings, run_of, steps_of_data
from tiny_session import train_here, write_data, write_settings

from megatron_ttl.checkpoint.peers import ALONE
from megatron_ttl.checkpoint.state import capture
from megatron_ttl.checkpoint.store import CheckpointStore
from megatron_ttl.testing import run_distributed
from megatron_ttl.train.anomalies import DivergedError
from megatron_ttl.train.engine import Engine
from megatron_ttl.train.saver import Saver

OFTEN = ["checkpoint.every_steps=2", "train.steps=8"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "data")


def tensor_sums(folder):
    """Checksums of all files of tensors, by checkpoint."""
    found = {}
    for path in sorted(folder.glob("checkpoints/step-*/manifest.json")):
        files = json.loads(path.read_text())["files"]
        found[path.parent.name] = {name: entry["checksum"] for name, entry in files.items() if name != "record.json"}
    return found


@pytest.mark.parametrize("processes", [1, 2])
def test_the_same_bytes_as_when_the_training_waits(data, tmp_path, processes):
    """At every step, though the next steps were running while they were written."""
    sums = []
    for behind in ("true", "false"):
        (tmp_path / behind).mkdir()
        deepspeed, run = write_settings(tmp_path / behind, data, tmp_path / behind / "run")
        codes = run_distributed(train_here, processes, str(deepspeed), str(run),
                                ["checkpoint.every_steps=1", f"checkpoint.asynchronous={behind}"])
        assert codes == [0] * processes
        sums.append(tensor_sums(tmp_path / behind / "run"))
    assert len(sums[0]) == 12 and sums[0] == sums[1]


CAPTURED = [Case(stage=stage) for stage in range(4)] + [Case(stage=2, offload=True), Case(stage=1, precision="bf16"),
                                                        Case(engine="flat")]
CAPTURED_BY_TWO = [Case(data=2, stage=stage) for stage in range(4)] + [Case(tensor=2), Case(pipeline=2, stage=0)]


def changed_by_a_step(mesh, cases):
    """Return what of a captured state is another after the next step."""
    found = {}
    for case in cases:
        run, cut = run_of(case), mesh.cut(case.tensor, case.pipeline, case.sequence)
        engine = Engine(run, deepspeed_settings(case), cut, options=case.options)
        data = steps_of_data(run.model.vocab_size, case.micro_batch, cut.data_parallel_rank, cut.data_parallel_size)
        engine.train_step(next(data), 1e-2)
        captured = capture(engine.state, run.model, cut)
        before = {(group, name): piece.tensor.clone() for group, named in captured.items() for name, piece in named.items()}
        engine.train_step(next(data), 1e-2)
        found[case] = [key for key, tensor in before.items() if not torch.equal(tensor, captured[key[0]][key[1]].tensor)]
        engine.close()
    return found


@pytest.mark.parametrize(("processes", "cases"), [(1, CAPTURED), (2, CAPTURED_BY_TWO)])
def test_what_is_being_written_does_not_change(processes, cases):
    """A captured state shares no memory with the engine, under any stage: the next steps run while it is written."""
    for by_case in run_distributed(changed_by_a_step, processes, cases):
        assert by_case == {case: [] for case in cases}


def on_a_slow_disk(mesh, deepspeed, run, overrides):
    """Let the writing of step 2 wait until step 3 was trained; return when what happened."""
    from megatron_ttl.checkpoint import store
    from megatron_ttl.train.engine import Engine

    write, step_of, trained, seen = store._write_pieces, Engine.train_step, threading.Event(), []

    def train_step(self, *rest):
        result = step_of(self, *rest)
        seen.append("step")
        if seen.count("step") == 3:
            trained.set()
        return result

    def slow(folder, *rest):
        step = int(folder.name[5:13])
        if step == 2:
            seen.append(f"waited {trained.wait(20)}")
        else:
            time.sleep(0.3)
        result = write(folder, *rest)
        seen.append(f"wrote {step}")
        return result

    store._write_pieces, Engine.train_step = slow, train_step
    try:
        return train_here(mesh, deepspeed, run, overrides), seen
    finally:
        store._write_pieces, Engine.train_step = write, step_of


@pytest.mark.parametrize("processes", [1, 2])
def test_steps_go_on_and_saves_keep_their_order(data, tmp_path, processes):
    """The first save can only end after a later step; the second waits for it; the end waits for the last."""
    deepspeed, run = write_settings(tmp_path, data, tmp_path / "run")
    for code, seen in run_distributed(on_a_slow_disk, processes, str(deepspeed), str(run), OFTEN):
        assert code == 0 and "waited True" in seen, seen
        assert [event for event in seen if event.startswith("wrote")] == ["wrote 2", "wrote 4", "wrote 6", "wrote 8"]
        assert seen.index("wrote 2") > [i for i, event in enumerate(seen) if event == "step"][2]
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    kept = [row for row in rows if row["event"] == "checkpoint"]
    assert [row["step"] for row in kept] == [2, 4, 6, 8] and all(row["write_s"] > 0.3 <= row["stall_s"] for row in kept[-1:])
    assert all(row["bytes"] > 100_000 and row["tokens"] == row["step"] * 256 for row in kept)


def fails_while_writing(mesh, deepspeed, run, overrides):
    """End the training with an error in step 4, while the checkpoint of step 2 is still being written."""
    from megatron_ttl.checkpoint import store
    from megatron_ttl.train.engine import Engine

    write, step_of, begun = store._write_pieces, Engine.train_step, threading.Event()
    steps = []

    def slow(*rest):
        begun.wait(20)
        time.sleep(0.5)
        return write(*rest)

    def train_step(self, *rest):
        steps.append(None)
        if len(steps) == 4:
            begun.set()
            raise DivergedError("planted")
        return step_of(self, *rest)

    store._write_pieces, Engine.train_step = slow, train_step
    try:
        train_here(mesh, deepspeed, run, overrides)
    except DivergedError as error:
        return str(error), [path.name for path in CheckpointStore(run_dir(overrides)).directory.iterdir()]
    finally:
        store._write_pieces, Engine.train_step = write, step_of


def run_dir(overrides):
    return next(text for text in overrides if text.startswith("run.dir=")).removeprefix("run.dir=") + "/checkpoints"


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_fails_still_keeps_what_it_was_writing(data, tmp_path, processes):
    deepspeed, run = write_settings(tmp_path, data, tmp_path / "run")
    overrides = ["checkpoint.every_steps=2", f"run.dir={tmp_path}/run"]
    for message, kept in run_distributed(fails_while_writing, processes, str(deepspeed), str(run), overrides):
        assert message == "planted" and kept == ["step-00000002"]


def test_weights_that_are_no_numbers_are_not_kept(tmp_path):
    """They would push out the last good checkpoint; moments and random states may hold what they like."""
    saver = Saver(CheckpointStore(tmp_path), ALONE)
    good = {"weights": {"a": torch.ones(3), "b": torch.ones(2)}, "rng": {"torch": torch.zeros(2, dtype=torch.uint8)}}
    saver.begin(1, good, {"consumed_tokens": 5})
    outcome = saver.settle()
    assert outcome.error is None and outcome.saved.written and outcome.tokens == 5
    bad = good | {"weights": {"a": torch.ones(3), "b": torch.tensor([1.0, torch.inf])}}
    saver.begin(2, bad, {"consumed_tokens": 10})
    fault = saver.settle().error
    with pytest.raises(DivergedError, match=r"step 2: 1 tensors hold what is no number \(b\); weights must be finite"):
        raise fault
    assert CheckpointStore(tmp_path).steps() == [1]
