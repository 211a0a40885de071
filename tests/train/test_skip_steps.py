"""Steps that are left out: exactly their samples, whether known from the start or found out later."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_session import write_data, write_settings

from megatron_ttl.checkpoint.store import CheckpointStore
from megatron_ttl.config.load import load_settings
from megatron_ttl.config.skips import range_fault, ranges_of, union, up_to
from megatron_ttl.errors import CheckpointError, ConfigError
from megatron_ttl.testing import run_distributed

OFTEN = ["checkpoint.every_steps=2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "data")


def recorded(mesh, deepspeed, run, overrides, skip_steps, stop_after=None):
    """Train; return the exit code or the message, and the inputs of each step that was trained."""
    from megatron_ttl.errors import UserError
    from megatron_ttl.train.loop import train
    from megatron_ttl.train.session import prepare
    from megatron_ttl.train.stop import StopRequest

    try:
        session = prepare(load_settings(deepspeed, run, overrides, skip_steps=skip_steps), mesh)
    except UserError as error:
        return str(error), {}
    real, seen = session.engine.train_step, {}
    stop = StopRequest(speaks=False)

    def train_step(micro_batches, *rest):
        step = session.state.step + 1
        seen[step] = torch.cat([ids for ids, _ in micro_batches]).tolist()
        if step == stop_after:
            stop.signal_name = "planted"
        return real(micro_batches, *rest)

    session.engine.train_step = train_step
    try:
        return int(train(session, stop)), seen
    finally:
        session.close()


def final_sums(folder):
    return json.loads((folder / "run/checkpoints/step-00000012/manifest.json").read_text())["groups"], {
        name: entry["checksum"] for name, entry in
        json.loads((folder / "run/checkpoints/step-00000012/manifest.json").read_text())["files"].items()
        if name != "record.json"}


def launch(tmp_path, data, name, skip_steps=(), stop_after=None, processes=1, more=()):
    folder = tmp_path / name
    folder.mkdir(exist_ok=True)
    deepspeed, run = write_settings(folder, data, folder / "run")
    return folder, run_distributed(recorded, processes, str(deepspeed), str(run), [*OFTEN, *more], list(skip_steps),
                                   stop_after)


@pytest.mark.parametrize("processes", [1, 2])
def test_exactly_those_samples_are_left_out(tmp_path, data, processes):
    """Known from the start, or asked for at step 9: the same run; the other steps read what they always read."""
    _, whole = launch(tmp_path, data, "whole", processes=processes)
    known, first = launch(tmp_path, data, "known", ["5-6", "11"], processes=processes)
    later, begun = launch(tmp_path, data, "later", stop_after=9, processes=processes)
    _, again = launch(tmp_path, data, "later", ["5-6", "11"], processes=processes)
    for rank in range(processes):
        everything = whole[rank][1]
        expected = {step: ids for step, ids in everything.items() if step not in (5, 6, 11)}
        assert first[rank] == (0, expected)
        assert begun[rank] == (85, {step: everything[step] for step in range(1, 10)})
        # The newest checkpoint before step 5 is that of step 4.
        assert again[rank] == (0, {step: ids for step, ids in expected.items() if step > 4})
    assert final_sums(known) == final_sums(later)
    checkpoints = later / "run/checkpoints"
    assert sorted(path.name for path in checkpoints.glob("*.set-aside")) == [
        f"step-0000000{step}.set-aside" for step in (6, 8, 9)]
    rows = [json.loads(line) for line in (later / "run/metrics.jsonl").read_text().splitlines()]
    left_out = [row for row in rows if row["event"] == "left out"]
    assert [row["step"] for row in left_out] == [5, 6, 11] and left_out[0]["samples"] == [4 * 8, 5 * 8]
    assert [row["step"] for row in rows if row["event"] == "train"] == [1, 2, 3, 4, 7, 8, 9, 10, 12]


def test_what_was_left_out_stays_left_out(tmp_path, data):
    """The next start need not say it again, and may not take it back."""
    launch(tmp_path, data, "known", ["3-4"], stop_after=7)
    known, results = launch(tmp_path, data, "known")
    assert results[0][0] == 0 and list(results[0][1]) == list(range(8, 13))
    reference, _ = launch(tmp_path, data, "reference", more=['train.skip_steps=["3", "4-4"]'])
    assert final_sums(known) == final_sums(reference)
    assert json.loads((known / "run/settings.json").read_text())["run"]["train"]["skip_steps"] == ["3-4"]


def test_no_checkpoint_before_those_steps_is_no_fresh_start(tmp_path, data):
    folder, _ = launch(tmp_path, data, "late", stop_after=5)
    before = sorted(path.name for path in (folder / "run/checkpoints").iterdir())
    _, results = launch(tmp_path, data, "late", ["1-2"])
    assert "no checkpoint is whole and fits" in results[0][0] and "left out otherwise" in results[0][0]
    assert sorted(path.name for path in (folder / "run/checkpoints").iterdir()) == before


def test_a_branch_may_not_begin_behind_them(tmp_path, data):
    folder, _ = launch(tmp_path, data, "parent", stop_after=5)
    parent = folder / "run/checkpoints/step-00000004"
    (tmp_path / "branch").mkdir()
    overrides = [f'run.start_from="{parent}"', f"run.dir={tmp_path}/branch/run"]
    _, results = launch(tmp_path, data, "branch", ["3"], more=overrides)
    assert f"{parent}: it lies behind steps that are left out otherwise (train.skip_steps, up to here: 3-3)" in results[0][0]
    _, results = launch(tmp_path, data, "branch", ["5"], more=overrides)
    assert results[0][0] == 0 and list(results[0][1]) == list(range(6, 13))


def test_setting_aside_twice(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=9)
    for _ in range(3):
        store.save(3, {"weights": {"a": torch.ones(2)}}, {})
        store.set_aside([3])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000003.set-aside", "step-00000003.set-aside-2", "step-00000003.set-aside-3"]
    with pytest.raises(CheckpointError):
        store.open(3)


@pytest.mark.parametrize("text", ["", "0", "3-2", "a", "1-", "-4", "1,2", "1 - 2", "1-2-3", "9" * 13])
def test_what_is_no_range_is_refused(tmp_path, data, text):
    assert range_fault(text)
    deepspeed, run = write_settings(tmp_path, data, Path("unused"))
    for arguments in (([], (), [text]), ([f"train.skip_steps={json.dumps([text])}"],)):
        with pytest.raises(ConfigError, match="must be a step or the first and the last one, counted from 1"):
            load_settings(deepspeed, run, *arguments)


def test_ranges_are_joined():
    assert ranges_of(["7", "1-3", "2-5", "6", "9-12"]) == [(1, 7), (9, 12)]
    assert union(["3"], ["1-2", "9"]) == ("1-3", "9-9") and union() == ()
    assert up_to(["1-3", "9-12"], 10) == [(1, 3), (9, 10)] and up_to(["9"], 8) == []
