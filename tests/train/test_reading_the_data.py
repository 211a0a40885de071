"""How the data are read changes speed, memory and how soon damage is seen; never a bit of what is learnt."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
from tiny_session import train_here, write_data, write_settings

from megatron_ttl.testing import run_distributed

PROFILE = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def curve(run_dir: Path) -> list[tuple[float, ...]]:
    rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["loss"], row["grad_norm"], row["epochs"]) for row in rows if row["event"] == "train"]


def from_disk_and_memory(mesh, folder, data):
    codes = []
    for name, reading in (("disk", {}), ("memory", {"data_loader": {"preload": True}})):
        here = Path(folder) / f"{name}-{mesh.rank}"
        here.mkdir()
        files = write_settings(here, Path(data), Path(folder) / name, {**PROFILE, **reading})
        codes.append(train_here(mesh, *map(str, files), []))
    return codes


@pytest.mark.parametrize("processes", [1, 2])
def test_preloaded_data_give_the_same_curve(data, tmp_path, processes):
    """Losses and norms, bit for bit."""
    assert run_distributed(from_disk_and_memory, processes, str(tmp_path), str(data)) == [[0, 0]] * processes
    assert len(curve(tmp_path / "disk")) == 12 and curve(tmp_path / "memory") == curve(tmp_path / "disk")


def on_large_data(mesh, deepspeed, run, after=0):
    """Train on data that count as too large to be compared when opened; the comparison begins after so many steps."""
    from megatron_ttl.data import background_check, indexed_dataset
    from megatron_ttl.data.sampler import StepBatches

    indexed_dataset.CHECKED_AT_OPEN = 0
    compare, take = background_check.BackgroundCheck._run, StepBatches.__next__
    taken = []

    def compare_later(check):
        while len(taken) < after:
            time.sleep(0.01)
        compare(check)
        taken.append("compared")

    def take_and_count(batches):
        taken.append("step")
        while len(taken) == after and "compared" not in taken:
            time.sleep(0.01)
        return take(batches)

    background_check.BackgroundCheck._run, StepBatches.__next__ = compare_later, take_and_count
    return train_here(mesh, deepspeed, run, [])


@pytest.mark.parametrize(("reading", "damaged", "steps"), [
    ({}, True, 5), ({"verify": False}, True, 12), ({}, False, 12), ({"preload": True}, True, 0)])
def test_damage_to_large_data_ends_the_run(data, tmp_path, reading, damaged, steps):
    """At the step after it was found; before the first one where all is read anyway; never, if so wished."""
    copy = Path(shutil.copytree(data, tmp_path / "data"))
    if damaged:
        path = copy / "train.bin"
        payload = bytearray(path.read_bytes())
        payload[len(payload) // 2] ^= 1
        path.write_bytes(payload)
    files = write_settings(tmp_path, copy, tmp_path / "run", {**PROFILE, "data_loader": reading})
    if steps < 12:
        with pytest.raises(RuntimeError, match="DataError: .*data/train.bin: its checksum is xxh3:"):
            run_distributed(on_large_data, 1, *map(str, files), 5)
    else:
        assert run_distributed(on_large_data, 1, *map(str, files)) == [0]
    assert steps == (len(curve(tmp_path / "run")) if (tmp_path / "run/metrics.jsonl").exists() else 0)


def shorter_than_the_comparison(mesh, deepspeed, run):
    from megatron_ttl.data import background_check, indexed_dataset
    from megatron_ttl.train.session import Session

    said = []
    indexed_dataset.CHECKED_AT_OPEN = 0
    background_check.BackgroundCheck._run = lambda check: check._stop.wait(60)
    Session.say = lambda session, line: said.append(line)
    train_here(mesh, deepspeed, run, ["train.steps=2", "schedule.warmup_steps=1"])
    return said


def test_a_run_shorter_than_the_comparison_says_so(data, tmp_path):
    """And with what it can be made up for, for the training data and the held-out ones."""
    files = write_settings(tmp_path, data, tmp_path / "run", PROFILE)
    said = run_distributed(shorter_than_the_comparison, 1, *map(str, files))[0]
    notes = [line for line in said if "before" in line and "was compared with its checksum" in line]
    assert len(notes) == 2
    assert all(f"--verify --prefix {data}/{name}" in note for note, name in zip(notes, ("train", "held"), strict=True))


def throttled(mesh, deepspeed, run):
    from megatron_ttl.data.token_file import TokenFile

    fill = TokenFile._fill
    TokenFile._fill = lambda file, block, offset: (time.sleep(0.02), fill(file, block, offset))[1]
    return train_here(mesh, deepspeed, run, [])


def test_a_slow_disk_shows_as_data_wait(data, tmp_path):
    """Eight reads of 20 ms a step cannot be hidden behind a step of a few."""
    files = write_settings(tmp_path, data, tmp_path / "run", PROFILE)
    assert run_distributed(throttled, 1, *map(str, files)) == [0]
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    waits = [row["data_wait_s"] for row in rows if row["event"] == "train"]
    assert sorted(waits)[len(waits) // 2] > 0.02
