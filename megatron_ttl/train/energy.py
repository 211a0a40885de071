"""Measure the energy a run draws and the CO2e of its electricity: the only door to codecarbon.

One meter per node: codecarbon counts the whole machine, so a second meter beside it would count all twice.
All calls to codecarbon are made by one thread of the meter. Training can therefore neither be delayed nor
stopped by it, and codecarbon's own timer, which would race with a `flush()` from another thread and count an
interval twice, is idle.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from megatron_ttl.config.schema import EnergyConfig
from megatron_ttl.console import print_warning

_SAVE_WAIT_S = 2.0
_CLOSE_WAIT_S = 5.0
_OVERDUE_S = 60.0  # codecarbon is imported, asks its hardware, or hangs
_NEVER_S = 1e8  # codecarbon's own timer: longer than any run
# Beginnings of codecarbon's descriptions of hardware that has a counter of energy or power.
_MEASURED = ("gpu(", "cpu(intel rapl)", "cpu(windows emi)", "cpu(intel power gadget)", "applesiliconchip",
             "raspberry")


class Tracker(Protocol):
    """What the meter needs of codecarbon's tracker."""

    def start(self) -> None:
        """Begin to measure."""

    def flush(self) -> float | None:
        """Measure now and hand the totals to the receiver; None says that it failed."""

    def stop(self) -> float | None:
        """Measure a last time and end."""


Receiver = Callable[[float, float], None]  # (kWh, kg CO2e) since the tracker started


class EnergyMeter:
    """Count kWh and kg CO2e of this node on top of what the checkpoint carried; a context manager.

    `measures` is true on the first rank of each node. Give `carried` to one rank of the run alone: then the
    sum of `totals` over all ranks is the run's. A failure becomes one warning, and the readings stay.
    """

    def __init__(self, config: EnergyConfig, output_dir: Path, measures: bool = True,
                 carried: dict[str, Any] | None = None,
                 open_tracker: Callable[[EnergyConfig, Path, Receiver], Tracker] | None = None) -> None:
        self._config = config
        self._output_dir = Path(output_dir)
        self._open_tracker = open_tracker or open_codecarbon
        self._carried = _amounts(carried)
        self._drawn = (0.0, 0.0)
        self._sources: dict[str, str] = {}
        self._fault: str | None = None
        self._warned = False
        self._measured_at = time.monotonic()
        self._wanted, self._answered, self._ended = threading.Event(), threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        if config.enabled and measures:
            self._thread = threading.Thread(target=self._work, name="energy", daemon=True)

    def __enter__(self) -> EnergyMeter:
        if self._thread is not None:
            self._measured_at = time.monotonic()
            try:
                self._thread.start()
            except RuntimeError as error:  # no more threads
                self._fail(f"{type(error).__name__}: {error}")
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None and self._thread.is_alive():
            self._ended.set()
            self._wanted.set()
            self._thread.join(_CLOSE_WAIT_S)
            if self._thread.is_alive():
                self._fail("codecarbon does not answer")

    @property
    def totals(self) -> tuple[float, float]:
        """Carried and drawn since: (kWh, kg CO2e)."""
        return self._carried[0] + self._drawn[0], self._carried[1] + self._drawn[1]

    def reading(self) -> dict[str, Any]:
        """Return the totals of the last measurement for a row of metrics, at no cost; empty if switched off.

        `energy_source` says of each component whether it is measured or estimated; `energy_stale` is there,
        and true, while the measurement fails or hangs.
        """
        if not self._config.enabled:
            return {}
        energy_kwh, emissions_kg = self.totals
        row: dict[str, Any] = {"energy_kwh": energy_kwh, "emissions_kg_co2e": emissions_kg}
        if self._sources:
            row["energy_source"] = dict(self._sources)
        if self._fault is not None or self._overdue:
            row["energy_stale"] = True
        return row

    def state(self, wait: bool = False) -> dict[str, Any]:
        """Return what a checkpoint must carry, and ask for a measurement.

        Args:
            wait: for that measurement, no longer than two seconds: before the last save of a run. Without it the totals
                are at most `measure_power_s` old, and training goes on at once.
        """
        if self._thread is not None and self._thread.is_alive():
            self._answered.clear()
            self._wanted.set()
            if wait:
                self._answered.wait(_SAVE_WAIT_S)
        energy_kwh, emissions_kg = self.totals
        return {"energy_kwh": energy_kwh, "emissions_kg_co2e": emissions_kg,
                "energy_source": dict(self._sources), "country_iso_code": self._config.country_iso_code}

    @property
    def _overdue(self) -> bool:
        return (self._thread is not None
                and time.monotonic() - self._measured_at > self._config.measure_power_s + _OVERDUE_S)

    def _receive(self, energy_kwh: float, emissions_kg: float) -> None:
        """Keep the tracker's totals; never step back and never take what is not a number."""
        if math.isfinite(energy_kwh) and math.isfinite(emissions_kg):
            self._drawn = (max(self._drawn[0], energy_kwh), max(self._drawn[1], emissions_kg))

    def _work(self) -> None:
        try:
            tracker = self._open_tracker(self._config, self._output_dir, self._receive)
            tracker.start()
            self._measure(tracker)
            self._sources = energy_sources(tracker)
            while not self._ended.is_set():
                self._wanted.wait(self._config.measure_power_s)
                self._wanted.clear()
                self._measure(tracker)
            tracker.stop()
        except BaseException as error:  # not even a SystemExit of codecarbon's may end the run
            self._fail(f"{type(error).__name__}: {error}")
        finally:
            self._answered.set()

    def _measure(self, tracker: Tracker) -> None:
        """Measure; a passing failure is forgotten when the next measurement succeeds."""
        try:
            failed = tracker.flush() is None  # codecarbon swallows its own exceptions and returns None
        except Exception as error:
            self._fail(f"{type(error).__name__}: {error}")
        else:
            self._fault, self._measured_at = None, time.monotonic()
            if failed:
                self._fail("codecarbon could not measure")
        self._answered.set()

    def _fail(self, fault: str) -> None:
        self._fault = fault
        if not self._warned:
            self._warned = True
            print_warning(f"energy: {fault}; the run goes on and its energy stays at the last totals")


