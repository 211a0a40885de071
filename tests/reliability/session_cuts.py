"""A power cut between any two calls of the real training session: what the next start finds, and how it ends."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import fault_shim as shim
import torch
from fault_server import in_fork, wait_for
from power_cut import FILES, NAMES, Disk
from session_trials import CADENCE, STEPS, train
from store_trials import bytes_of
from tiny_session import train_here

from megatron_ttl.checkpoint.store import CheckpointStore
from megatron_ttl.config.load import Settings, load_settings
from megatron_ttl.files import checksum
from megatron_ttl.parallel.mesh import join
from megatron_ttl.runtime import Ranks
from megatron_ttl.row_file import trim_rows
from megatron_ttl.train.run_folder import RunFolder

RUN = Path("runs", "run")


def overrides(top: Path) -> list[str]:
    """Return the settings of the run below a folder."""
    return [f"run.dir={top / RUN}", f"train.steps={STEPS}", "checkpoint.keep_last=1", *CADENCE]


def log_a_session(place: Path, top: Path, log: Path) -> None:
    """Train in a fork with all calls logged, and a note after each save, on whichever thread it is."""
    def work() -> int:
        torch.set_num_threads(1)
        mesh, real = join(Ranks()), CheckpointStore.save

        def noted(store: CheckpointStore, step: int, *arguments: Any, **options: Any) -> Any:
            result = real(store, step, *arguments, **options)
            shim.note(f"saved {step}")
            return result

        CheckpointStore.save = noted  # type: ignore[method-assign]
        shim.arm(top, shim.LOG, log=log)
        return train_here(mesh, str(place / "machine.json"), str(place / "run.toml"), overrides(top))

    top.mkdir()
    assert wait_for(in_fork(work)) == [0]


def tensors_of(folder: Path) -> dict[str, str]:
    """Return the checksums of a checkpoint's tensors."""
    return {path.name: checksum(path) for path in sorted(folder.glob("*.safetensors"))}


def rows_of(run: Path) -> set[tuple[int, float]]:
    """Return step and loss of every row that can be read."""
    found = set()
    for line in (run / "metrics.jsonl").read_bytes().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row["event"] == "train":
            found.add((row["step"], row["loss"]))
    return found


def what_is_wrong(settings: Settings, steps: set[int | None], reference: Path) -> str | None:
    """Do what a start does before it trains; say what is wrong with what a power cut has left."""
    folder = RunFolder(settings)
    try:
        found, _ = folder.starting_point()
        rows = trim_rows(folder.metrics_path, found.step if found else 0)
    except Exception as error:  # noqa: BLE001: whatever it is, nobody can resume
        return f"unresumable: {error!r}"
    if (found.step if found else 0) not in steps:
        return f"lost: step {found and found.step}, and it must be one of {steps}"
    if found and tensors_of(found.directory) != tensors_of(reference / "checkpoints" / found.directory.name):
        return f"wrong: not what was saved at step {found.step}"
    if found and rows is not None and not isinstance(rows.get("step"), int):
        return f"rows: {rows}"
    if folder.tokenizer_path.exists() and bytes_of(folder.tokenizer_path) != bytes_of(reference / "tokenizer"):
        return "wrong: the run's tokenizer is not that of its data"
    return None


def cut_points(place: str, folder: str, draws: int = 2, stride: int = 1, resumed: int = 0) -> dict[str, Any]:
    """Cut the power before every so-manieth call, in every mode and drawn ones; `resumed` of them train to the end."""
    began, base = time.perf_counter(), Path(folder)
    base.mkdir()
    log_a_session(Path(place), base / "real", base / "log")
    assert train(Path(place), base / "whole", keep_last=50) == [0]
    cut = base / "cut"
    settings = load_settings(Path(place) / "machine.json", Path(place) / "run.toml", overrides(cut))
    operations = shim.read_log(base / "log")
    disk, faults, trials, trained = Disk(base / "real"), [], 0, 0
    fates = [(files, names) for files in FILES for names in NAMES] + [("mixed", "mixed")] * draws
    every = max(1, (len(operations) // stride) // max(1, resumed))
    saved = 0
    for n, operation in enumerate(operations, 1):
        disk.step(operation)
        if operation.what == "note":
            saved = int(operation.path.split()[1])
        if n % stride:
            continue
        steps = {saved, min(saved + 2, STEPS)}
        for number, fate in enumerate(fates):
            trials += 1
            disk.write(cut, *fate, seed=1000 * n + number)
            fault = what_is_wrong(settings, steps, base / "whole")
            turn, rest = divmod(n // stride, every)
            if fault is None and resumed and rest == 0 and number == turn % len(fates):
                trained += 1
                codes = train(Path(place), cut / RUN)
                ends = [tensors_of(run / f"checkpoints/step-{STEPS:08d}") for run in (cut / RUN, base / "whole")]
                if codes != [0] or ends[0] != ends[1] or not rows_of(cut / RUN) <= rows_of(base / "whole"):
                    fault = f"wrong end: {codes}, {ends}"
            if fault:
                what = f"{operation.what} {operation.path}"
                faults.append(f"after call {n} ({what}), files {fate[0]}, names {fate[1]}: {fault}")
            shutil.rmtree(cut)
    disk.write(cut)
    if bytes_of(cut) != bytes_of(base / "real"):
        faults.append("the log does not give the folder back: the shim has missed a call")
    return {"calls": len(operations), "trials": trials, "trained": trained, "faults": faults,
            "per_minute": round(60 * trials / (time.perf_counter() - began))}
