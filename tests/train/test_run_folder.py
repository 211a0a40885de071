"""What a user does wrong with a run, and what a disk does: each one sentence, nothing lost."""

from __future__ import annotations

import errno
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_folder import documents, write_dataset, write_tokenizer
from tiny_session import train_here, write_data, write_settings

from megatron_ttl.config.load import load_settings
from megatron_ttl.errors import CheckpointError, ConfigError, DataError
from megatron_ttl.testing import run_distributed
from megatron_ttl.train.open_data import open_data
from megatron_ttl.train.run_folder import RunFolder, open_checkpoint


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data, settings and a finished run of four steps with two checkpoints."""
    folder = tmp_path_factory.mktemp("place")
    deepspeed, run = write_settings(folder, write_data(folder / "data"), folder / "done")
    overrides = ["train.steps=4", "checkpoint.every_steps=2", "schedule.warmup_steps=1"]
    run_distributed(train_here, 1, str(deepspeed), str(run), overrides)
    return folder


def settings(place, *overrides):
    return load_settings(place / "machine.json", place / "run.toml",
                         ["train.steps=4", "checkpoint.every_steps=2", "schedule.warmup_steps=1", *overrides])


def copy_of_the_run(place, tmp_path):
    return shutil.copytree(place / "done", tmp_path / "run")


def test_two_runs_in_one_folder(place, tmp_path):
    """The second is told who has it; when the first is gone the folder is free, without any clean-up."""
    first, second = (RunFolder(settings(place, f"run.dir={tmp_path}/one")) for _ in range(2))
    first.claim()
    with pytest.raises(ConfigError, match=r"is in use by host .*, pid \d+, since .*; a run folder has one run at a time"):
        second.claim()
    first.release()
    second.claim()
    second.release()


def test_a_folder_that_cannot_be_written(place, tmp_path):
    """A file where the folder should be."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written .*; choose another run.dir"):
        RunFolder(settings(place, f"run.dir={tmp_path}/file")).claim()


def test_a_changed_setting_is_named_with_both_values(place, tmp_path):
    """What shapes the curve may not change, what does not may."""
    run = copy_of_the_run(place, tmp_path)
    folder = RunFolder(settings(place, f"run.dir={run}", "optimizer.lr=2e-2", "run.seed=8"))
    with pytest.raises(ConfigError, match=r"optimizer.lr: was 0.01 in the run so far, is now 0.02"):
        folder.starting_point()
    with pytest.raises(ConfigError, match=r"run.seed: was 7"):
        folder.starting_point()
    checkpoint, _ = RunFolder(settings(place, f"run.dir={run}", "log.every_steps=3")).starting_point()
    assert checkpoint.step == 4


def test_a_damaged_checkpoint_is_passed_over_and_named(place, tmp_path):
    """One flipped byte: the older one is taken and the file is named. All damaged: no fresh start."""
    run = copy_of_the_run(place, tmp_path)
    for step, outcome in ((4, 2), (2, None)):
        path = run / f"checkpoints/step-{step:08d}/exp_avg.safetensors"
        damaged = bytearray(path.read_bytes())
        damaged[-3] ^= 1
        path.write_bytes(damaged)
        folder = RunFolder(settings(place, f"run.dir={run}"))
        if outcome:
            checkpoint, warnings = folder.starting_point()
            assert checkpoint.step == outcome
            assert "exp_avg.safetensors" in warnings[0]
        else:
            with pytest.raises(CheckpointError, match="no checkpoint is whole"):
                folder.starting_point()


