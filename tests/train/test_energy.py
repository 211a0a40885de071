"""Energy: exact against a known power, cumulative over resumes, and unable to stop a run."""

from __future__ import annotations

import sys
import threading
import time
from types import SimpleNamespace

import pytest
from patience import patient

from megatron_ttl.config.schema import EnergyConfig
from megatron_ttl.train import energy
from megatron_ttl.train.energy import EnergyMeter, carry_on, country_faults, known_countries, label_hardware

BRAZIL = EnergyConfig(country_iso_code="BRA", measure_power_s=60.0)


class FakeTracker:
    """A source of constant power under a clock that the test moves."""

    def __init__(self, receive, power_watts: float = 300.0, grams_per_kwh: float = 100.0) -> None:
        self.receive, self.power_watts, self.grams_per_kwh = receive, power_watts, grams_per_kwh
        self.now_s, self.calls = 0.0, []
        self._hardware = [SimpleNamespace(description=lambda: "RAM()"),
                          SimpleNamespace(description=lambda: "GPU() (NVIDIA H100 80GB HBM3)")]

    def start(self) -> None:
        self.calls.append("start")

    def flush(self) -> float | None:
        self.calls.append("flush")
        kwh = self.power_watts * self.now_s / 3.6e6
        self.receive(kwh, kwh * self.grams_per_kwh / 1000)
        return kwh

    def stop(self) -> float | None:
        self.calls.append("stop")
        return 0.0


def meter_of(tmp_path, carried=None, made=None, tracker=FakeTracker, config=BRAZIL, **settings):
    """Build a meter over fake trackers; `made` receives each of them."""
    def open_tracker(_config, _directory, receive):
        fake = tracker(receive)
        if made is not None:
            made.append(fake)
        return fake
    return EnergyMeter(config, tmp_path, carried=carried, open_tracker=open_tracker, **settings)


def wait_for(condition, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.002)


def test_300_watts_for_an_hour_are_exactly_0_3_kwh(tmp_path):
    made = []
    with meter_of(tmp_path, made=made) as meter:
        wait_for(lambda: made and "flush" in made[0].calls)
        made[0].now_s = 3600.0
        state = meter.state(wait=True)
        assert state["energy_kwh"] == 0.3
        assert state["emissions_kg_co2e"] == pytest.approx(0.03, rel=1e-15)
        assert meter.reading()["energy_source"] == {"ram": "estimated", "gpu": "measured"}
    assert made[0].calls[-1] == "stop"


def test_codecarbon_itself_counts_300_watts_for_an_hour_as_0_3_kwh(tmp_path, monkeypatch):
    """The real tracker, with a fake clock and one fake component."""
    codecarbon = pytest.importorskip("codecarbon")
    import codecarbon.emissions_tracker as module
    from codecarbon.core.units import Power
    from codecarbon.external.ram import RAM

    class Heater(RAM):
        """300 W whatever happens."""

        def total_power(self) -> Power:
            return Power.from_watts(300.0)

    clock = SimpleNamespace(now_s=1000.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock.now_s, sleep=time.sleep))
    monkeypatch.setattr(module.BaseEmissionsTracker, "_ensure_hardware_ready",
                        lambda self: setattr(self, "_hardware", [Heater()]))
    readings = []
    tracker = energy.open_codecarbon(BRAZIL, tmp_path, lambda *totals: readings.append(totals))
    tracker.start()
    clock.now_s += 3600.0
    assert tracker.flush() is not None
    tracker.stop()
    brazil_kg_per_kwh = 0.09835  # codecarbon's table, 98.35 g/kWh
    assert readings[-1][0] == pytest.approx(0.3, rel=1e-12)
    assert readings[-1][1] == pytest.approx(0.3 * brazil_kg_per_kwh, rel=1e-3)
    assert codecarbon.__version__.startswith("3."), "read emissions_tracker.py again"
    assert list(tmp_path.iterdir()) == []


