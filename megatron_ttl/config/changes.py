"""Settings that must not change while a run goes on: a resumed run is the same run."""

from __future__ import annotations

import json
from typing import Any

from megatron_ttl.config.describe import show
from megatron_ttl.config.schema import RunFile

_FIXED = ("run.seed", "run.start_from", "model", "data", "train", "optimizer", "schedule")


def forbidden_changes(stored: dict[str, Any], now: RunFile) -> list[str]:
    """Return a fault for each setting that shapes the loss curve and differs from the one the run began with.

    `stored` is what `RunFile.model_dump(mode="json")` gave then. Cadences, logging, energy, checkpoints and
    evaluation may change.
    """
    before = _flat(RunFile.model_validate_json(json.dumps(stored)).model_dump(mode="json"))  # newer keys: their defaults
    after = _flat(now.model_dump(mode="json"))
    faults = []
    for key in sorted(before.keys() | after.keys()):
        if not any(key == fixed or key.startswith(fixed + ".") for fixed in _FIXED):
            continue
        old, new = before.get(key), after.get(key)
        if old != new:
            faults.append(
                f"{now.run.dir}: {key}: was {show(old)} when this run began, is now {show(new)}; must stay "
                "as it was, for it shapes the loss curve; set it back, or begin another run: run.dir=<a new "
                f"folder> run.start_from=<a checkpoint folder of {now.run.dir}>")
    return faults


def _flat(tables: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tables.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
