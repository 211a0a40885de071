"""A save with retention on a disk that fails from any call on: for good, once, or after half a write."""

from __future__ import annotations

import errno
import os
import shutil
import time
from pathlib import Path
from typing import Any

import fault_shim as shim
from store_peers import on_all
from store_trials import STORES, bytes_of, is_state, save

from megatron_ttl.checkpoint.peers import ALONE
from megatron_ttl.errors import DiskError


def save_on_all(folder: Path, kind: str, world_size: int, step: int) -> list[Any]:
    """Save as every peer, keeping one; return by rank the store's warnings or what was raised."""
    def action(peers: Any) -> list[str]:
        store = STORES[kind](folder, keep_last=1)
        save(store, step, peers if world_size > 1 else ALONE)
        return getattr(store, "warnings", [])

    return on_all(world_size, action)


def after_a_failure(folder: Path, kind: str, former: dict[str, str], ended: list[Any], error: int,
                    heals: bool) -> str | None:
    """Say what is wrong with what a failed save of step 10 has left; None when nothing is."""
    raised = [result for result in ended if isinstance(result, Exception)]
    try:
        found = STORES[kind](folder).latest_valid()
    except Exception as fault:  # noqa: BLE001: whatever it is, nobody can resume
        return f"unresumable: {fault}"
    if found is None or found.step not in ((5, 10) if raised else (10,)) or not is_state(found, found.step):
        return f"wrong: {found and found.step}"
    if raised and (len(raised) < len(ended) or any(type(fault) is not DiskError for fault in raised)):
        return f"raised: {raised}"
    if raised and f"({os.strerror(error)})" not in str(raised[0]):
        return f"the reason is not told: {raised[0]}"
    if shim.refused() and not raised and not ended[0]:
        return "silent: no error and no warning"
    now = bytes_of(folder)
    if raised and {name: digest for name, digest in now.items() if name.startswith("step-00000005")} != former:
        return "damaged: the last good checkpoint is not what it was"
    left = {name for name in now if "." in name.split("/")[0]}
    if raised and left and (heals or error in (errno.ENOSPC, errno.EDQUOT)):
        return f"left over: {sorted(left)}"
    return None


def failing_disk(folder: str, error: int, kind: str = "ours", world_size: int = 1, mode: int = shim.FAIL,
                 width: int = shim.EVER, most: int | None = None) -> dict[str, Any]:
    """Let so many calls fail from every n-th one on; when the disk is well again, saves must succeed and clear up."""
    base, began = Path(folder), time.perf_counter()
    save_on_all(base / "template", kind, world_size, 5)
    former = {name: digest for name, digest in bytes_of(base / "template").items() if name.startswith("step-")}

    def trial(n: int) -> tuple[list[Any], Path, int]:
        place = base / f"{n}"
        shutil.copytree(base / "template", place)
        shim.arm(place, mode, n, min(n + width, shim.EVER), error)
        ended = save_on_all(place, kind, world_size, 10)
        return ended, place, shim.disarm()

    ended, place, calls = trial(shim.EVER)
    assert ended == [[]] * world_size or kind == "naive", ended
    save_on_all(place, kind, world_size, 20)
    reference = bytes_of(place)
    faults = []
    points = range(1, calls + 1, 1 if most is None else max(1, calls // most))
    for n in points:
        ended, place, _ = trial(n)
        fault = after_a_failure(place, kind, former, ended, error, heals=width == 1)
        if fault is None:
            again = save_on_all(place, kind, world_size, 10) + save_on_all(place, kind, world_size, 20)
            raised = [result for result in again if isinstance(result, Exception)]
            if raised or bytes_of(place) != reference:
                fault = f"does not go on: {raised or sorted(bytes_of(place))}"
        faults += [f"{os.strerror(error)} at {n}: {fault}"] if fault else []
        shutil.rmtree(place)
    return {"calls": calls, "trials": len(points), "faults": faults,
            "per_minute": round(60 * len(points) / (time.perf_counter() - began))}