def test_totals_go_on_after_a_resume_and_never_step_back(tmp_path):
    made, seen, carried = [], [], None
    for hours in (1.0, 0.5, 2.0):
        with meter_of(tmp_path, carried=carried, made=made) as meter:
            seen.append(meter.reading()["energy_kwh"])
            wait_for(lambda: "flush" in made[-1].calls if made else False)
            made[-1].now_s = hours * 3600.0
            carried = meter.state(wait=True)
            made[-1].now_s = 0.0  # a tracker that starts again from zero
            seen.append(meter.state(wait=True)["energy_kwh"])
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(0.3 * 3.5, rel=1e-12)


def test_a_killed_run_carries_what_its_last_row_knew():
    checkpoint = {"energy_kwh": 1.0, "emissions_kg_co2e": 0.1, "country_iso_code": "BRA"}
    assert carry_on(checkpoint, {"energy_kwh": 1.2, "emissions_kg_co2e": 0.12})["energy_kwh"] == 1.2
    assert carry_on(checkpoint, {"loss": 3.0})["energy_kwh"] == 1.0
    assert carry_on(None, None) == {"energy_kwh": 0.0, "emissions_kg_co2e": 0.0}


def test_only_one_rank_of_a_node_measures(tmp_path):
    made = []
    with meter_of(tmp_path, made=made, measures=False) as other:
        assert other.state()["energy_kwh"] == 0.0
    assert made == []
    with meter_of(tmp_path, made=made, config=EnergyConfig(enabled=False)) as off:
        assert off.reading() == {}
        assert off.totals == (0.0, 0.0)
    assert made == []


class Raises(FakeTracker):
    def start(self) -> None:
        raise OSError("lock file of another run")


class Leaves(FakeTracker):
    def start(self) -> None:
        raise SystemExit(1)


class SwallowsAndReturnsNone(FakeTracker):
    def flush(self) -> None:
        return None


@pytest.mark.parametrize(("tracker", "word"), [(Raises, "lock file of another run"), (Leaves, "SystemExit"),
                                               (SwallowsAndReturnsNone, "could not measure")])
def test_a_failing_tracker_is_one_warning_and_the_totals_stay(tmp_path, capsys, tracker, word):
    carried = {"energy_kwh": 2.5, "emissions_kg_co2e": 0.25}
    with meter_of(tmp_path, carried=carried, tracker=tracker) as meter:
        wait_for(lambda: "energy_stale" in meter.reading())
        for _ in range(3):
            assert meter.state(wait=True)["energy_kwh"] == 2.5
            assert meter.reading()["energy_kwh"] == 2.5
    error = capsys.readouterr().err
    assert error.count("warning: energy:") == 1
    assert word in error


def test_a_passing_failure_is_forgotten(tmp_path, capsys):
    made = []
    with meter_of(tmp_path, made=made) as meter:
        wait_for(lambda: made and "flush" in made[0].calls)
        good = made[0].flush
        made[0].flush = lambda: None
        meter.state(wait=True)
        assert meter.reading()["energy_stale"] is True
        made[0].flush, made[0].now_s = good, 3600.0
        assert meter.state(wait=True)["energy_kwh"] == 0.3
        assert "energy_stale" not in meter.reading()
    assert capsys.readouterr().err.count("warning") == 1


