"""The mirror to Weights & Biases: offline first, and unable to stop or delay a run."""

from __future__ import annotations

import sys
import threading
import time

import pytest

from megatron_ttl.config.schema import LogConfig
from megatron_ttl.train import tracking
from megatron_ttl.train.tracking import WandbMirror

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


def mirror_of(tmp_path, remote, **settings) -> WandbMirror:
    return WandbMirror(OFFLINE, tmp_path, "name", {}, open_run=lambda: remote, **settings)


def test_disabled_does_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    mirror = WandbMirror(LogConfig(), tmp_path, "name", {})
    mirror.log({"loss": 1.0}, 1)
    mirror.close()
    assert mirror.run_id is None
    assert mirror.missing_rows == 0
    assert list(tmp_path.iterdir()) == []


def test_rows_arrive_in_order_and_the_run_is_finished(tmp_path, capsys):
    remote = FakeRun()
    mirror = mirror_of(tmp_path, remote)
    for step in range(500):
        mirror.log({"loss": float(step)}, step)
    mirror.close()
    mirror.close()
    assert remote.rows == [(step, {"loss": float(step)}) for step in range(500)]
    assert remote.finished
    assert capsys.readouterr().err == ""


def test_the_run_id_is_kept_for_the_resume(tmp_path):
    first = mirror_of(tmp_path, FakeRun())
    again = mirror_of(tmp_path, FakeRun(), run_id=first.run_id)
    assert first.run_id and again.run_id == first.run_id
    assert mirror_of(tmp_path, FakeRun()).run_id != first.run_id
    first.close()
    again.close()


def test_a_missing_package_is_one_warning(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    mirror = WandbMirror(OFFLINE, tmp_path, "name", {})
    mirror._thread.join(5)
    for step in range(3):
        mirror.log({"loss": 1.0}, step)
    mirror.close()
    error = capsys.readouterr().err
    assert error.count("warning: wandb: ModuleNotFoundError") == 1
    assert "wandb: 3 rows did not get through; metrics.jsonl has them all" in error


@pytest.mark.parametrize("failure", [RuntimeError("on fire"), SystemExit(3), KeyboardInterrupt("no")])
def test_a_raising_mirror_is_one_warning(tmp_path, capsys, failure):
    class Raises(FakeRun):
        def log(self, row, step) -> None:
            if step == 2:
                raise failure
            super().log(row, step)

    remote = Raises()
    mirror = mirror_of(tmp_path, remote)
    for step in range(10):
        mirror.log({}, step)
    mirror._thread.join(5)
    mirror.log({}, 11)
    mirror.close()
    error = capsys.readouterr().err
    assert [step for step, _ in remote.rows] == [0, 1]
    assert error.count(f"warning: wandb: {type(failure).__name__}") == 1
    assert "9 rows did not get through" in error


def test_a_blocking_mirror_delays_no_step_and_drops_are_counted(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tracking, "_CLOSE_WAIT_S", 0.2)
    release = threading.Event()

    class Blocks(FakeRun):
        def log(self, row, step) -> None:
            release.wait(60)

    mirror = mirror_of(tmp_path, Blocks())
    started = time.perf_counter()
    for step in range(3000):
        mirror.log({"loss": 1.0}, step)
    assert time.perf_counter() - started < 1.0
    assert mirror.missing_rows == 3000
    mirror.close()
    assert time.perf_counter() - started < 3.0
    release.set()
    error = capsys.readouterr().err
    assert error.count("it does not answer") == 1
    assert "3000 rows did not get through" in error


def test_a_real_offline_run_writes_under_the_run_folder(tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", "/dev/null")  # a home that cannot be written
    monkeypatch.delenv("WANDB_MODE", raising=False)
    mirror = WandbMirror(OFFLINE, tmp_path / "run", "name", {"train": {"lr": 1e-3}}, run_id="ab12cd34")
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
    tracking.open_wandb(LogConfig(wandb="online"), tmp_path / "run", "name", {"a": 1}, "ab12cd34")
    assert (asked["id"], asked["resume"], asked["mode"]) == ("ab12cd34", "allow", "online")
    assert asked["dir"] == str(tmp_path / "run") and asked["config"] == {"a": 1}
    assert asked["settings"].console == "off" and asked["settings"].init_timeout <= 20


@pytest.mark.slow
def test_online_without_a_network_neither_hangs_nor_stops(tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb")
    monkeypatch.setattr(tracking, "_INIT_WAIT_S", 2)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("WANDB_SILENT", "true")
    started = time.monotonic()
    mirror = WandbMirror(LogConfig(wandb="online"), tmp_path, "name", {})
    mirror.log({"loss": 1.0}, 1)
    assert time.monotonic() - started < 0.5
    mirror.close()
    assert time.monotonic() - started < 15
    assert capsys.readouterr().err.count("warning: wandb: ") == 2
