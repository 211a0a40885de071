"""Saves with retention whose calls are logged, and what the store finds after a power cut between any two of them."""

from __future__ import annotations

import errno
import shutil
import time
from pathlib import Path
from typing import Any

import fault_shim as shim
from power_cut import FILES, NAMES, Disk
from store_peers import on_all
from store_trials import STORES, bytes_of, is_state, save

from megatron_ttl.checkpoint.peers import ALONE
from megatron_ttl.errors import DiskError


def log_saves(top: Path, log: Path, kind: str, world_size: int, steps: list[int], refused: int | None) -> None:
    """Save some steps, keeping one, into a folder that has yet to be made; with a note after each.

    Args:
        refused: the call of the last save at which the disk fails; it is then saved again.
    """
    store = STORES[kind](top / "runs" / "run" / "checkpoints", keep_last=1)

    def saved(step: int, **hit: int) -> bool:
        shim.arm(top, shim.LOG, log=log, **hit)
        ended = on_all(world_size, lambda peers: save(store, step, peers if world_size > 1 else ALONE))
        errors = [error for error in ended if isinstance(error, Exception)]
        assert all(hit and isinstance(error, DiskError) for error in errors), errors
        if not errors:
            shim.note(f"saved {step}")
        shim.disarm()
        return not errors

    top.mkdir()
    for step in steps:
        if refused and step == steps[-1] and saved(step, n=refused, to=refused + 1, error=errno.EIO):
            return
        assert saved(step)


def cut(disk: Disk, to: Path, kind: str, saved: int, coming: int | None, fate: tuple[str, str], seed: int,
        goes_on: bool) -> str | None:
    """Cut the power; say what is wrong with what is found, None when nothing is."""
    disk.write(to, *fate, seed)
    store = STORES[kind](to / "runs" / "run" / "checkpoints", keep_last=1)
    try:
        found = store.latest_valid()
        if found is None:
            return None if saved == 0 else f"unresumable: nothing there, and step {saved} was saved"
        if found.step not in (saved, coming):
            return f"lost: step {found.step}, and step {saved} was saved"
        if not is_state(found, found.step):
            return f"wrong: not what was saved at step {found.step}"
        if goes_on:
            save(store, 1000)
            left = {name.split("/")[0] for name in bytes_of(store.directory)} - {"latest"}
            if left != {"step-00001000"} or not is_state(store.latest_valid(), 1000):
                return f"does not go on: {sorted(left)}"
    except Exception as error:  # noqa: BLE001: whatever it is, nobody can resume
        return f"unresumable: {error!r}"
    finally:
        shutil.rmtree(to)
    return None


def cut_points(folder: str, kind: str = "ours", world_size: int = 1, steps: tuple[int, ...] = (10, 20), draws: int = 2,
               stride: int = 1, refused: int | None = None) -> dict[str, Any]:
    """Cut the power after every call of some saves (or every few), in every mode and in some drawn ones.

    Args:
        draws: so many times more, with a fate drawn for every file and folder.
        stride: only before every so-manieth call.
        refused: the call of the last save at which the disk fails; it is then saved again.
    """
    began, base = time.perf_counter(), Path(folder)
    base.mkdir()
    log_saves(base / "real", base / "log", kind, world_size, list(steps), refused)
    operations = shim.read_log(base / "log")
    disk, faults, trials = Disk(base / "real"), [], 0
    fates = [(files, names) for files in FILES for names in NAMES] + [("mixed", "mixed")] * draws
    saved = 0
    for n in range(len(operations) + 1):
        if n:
            disk.step(operations[n - 1])
            if operations[n - 1].what == "note":
                saved = int(operations[n - 1].path.split()[1])
        if n % stride and n < len(operations):
            continue
        coming = next((step for step in steps if step > saved), None)
        for number, fate in enumerate(fates):
            trials += 1
            fault = cut(disk, base / "cut", kind, saved, coming, fate, 1000 * n + number,
                        goes_on=number == n % len(fates))
            if fault:
                before = operations[n].what if n < len(operations) else "the end"
                faults.append(f"before call {n} ({before}), files {fate[0]}, names {fate[1]}: {fault}")
    disk.write(base / "again")
    if bytes_of(base / "again") != bytes_of(base / "real"):
        faults.append("the log does not give the folder back: the shim has missed a call")
    return {"calls": len(operations), "trials": trials, "faults": faults,
            "per_minute": round(60 * trials / (time.perf_counter() - began))}