def open_codecarbon(config: EnergyConfig, output_dir: Path, receive: Receiver) -> Tracker:
    """Build codecarbon's offline tracker of the whole machine; it writes no file and needs no network.

    Whatever codecarbon would take from its own configuration file or environment and would change a total is
    set here, so that the run file alone explains the figures.

    Source: codecarbon 3.3.2, `emissions_tracker.py`.
    """
    import codecarbon

    class Handler:
        """Output method of codecarbon that hands on the totals."""

        def out(self, total: Any, _delta: Any) -> None:
            receive(float(total.energy_consumed), float(total.emissions))

        live_out = out

        def exit(self) -> None:
            """Codecarbon calls this at the end; there is nothing to close."""

    logging.getLogger("codecarbon").setLevel(logging.ERROR)  # it talks before it reads its log_level
    # "machine", not "process": a training node has one user, and a process's share of RAM and CPU is a guess.
    return codecarbon.OfflineEmissionsTracker(
        country_iso_code=config.country_iso_code, region=None, cloud_provider=None, cloud_region=None,
        country_2letter_iso_code=None, tracking_mode="machine", measure_power_secs=_NEVER_S, pue=1.0, wue=0,
        force_cpu_power=None, force_ram_power=None, force_carbon_intensity_g_co2e_kwh=None,
        output_dir=str(output_dir), output_methods=[], output_handlers=[Handler()], emissions_endpoint=None,
        electricitymaps_api_token="", log_level="error",
        allow_multiple_runs=True)  # without it there is a lock file, which a killed run would leave


def energy_sources(tracker: Any) -> dict[str, str]:
    """Say of each component whether its energy is measured or estimated; `unknown` if it cannot be told."""
    try:
        # codecarbon has no public word for it
        descriptions = [str(part.description()) for part in tracker._hardware]
    except Exception:
        return {"all": "unknown"}
    return label_hardware(descriptions)


def label_hardware(descriptions: Iterable[str]) -> dict[str, str]:
    """Turn descriptions (`CPU(Intel Rapl)`, `RAM()`) into `{"cpu": "measured", "ram": "estimated"}`."""
    labels = {}
    for text in descriptions:
        component = text.lower().split("(")[0].strip()
        labels[component] = "measured" if text.lower().startswith(_MEASURED) else "estimated"
    return labels


def known_countries() -> dict[str, str] | None:
    """Return code -> name of every country in codecarbon's table; None where codecarbon is absent.

    Reads the data file without importing the package, which takes a quarter of a second and pandas.
    """
    found = importlib.util.find_spec("codecarbon")
    for folder in (found.submodule_search_locations or ()) if found else ():
        table = Path(folder) / "data" / "private_infra" / "global_energy_mix.json"
        if table.is_file():
            entries = json.loads(table.read_text(encoding="utf-8"))
            return {code: entry.get("country_name", code) for code, entry in entries.items()}
    return None


def known_country(code: str) -> bool:
    """Whether codecarbon knows this country's electricity; true where it is absent and cannot say."""
    countries = known_countries()
    return countries is None or code in countries


def country_faults(config: EnergyConfig, where: str = "energy.country_iso_code") -> list[str]:
    """Return what is wrong with the country: codecarbon would take the world's average for an unknown one."""
    if not config.enabled:
        return []
    advice = "write the country whose electricity is used, e.g. \"BRA\", or energy.enabled = false"
    if config.country_iso_code is None:
        return [f"{where}: it is missing; it must be an ISO 3166 alpha-3 code, emissions are never guessed; "
                f"{advice}"]
    if known_country(config.country_iso_code):
        return []
    return [f"{where}: {config.country_iso_code!r} is not in codecarbon's table; it must be the ISO 3166 "
            f"alpha-3 code of a country there; {advice}"]


def carry_on(checkpoint: dict[str, Any] | None, last_row: dict[str, Any] | None) -> dict[str, float]:
    """Return the larger totals of a checkpoint and of the last row of metrics.

    A killed run drew energy after its last checkpoint. The row knows it; the run's sum must not step back.
    """
    energy, emissions = (max(pair) for pair in zip(_amounts(checkpoint), _amounts(last_row), strict=True))
    return {"energy_kwh": energy, "emissions_kg_co2e": emissions}


def _amounts(record: dict[str, Any] | None) -> tuple[float, float]:
    energy, emissions = ((record or {}).get(key) for key in ("energy_kwh", "emissions_kg_co2e"))
    return _amount(energy), _amount(emissions)


def _amount(value: Any) -> float:
    """Return a total as it was written; nothing for what is none, as a damaged row of metrics may have it."""
    is_amount = isinstance(value, int | float) and 0 <= value <= sys.float_info.max
    return float(value) if is_amount else 0.0
