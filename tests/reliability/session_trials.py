"""The real training session of a tiny model: killed at any call, on a failing disk, resumed, compared bit for bit."""

from __future__ import annotations

import json
import os
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
OVERRIDES = [f"train.steps={STEPS}", "checkpoint.every_steps=2", "checkpoint.keep_last=1", "evaluation.every_steps=3"]
"""Three saves, two of them followed by a deletion."""


def train(place: Path, run: Path, world_size: int = 1, victim: int = 0, **hit: int) -> list[int]:
    """Start the run, or go on with it, and end as pretrain_ttl.py does; one process is hit. Return exit codes."""
    meeting = run.with_name(run.name + ".meeting")
    meeting.unlink(missing_ok=True)

    def work(rank: int) -> int:
        torch.set_num_threads(1)
        mesh = join(Ranks(rank, world_size, rank), timeout_s=30, rendezvous=f"file://{meeting}")
        if hit and rank == victim:
            shim.arm(run, **hit)
        try:
            with told_once(mesh):
                return train_here(mesh, str(place / "machine.json"), str(place / "run.toml"),
                                  [f"run.dir={run}", *OVERRIDES])
        except UserError as error:
            print_faults(error)
            return int(error.exit_code)
        finally:
            if hit.get("mode") == shim.COUNT:
                run.with_name(run.name + ".calls").write_text(str(shim.disarm()))

    return wait_for(*(in_fork(lambda rank=rank: work(rank)) for rank in range(world_size)))


def end_of(run: Path) -> dict[str, Any]:
    """Return what a finished run is compared by: the tensors of its last checkpoint, its curve, and its folder."""
    folder = run / "checkpoints" / f"step-{STEPS:08d}"
    tensors = {path.name: checksum(path) for path in sorted(folder.glob("*.safetensors"))}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    names = sorted(os.path.relpath(path, run) for path in run.rglob("*"))
    return {"tensors": tensors, "names": names,
            "losses": [(row["step"], row["loss"]) for row in rows if row["event"] == "train"]}


def speed(place: str, runs: str) -> Any:
    found = []
    for name in ("a", "b"):
        began = time.perf_counter()
        Path(runs).mkdir(exist_ok=True)
        code = train(Path(place), Path(runs) / name, mode=shim.COUNT)
        found.append((code, time.perf_counter() - began, (Path(runs) / f"{name}.calls").read_text(), end_of(Path(runs)/name)))
    return found
