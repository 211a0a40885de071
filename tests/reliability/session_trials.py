"""The real training session of a tiny model: killed at any call, on a failing disk, resumed, compared bit for bit."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import fault_shim as shim
import torch
from fault_server import in_fork, wait_for
from tiny_session import train_here

from megatron_ttl.checkpoint.store import CheckpointStore
from megatron_ttl.console import print_faults
from megatron_ttl.errors import UserError
from megatron_ttl.files import checksum
from megatron_ttl.parallel.mesh import join
from megatron_ttl.runtime import Ranks
from megatron_ttl.train.failure import told_once

STEPS = 6
CADENCE = ["checkpoint.every_steps=2", "evaluation.every_steps=3"]
"""Three saves; keeping one, two of them are followed by a deletion."""


def train(place: Path, run: Path, world_size: int = 1, victim: int = 0, keep_last: int = 1,
          cadence: list[str] = CADENCE, below: str = "", **hit: int) -> list[int]:
    """Start the run, or go on with it, and end as pretrain_ttl.py does; one process is hit. Return exit codes.

    What it says is added to a file beside its folder.

    Args:
        below: the part of the run's folder where calls are hit.
        hit: for `fault_shim.arm`; without n they are only counted.
    """
    run.parent.mkdir(parents=True, exist_ok=True)
    meeting = run.with_name(run.name + ".meeting")
    meeting.unlink(missing_ok=True)

    def work(rank: int) -> int:
        said = os.open(run.with_name(run.name + ".said"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        torch.set_num_threads(1)
        mesh = join(Ranks(rank, world_size, rank), timeout_s=90, rendezvous=f"file://{meeting}")
        if hit and rank == victim:
            shim.arm(run / below, **hit)
        try:
            with told_once(mesh):
                settings = [f"run.dir={run}", f"train.steps={STEPS}", f"checkpoint.keep_last={keep_last}", *cadence]
                return train_here(mesh, str(place / "machine.json"), str(place / "run.toml"), settings)
        except UserError as error:
            print_faults(error)
            return int(error.exit_code)
        finally:
            if hit and rank == victim and "n" not in hit:
                run.with_name(run.name + ".calls").write_text(str(shim.disarm()))

    return wait_for(*(in_fork(lambda rank=rank: work(rank)) for rank in range(world_size)))


def said(run: Path) -> str:
    """Return all that a run has printed."""
    return run.with_name(run.name + ".said").read_text(encoding="utf-8")


def end_of(run: Path) -> dict[str, Any]:
    """Return what a finished run is compared by: the tensors of its last checkpoint, its curve, and its folder."""
    folder = run / "checkpoints" / f"step-{STEPS:08d}"
    tensors = {path.name: checksum(path) for path in sorted(folder.glob("*.safetensors"))}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    names = sorted(os.path.relpath(path, run) for path in run.rglob("*"))
    return {"tensors": tensors, "names": names,
            "losses": [(row["step"], row["loss"]) for row in rows if row["event"] == "train"]}


def saved_by(run: Path) -> int:
    """Return the last step that the run has said to be on the disk."""
    path = run / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return max((row["step"] for row in map(json.loads, lines) if row["event"] == "checkpoint"), default=0)


def after(place: Path, run: Path, world_size: int, saved: int, reference: dict[str, Any]) -> str | None:
    """Say what is wrong with what a run has left; None when nothing is. It is resumed to its end."""
    try:
        found = CheckpointStore(run / "checkpoints").latest_valid()
    except Exception as error:  # noqa: BLE001: whatever it is, nobody can resume
        return f"unresumable: {error}"
    newest = found.step if found else 0
    if newest < saved:
        return f"lost: step {newest}, and step {saved} was saved"
    codes = train(place, run, world_size)
    if codes != [0] * world_size:
        return f"unresumable: it ends with {codes}: {said(run)[-1000:]}"
    end = end_of(run)
    if newest == STEPS:  # no save came after it, which would have deleted the older ones
        end["names"] = [name for name in end["names"]
                        if not name.startswith("checkpoints/step") or f"{STEPS:08d}" in name]
    wrong = [key for key in reference if end[key] != reference[key]]
    return f"wrong end: {[(end[key], reference[key]) for key in wrong]}" if wrong else None


def spread(calls: int, most: int | None) -> list[int]:
    """Return the numbers of all calls, or so many of them, evenly spaced."""
    if most is None or most >= calls:
        return list(range(1, calls + 1))
    return [1 + round(i * (calls - 1) / max(1, most - 1)) for i in range(most)]


def uninterrupted(place: Path, base: Path, world_size: int, victim: int, mode: int) -> tuple[int, dict[str, Any]]:
    """Return how many calls a whole run makes, and how it ends."""
    base.mkdir()
    codes = train(place, base / "whole", world_size, victim, mode=shim.TORN if mode == shim.TORN else shim.COUNT)
    assert codes == [0] * world_size, codes
    return int((base / "whole.calls").read_text()), end_of(base / "whole")


def kill_points(place: str, folder: str, mode: int = shim.KILL, world_size: int = 1, victim: int = 0,
                most: int | None = None, again: int = 0, seed: int = 0) -> dict[str, Any]:
    """Kill a run at its calls, each trial in a folder of its own; `again`: so many times the resumed one as well."""
    base, draw, began = Path(folder), random.Random(seed), time.perf_counter()
    calls, reference = uninterrupted(Path(place), base, world_size, victim, mode)
    points = [(n,) for n in spread(calls, most)]
    points += [(draw.randint(1, calls), draw.randint(1, calls)) for _ in range(again)]
    faults = []
    for point in points:
        run, saved = base / f"{point}".replace(", ", "-"), 0
        for number, n in enumerate(point):
            codes = train(Path(place), run, world_size, victim, mode=mode, n=n, to=n + 1)
            saved = max(saved, saved_by(run))
            if codes[victim] != -9 and not (number and codes[victim] == 0):
                faults.append(f"{point}: the processes ended with {codes}")
        fault = after(Path(place), run, world_size, saved, reference)
        faults += [f"{point}: {fault}"] if fault else []
        shutil.rmtree(run)
    return {"calls": calls, "trials": len(points), "faults": faults,
            "per_minute": round(60 * len(points) / (time.perf_counter() - began))}


def failing_disk(place: str, folder: str, error: int, mode: int = shim.FAIL, width: int = shim.EVER,
                 most: int | None = None) -> dict[str, Any]:
    """Let the disk fail from a call on, for so many calls: the run ends with 0, 2 or 75, and once the disk is well it
    goes on to the same end."""
    base, began = Path(folder), time.perf_counter()
    calls, reference = uninterrupted(Path(place), base, 1, 0, mode)
    faults, codes = [], {}
    for n in spread(calls, most):
        run = base / f"{n}"
        code = train(Path(place), run, mode=mode, n=n, to=min(n + width, shim.EVER), error=error)[0]
        codes[code] = codes.get(code, 0) + 1
        if code not in (0, 2, 75) or "Traceback" in said(run):
            faults.append(f"{n}: it ends with {code}: {said(run)[-1000:]}")
        fault = after(Path(place), run, 1, saved_by(run) if width == shim.EVER else 0, reference)
        faults += [f"{n}: {fault}"] if fault else []
        shutil.rmtree(run, ignore_errors=True)
    return {"calls": calls, "trials": sum(codes.values()), "codes": codes, "faults": faults,
            "per_minute": round(60 * sum(codes.values()) / (time.perf_counter() - began))}


def failing_saves(place: str, folder: str, failures: int) -> dict[str, Any]:
    """Save after every step, on a disk where so many saves cannot even make their folder."""
    run = Path(folder) / "run"
    code = train(Path(place), run, keep_last=50, cadence=["checkpoint.every_steps=1"], below="checkpoints",
                 mode=shim.FAIL, n=1, to=1 + failures, error=errno.ENOSPC)[0]
    return {"code": code, "said": said(run), "kept": sorted(path.name for path in (run / "checkpoints").glob("*")),
            "steps": [step for step, _ in end_of(run)["losses"]]}


def full_disk(place: str, folder: str, whole: str, grown: bool) -> dict[str, Any]:
    """Train where few checkpoints fit, keeping all; and again when there is more room."""
    run = Path(folder) / "run"
    code = train(Path(place), run, keep_last=50, cadence=["checkpoint.every_steps=1"])[0]
    if grown:
        assert train(Path(place), Path(whole)) == [0]
    same = grown and end_of(run)["tensors"] == end_of(Path(whole))["tensors"]
    return {"code": code, "said": said(run), "same": same,
            "kept": sorted(path.name for path in (run / "checkpoints").glob("*"))}