def test_a_missing_package_is_one_warning(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    with EnergyMeter(BRAZIL, tmp_path) as meter:
        wait_for(lambda: "energy_stale" in meter.reading())
        meter.state(wait=True)
    assert capsys.readouterr().err.count("warning: energy: ModuleNotFoundError") == 1


def test_a_save_that_is_not_the_last_waits_for_nothing(tmp_path):
    """The measurement that it asks for is in the next one."""
    made = []
    with meter_of(tmp_path, made=made) as meter:
        wait_for(lambda: made and "flush" in made[0].calls)
        good, measuring, go_on = made[0].flush, threading.Event(), threading.Event()

        def slow():
            measuring.set()
            go_on.wait(10)
            return good()

        made[0].flush, made[0].now_s = slow, 3600.0
        started = time.monotonic()
        assert meter.state()["energy_kwh"] == 0.0
        assert time.monotonic() - started < patient(0.5)
        assert measuring.wait(5)
        go_on.set()
        wait_for(lambda: meter.state()["energy_kwh"] == 0.3)


def test_a_measurement_that_hangs_is_told_in_the_rows(tmp_path, monkeypatch, capsys):
    release = threading.Event()

    class Blocks(FakeTracker):
        def flush(self) -> None:
            release.wait(60)

    monkeypatch.setattr(energy, "_OVERDUE_S", -59.9)
    monkeypatch.setattr(energy, "_CLOSE_WAIT_S", 0.1)
    with meter_of(tmp_path, tracker=Blocks) as meter:
        assert "energy_stale" not in meter.reading()
        wait_for(lambda: meter.reading().get("energy_stale"))
    release.set()
    assert capsys.readouterr().err.count("warning: energy: codecarbon does not answer") == 1


def test_a_blocking_tracker_delays_neither_a_row_nor_the_end(tmp_path, monkeypatch):
    release = threading.Event()

    class Blocks(FakeTracker):
        def flush(self) -> None:
            release.wait(60)

    monkeypatch.setattr(energy, "_SAVE_WAIT_S", 0.1)
    monkeypatch.setattr(energy, "_CLOSE_WAIT_S", 0.1)
    started = time.monotonic()
    with meter_of(tmp_path, tracker=Blocks) as meter:
        for _ in range(1000):
            meter.reading()
        meter.state(wait=True)
    assert time.monotonic() - started < patient(2.0)
    release.set()


@pytest.mark.slow
def test_a_real_short_run_reads_more_and_more(tmp_path, monkeypatch):
    """codecarbon as installed, with a home that cannot be written and a lock file left by a killed run."""
    pytest.importorskip("codecarbon")
    (tmp_path / "temporary").mkdir()
    (tmp_path / "temporary" / ".codecarbon.lock").touch()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setenv("HOME", "/dev/null")
    (tmp_path / "run").mkdir()
    with EnergyMeter(EnergyConfig(country_iso_code="PRT", measure_power_s=0.1), tmp_path / "run") as meter:
        wait_for(lambda: meter.reading()["energy_kwh"] > 0, seconds=30)
        first = meter.reading()
        time.sleep(0.5)
        started = time.monotonic()
        state = meter.state(wait=True)
        assert time.monotonic() - started < patient(1.0)
    assert state["energy_kwh"] > first["energy_kwh"]
    portugal_kg_per_kwh = 0.16555
    assert state["emissions_kg_co2e"] == pytest.approx(portugal_kg_per_kwh * state["energy_kwh"], rel=0.01)
    assert state["energy_source"]["ram"] == "estimated"
    assert "cpu" in state["energy_source"]
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize(("text", "component", "label"), [
    ("RAM()", "ram", "estimated"),
    ("CPU(Cpu Load)", "cpu", "estimated"),
    ("CPU(Intel Rapl)", "cpu", "measured"),
    ("CPU(Premium Xeon > 85W [generic])", "cpu", "estimated"),
    ("GPU() (NVIDIA A100-SXM4-40GB)", "gpu", "measured"),
])
def test_components_are_labelled(text, component, label):
    assert label_hardware([text]) == {component: label}


def test_known_countries_come_without_importing_codecarbon():
    import subprocess

    code = ("import sys; from megatron_ttl.train.energy import known_countries; n = len(known_countries());"
            "print(n, 'codecarbon' in sys.modules, 'torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    out = done.stdout.split()
    assert int(out[0]) > 200
    assert out[1:] == ["False", "False"]


@pytest.mark.parametrize("code", ["BRA", "DEU", "PRT", "FRA", "USA"])
def test_real_countries_pass(code):
    assert country_faults(EnergyConfig(country_iso_code=code)) == []


def test_unknown_or_missing_countries_are_refused(monkeypatch):
    if known_countries() is None:
        pytest.skip("codecarbon is not installed")
    assert "'XXX' is not in codecarbon's table" in country_faults(EnergyConfig(country_iso_code="XXX"))[0]
    assert "emissions are never guessed" in country_faults(EnergyConfig())[0]
    assert country_faults(EnergyConfig(enabled=False)) == []
    monkeypatch.setattr(energy.importlib.util, "find_spec", lambda _: None)
    assert energy.known_country("XXX"), "without the package nobody can say, and the meter will warn"