def test_a_run_without_its_settings(place, tmp_path):
    """Checkpoints that nobody can explain are not gone on with."""
    run = copy_of_the_run(place, tmp_path)
    (run / "settings.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"settings.json: the settings of the run cannot be read"):
        RunFolder(settings(place, f"run.dir={run}")).starting_point()


@pytest.mark.parametrize(("overrides", "message"), [
    (["run.start_from={run}/checkpoints/step-00000002", "model.intermediate_size=96"], "model.intermediate_size: is 96, and 64 in the checkpoint"),
    (["run.start_from={run}", "train.sequence_length=16"], "train.sequence_length: is 16, and 32 in the checkpoint"),
    (["run.start_from={run}"], "train.steps: 4, and the checkpoint is at step 4"),
    (["run.start_from={run}/nowhere"], "no checkpoint is there"),
])
def test_a_branch_must_fit_its_parent(place, tmp_path, overrides, message):
    """Another model, another length, no steps left, no parent."""
    chosen = [o.format(run=place / "done") for o in overrides]
    with pytest.raises((ConfigError, CheckpointError), match=message):
        RunFolder(settings(place, f"run.dir={tmp_path}/branch", *chosen)).starting_point()


def test_a_checkpoint_is_found_by_its_run_or_its_folder(place):
    """Both spellings of --run and run.start_from."""
    assert open_checkpoint(place / "done").step == 4
    assert open_checkpoint(place / "done/checkpoints/step-00000002").step == 2


@pytest.mark.parametrize(("overrides", "messages"), [
    (["model.vocab_size=300"], ["model.vocab_size: 300, and the tokenizer of .*train has 350 pieces"]),
    (['data.sources=[{prefix="{place}/data/nothing"}]', 'evaluation.prefixes=["{place}/data/neither"]'],
     ["nothing.bin: does not exist", "neither.idx: does not exist"]),
    (['data.sources=[{prefix="{place}/other/train"}]'], ["held: tokenizer checksum is .* they must be equal"]),
    (['evaluation.prefixes=["{place}/data/twin"]'], ["twin: is the same data as the training source .*train"]),
    (['data.sources=[{prefix="{place}/data/cut"}]'], ["cut.bin: ends 11 bytes early"]),
    (["energy.enabled=true", "energy.country_iso_code=XXX"], ["'XXX' is not in codecarbon's table"]),
], ids=["vocabulary", "missing", "tokenizer", "twin", "truncated", "country"])
def test_data_that_do_not_fit_are_refused_before_the_first_step(place, overrides, messages):
    """Every fault of the data at once."""
    if not (place / "other").exists():
        (place / "other").mkdir()
        write_dataset(place / "other/train", write_tokenizer(place / "other/tokenizer", seed=9), documents(50))
        for suffix in (".bin", ".idx", ".json"):
            shutil.copy(f"{place}/data/train{suffix}", f"{place}/data/cut{suffix}")
            shutil.copy(f"{place}/data/train{suffix}", f"{place}/data/twin{suffix}")
        data = Path(f"{place}/data/cut.bin")
        data.write_bytes(data.read_bytes()[:-11])
    run = settings(place, *(o.replace("{place}", str(place)) for o in overrides)).run
    for message in messages:
        with pytest.raises(DataError, match=message):
            open_data(run)


def full_disk(mesh, deepspeed, run, overrides, failures):
    """Train while the first `failures` saves find no space; return the exit code or the error's."""
    from megatron_ttl.checkpoint import store
    from megatron_ttl.errors import UserError

    real, left = store._write_pieces, [failures]

    def fill(*arguments):
        if left[0]:
            left[0] -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    store._write_pieces = fill
    try:
        return train_here(mesh, deepspeed, run, overrides)
    except UserError as error:
        return int(error.exit_code)
    finally:
        store._write_pieces = real


@pytest.mark.parametrize(("failures", "code", "kept"), [(2, 0, [6, 8, 10, 12]), (3, 75, [])])
def test_a_full_disk_is_survived_twice(place, tmp_path, failures, code, kept):
    """Two failed saves and the run goes on; after the third it leaves with 75. No temporary folder stays."""
    overrides = [f"run.dir={tmp_path}/run", "checkpoint.every_steps=2"]
    arguments = (str(place / "machine.json"), str(place / "run.toml"), overrides, failures)
    assert run_distributed(full_disk, 1, *arguments)[0] == code
    folder = tmp_path / "run/checkpoints"
    assert [path.name for path in sorted(folder.glob("*"))] == [f"step-{step:08d}" for step in kept]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_cannot_keep_its_end_is_not_done(place, tmp_path, processes):
    """The last save is not followed by another: its failure is the run's, on every process."""
    arguments = (str(place / "machine.json"), str(place / "run.toml"), [f"run.dir={tmp_path}/run"], 1)
    assert run_distributed(full_disk, processes, *arguments) == [75] * processes
    assert not list((tmp_path / "run/checkpoints").glob("*"))


def diverge(mesh, deepspeed, run, overrides):
    """Train with a learning rate that breaks everything; return the message."""
    from megatron_ttl.errors import UserError

    try:
        train_here(mesh, deepspeed, run, overrides)
    except UserError as error:
        return int(error.exit_code), str(error)
    return 0, ""


def test_a_loss_that_is_no_number_is_not_kept(place, tmp_path):
    """The run ends with the step named, and no checkpoint of the broken state."""
    overrides = [f"run.dir={tmp_path}/run", "optimizer.lr=0.9", "optimizer.eps=1e-30", "model.rms_norm_eps=1e-38",
                 "optimizer.weight_decay=1e30", "train.gradient_clipping=0.0", "checkpoint.every_steps=1"]
    code, message = run_distributed(diverge, 1, str(place / "machine.json"), str(place / "run.toml"), overrides)[0]
    assert code == 1
    assert re.match("step 4: the gradient is not finite, 3 times in a row; it must be .*; go on from step 1 with a lower "
                    "optimizer.lr .*--skip-steps 2-4", message)
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000001"]


def test_the_command_itself_in_a_folder_that_is_taken(repository, place):
    """One screen and exit code 2, from the real command."""
    folder = RunFolder(settings(place))
    folder.claim()
    command = [sys.executable, "pretrain_ttl.py", "--deepspeed_config", str(place / "machine.json"), "--config",
               str(place / "run.toml")]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    folder.release()
    assert done.returncode == 2
    assert "is in use by" in done.stderr and "Traceback" not in done.stderr
    assert len(json.dumps(done.stderr)) < 600


def test_a_signal_before_the_first_step_is_not_lost(repository, place, tmp_path):
    """SIGTERM while the run is still being prepared: one step, a checkpoint, exit code 85."""
    command = [sys.executable, "pretrain_ttl.py", "--deepspeed_config", str(place / "machine.json"), "--config",
               str(place / "run.toml"), f"run.dir={tmp_path}/run", "train.steps=4000"]
    with subprocess.Popen(command, cwd=repository, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as run:
        assert "parameters on" in run.stderr.readline()
        run.terminate()
        said = run.stderr.read()
    assert run.returncode == 85, said
    assert "SIGTERM: stopping after this step" in said
    assert len(list((tmp_path / "run/checkpoints").iterdir())) == 1
