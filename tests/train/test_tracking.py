"""The mirrors to Weights & Biases and TensorBoard: offline first, and unable to stop or delay a run."""

from __future__ import annotations

import sys
import threading
import time

import pytest
from patience import patient

from megatron_ttl.config.schema import LogConfig
from megatron_ttl.train import tracking
from megatron_ttl.train.tracking import Mirror, Mirrors

OFFLINE = LogConfig(wandb="offline", wandb_project="a_test")


class FakeRun:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict]] = []
        self.finished = False

    def log(self, row, step) -> None:
        self.rows.append((step, row))

    def finish(self) -> None:
        self.finished = True


def test_disabled_does_nothing(tmp_path, monkeypatch):
    for name in ("wandb", "tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    mirrors = Mirrors(LogConfig(), tmp_path, {})
    mirrors.log({"loss": 1.0}, 1)
    mirrors.close()
    assert mirrors.wandb_run_id is None
    assert list(tmp_path.iterdir()) == []


def test_the_run_id_is_kept_for_the_resume(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "WandbRun", lambda *_: FakeRun())
    monkeypatch.setattr(tracking, "tear_down_wandb", lambda: None)
    first = Mirrors(OFFLINE, tmp_path, {})
    again = Mirrors(OFFLINE, tmp_path, {}, first.wandb_run_id)
    assert first.wandb_run_id and again.wandb_run_id == first.wandb_run_id
    assert Mirrors(OFFLINE, tmp_path, {}).wandb_run_id != first.wandb_run_id


def test_rows_arrive_in_order_and_the_run_is_finished(capsys):
    remote = FakeRun()
    mirror = Mirror("fake", lambda: remote)
    for step in range(500):
        mirror.log({"loss": float(step)}, step)
    mirror.wait(20)
    mirror.wait(20)
    assert remote.rows == [(step, {"loss": float(step)}) for step in range(500)]
    assert remote.finished and mirror.missing_rows == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_missing_package_is_one_warning(tmp_path, capsys, monkeypatch, name):
    for module in (name, *(found for found in list(sys.modules) if found.startswith(f"{name}."))):
        monkeypatch.setitem(sys.modules, module, None)
    mirrors = Mirrors(OFFLINE if name == "wandb" else LogConfig(tensorboard=True), tmp_path, {})
    for step in range(3):
        mirrors.log({"loss": 1.0}, step)
    mirrors.close()
    warnings = capsys.readouterr().err
    assert warnings.count("warning") == 1
    assert f"warning: {name}: ModuleNotFoundError" in warnings and "it took 0 rows" in warnings


@pytest.mark.parametrize("failure", [RuntimeError("on fire"), SystemExit(3), KeyboardInterrupt("no")])
def test_a_raising_mirror_is_one_warning_and_is_let_go(capsys, failure):
    class Raises(FakeRun):
        def log(self, row, step) -> None:
            if step == 2:
                raise failure
            super().log(row, step)

    remote, let_go = Raises(), []
    mirror = Mirror("fake", lambda: remote, lambda: let_go.append(1))
    for step in range(10):
        mirror.log({}, step)
    mirror._thread.join(5)
    mirror.log({}, 11)
    mirror.wait(20)
    assert [step for step, _ in remote.rows] == [0, 1]
    warnings = capsys.readouterr().err
    assert warnings.count("warning") == 1
    assert f"warning: fake: {type(failure).__name__}" in warnings
    assert "it took 2 rows, and the run goes on without it; metrics.jsonl has every row" in warnings
    assert let_go == [1]


def test_a_blocking_mirror_delays_no_step_and_is_let_go(capsys):
    release, let_go = threading.Event(), []

    class Blocks(FakeRun):
        def log(self, row, step) -> None:
            release.wait(60)

    mirror = Mirror("fake", Blocks, lambda: let_go.append(1))
    started = time.perf_counter()
    for step in range(3000):
        mirror.log({"loss": 1.0}, step)
    assert time.perf_counter() - started < patient(1.0)
    assert mirror._rows.qsize() <= 1000
    mirror.wait(0.2)
    assert time.perf_counter() - started < patient(3.0)
    release.set()
    warnings = capsys.readouterr().err
    assert warnings.count("warning") == 1 and "fake: it does not answer; it took 0 of 3000 rows" in warnings
    assert let_go == [1]


def test_a_slow_mirror_says_how_many_rows_it_took(capsys, monkeypatch):
    monkeypatch.setattr(tracking, "_QUEUE_ROWS", 5)
    release = threading.Event()

    class Slow(FakeRun):
        def log(self, row, step) -> None:
            release.wait(60)

    mirror = Mirror("fake", Slow)
    for step in range(3000):
        mirror.log({"loss": 1.0}, step)
    release.set()
    mirror.wait(20)
    warnings = capsys.readouterr().err
    assert warnings.count("warning") == 1
    assert "fake: it was too slow; it took 5 of 3000 rows" in warnings or "it took 6 of 3000 rows" in warnings


def test_no_thread_left_is_one_warning(capsys, monkeypatch):
    def refuse(_thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    mirror = Mirror("fake", FakeRun)
    mirror.log({}, 1)
    mirror.wait(20)
    assert capsys.readouterr().err.count("warning: fake: RuntimeError: can't start new thread") == 1


def test_a_real_offline_run_writes_under_the_run_folder(tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", "/dev/null")  # a home that cannot be written
    monkeypatch.delenv("WANDB_MODE", raising=False)
    mirror = Mirrors(OFFLINE, tmp_path / "run", {"train": {"lr": 1e-3}}, "ab12cd34")
    for step in range(1, 21):
        mirror.log({"loss": 3.0 / step, "energy_source": {"cpu": "estimated"}}, step)
    mirror.close()
    assert "warning" not in capsys.readouterr().err
    files = list((tmp_path / "run" / "wandb").glob("offline-run-*/run-ab12cd34.wandb"))
    assert len(files) == 1
    assert b"energy_source" in files[0].read_bytes()


def test_wandb_is_asked_to_continue_the_run_and_to_stay_quiet(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    asked = {}
    monkeypatch.setattr(wandb, "init", lambda **settings: asked.update(settings))
    monkeypatch.setattr(wandb, "setup", lambda settings: asked.update(before=settings.silent))
    tracking.WandbRun(LogConfig(wandb="online"), tmp_path / "run", {"a": 1}, "ab12cd34")
    assert asked["before"] and asked["name"] == "run"
    assert (asked["id"], asked["resume"], asked["mode"]) == ("ab12cd34", "allow", "online")
    assert asked["dir"] == str(tmp_path / "run") and asked["config"] == {"a": 1}
    assert asked["settings"].console == "off" and asked["settings"].init_timeout <= 20


@pytest.fixture()
def tensorboard():
    """Read the curves of a folder as TensorBoard does."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def read(folder):
        found = accumulator.EventAccumulator(str(folder), {accumulator.SCALARS: 0}).Reload()
        return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
    return read


def test_tensorboard_shows_the_figures_of_every_row(tmp_path, capsys, tensorboard):
    mirrors = Mirrors(LogConfig(tensorboard=True), tmp_path, {})
    mirrors.log({"event": "train", "step": 1, "loss": 3.5, "tokens": 256, "epochs": {"data/pt": 0.5}, "time": "now",
                 "energy_stale": True, "energy_source": {"cpu": "estimated"}, "mfu": None, "lr": float("nan")}, 1)
    mirrors.log({"event": "checkpoint", "step": 1, "tokens": 256}, 1)
    mirrors.log({"event": "evaluation", "step": 2, "tokens": 512, "loss/data/held": 4.25}, 2)
    mirrors.close()
    assert tensorboard(tmp_path / "tensorboard") == {"loss": [(1, 3.5)], "tokens": [(1, 256.0), (2, 512.0)],
                                                     "epochs/data/pt": [(1, 0.5)], "loss/data/held": [(2, 4.25)]}
    assert capsys.readouterr().err == ""


def test_tensorboard_forgets_what_a_killed_run_wrote_after_its_checkpoint(tmp_path, tensorboard, monkeypatch):
    """metrics.jsonl is cut in the same place."""
    clock = iter(range(1_000_000_000, 1_000_001_000))
    monkeypatch.setattr(tracking.time, "time", lambda: float(next(clock)))
    killed = tracking.TensorBoardFile(tmp_path)
    for step in range(1, 6):
        killed.log({"event": "train", "loss": float(step)}, step)
    resumed = tracking.TensorBoardFile(tmp_path)  # the other was not closed: every row is written at once
    resumed.log({"event": "resume"}, 3)
    for step in range(4, 8):
        resumed.log({"event": "train", "loss": 10.0 * step}, step)
    resumed.finish()
    assert tensorboard(tmp_path)["loss"] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0), (5, 50.0), (6, 60.0), (7, 70.0)]
