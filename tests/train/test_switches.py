"""STOP and SAVE in the run folder: honoured after the step that is running, on every process, and removed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_session import train_here, write_data, write_settings

from megatron_ttl.testing import run_distributed
from megatron_ttl.train import session as session_module
from megatron_ttl.train.switches import Switches


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def switched(mesh, deepspeed, run, folder, name, at_step):
    """Put a switch file into the run folder while step `at_step` runs, as somebody at a shell would."""
    real, steps = session_module.Engine.train_step, []

    def train_step(self, *arguments):
        steps.append(None)
        if len(steps) == at_step and mesh.rank == mesh.world_size - 1:
            (Path(folder) / name).touch()
        return real(self, *arguments)

    session_module.Engine.train_step = train_step
    try:
        return train_here(mesh, deepspeed, run, [f"run.dir={folder}"])
    finally:
        session_module.Engine.train_step = real


def events(folder, event):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["step"] for row in rows if row["event"] == event]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_stop_file_ends_the_run_with_a_checkpoint(data, tmp_path, processes):
    """Within two steps, with 85; the file is gone, so that the next start goes on to the end."""
    deepspeed, run = write_settings(tmp_path, data, tmp_path / "unused")
    folder = tmp_path / "run"
    codes = run_distributed(switched, processes, str(deepspeed), str(run), str(folder), "STOP", 4)
    assert codes == [85] * processes and not (folder / "STOP").exists()
    assert events(folder, "checkpoint")[0] in (4, 5)
    assert run_distributed(train_here, processes, str(deepspeed), str(run), [f"run.dir={folder}"]) == [0] * processes
    assert events(folder, "train") == list(range(1, 13))


def test_a_save_file_asks_for_a_checkpoint(data, tmp_path):
    deepspeed, run = write_settings(tmp_path, data, tmp_path / "unused")
    folder = tmp_path / "run"
    assert run_distributed(switched, 2, str(deepspeed), str(run), str(folder), "SAVE", 4) == [0, 0]
    saved = events(folder, "checkpoint")
    assert len(saved) == 2 and saved[0] in (4, 5) and saved[1] == 12
    assert not (folder / "SAVE").exists()


def test_a_file_that_cannot_be_removed_is_told(tmp_path, capsys):
    (tmp_path / "SAVE").mkdir()
    switches = Switches(tmp_path, looks=True)
    assert switches.asked() == (False, True)
    switches.honoured(False, True)
    assert "SAVE: could not be removed" in capsys.readouterr().err
    assert Switches(tmp_path, looks=False).asked() == (False, False)
