"""A run of saves with retention on one process or two: killed at any call, resumed, compared bit for bit."""

from __future__ import annotations

import os
import random
import shutil
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fault_shim as shim
import torch
from fault_server import in_fork, wait_for
from naive_store import NaiveStore
from store_peers import SocketPeers, on_all

from megatron_ttl.checkpoint.peers import ALONE
from megatron_ttl.checkpoint.pieces import Piece, whole
from megatron_ttl.checkpoint.store import CheckpointStore
from megatron_ttl.files import checksum

STORES: dict[str, Any] = {"ours": CheckpointStore, "naive": NaiveStore}
STEPS = (10, 20, 30)
LAST = 40
"""Saved after every trial: whatever the killed run left behind must go by then."""


def state(step: int) -> dict[str, torch.Tensor]:
    """A state of several pages, another one for every step."""
    generator = torch.Generator().manual_seed(step)
    return {"rows": torch.randn(60, 90, generator=generator), "norm": torch.randn(6, generator=generator),
            "scalar": torch.tensor(float(step))}


def pieces(step: int, rank: int, world_size: int) -> dict[str, dict[str, Piece]]:
    """What one process keeps of it: a share of the rows; the rest is the last one's, the random state the first's."""
    tensors = state(step)
    share = 60 // world_size
    weights = {"rows": Piece(tensors["rows"].narrow(0, rank * share, share), (60, 90), (rank * share, 0))}
    if rank == world_size - 1:
        weights |= {name: whole(tensors[name]) for name in ("norm", "scalar")}
    return {"weights": weights, "rng": {"torch": whole(torch.arange(7) + step)} if rank == 0 else {}}


def is_state(found: Any, step: int) -> bool:
    """Whether a checkpoint holds what was saved at a step, bit for bit."""
    expected = {"weights": state(step), "rng": {"torch": torch.arange(7) + step}}
    return found.step == found.record["step"] == step and all(
        found.tensors(group).keys() == tensors.keys()
        and all(torch.equal(found.tensors(group)[name], tensor) for name, tensor in tensors.items())
        for group, tensors in expected.items())


def save(store: Any, step: int, peers: Any = ALONE) -> Any:
    """Save a step as one of the peers."""
    return store.save(step, pieces(step, peers.rank, peers.world_size), {"step": step}, peers)


def resume(folder: Path, peers: Any, kind: str, steps: tuple[int, ...], saved: Callable[[int], None]) -> None:
    """Go on from the newest checkpoint to the last step, keeping one."""
    store = STORES[kind](folder, keep_last=1)
    found = store.latest_valid(peers)
    for step in steps:
        if found is None or step > found.step:
            save(store, step, peers)
            saved(step)


def in_background(action: Callable[[], None]) -> None:
    """Run on another thread, as an asynchronous save does."""
    raised: list[BaseException] = []

    def work() -> None:
        try:
            action()
        except BaseException as error:  # noqa: BLE001: it is raised again
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


def run_killed(folder: Path, kind: str, world_size: int, victim: int, n: int, mode: int,
               background: bool) -> tuple[list[int], int, int]:
    """Resume in forks, one of which is hit at its n-th call; return statuses, the last step saved, and its calls."""
    told, tell = os.pipe()
    ends = socket.socketpair()

    def work(rank: int) -> None:
        ends[1 - rank].close()
        peers = ALONE if world_size == 1 else SocketPeers(rank, ends[rank])

        def saved(step: int) -> None:
            os.write(tell, f"saved {step}\n".encode())

        if rank == victim:
            shim.arm(folder, mode, n, n + 1)
        run = lambda: resume(folder, peers, kind, STEPS, saved)  # noqa: E731
        in_background(run) if background else run()
        if rank == victim:
            os.write(tell, f"calls {shim.disarm()}\n".encode())

    children = [in_fork(lambda rank=rank: work(rank)) for rank in range(world_size)]
    os.close(tell)
    for end in ends:
        end.close()
    with open(told, encoding="ascii") as handle:
        lines = [line.split() for line in handle]
    numbers = {word: max([int(n) for w, n in lines if w == word], default=0) for word in ("saved", "calls")}
    return wait_for(*children), numbers["saved"], numbers["calls"]


def bytes_of(folder: Path) -> dict[str, str]:
    """Return the checksum of every file by path, and every folder."""
    return {str(path.relative_to(folder)): checksum(path) if path.is_file() else "folder"
            for path in sorted(folder.rglob("*"))}


def after_a_kill(folder: Path, kind: str, world_size: int, saved: int, reference: dict[str, str]) -> str | None:
    """Say what is wrong with what a kill has left; None when nothing is."""
    try:
        found = STORES[kind](folder).latest_valid()
    except Exception as error:  # noqa: BLE001: whatever it is, nobody can resume
        return f"unresumable: {error}"
    if found is None:
        if saved:
            return f"unresumable: nothing there, and step {saved} was saved"
    elif found.step < saved:
        return f"lost: step {found.step}, and step {saved} was saved"
    elif not is_state(found, found.step):
        return f"wrong: not what was saved at step {found.step}"
    ended = on_all(world_size, lambda peers: resume(folder, peers if world_size > 1 else ALONE, kind, (*STEPS, LAST),
                                                    lambda step: None))
    if any(ended):
        return f"unresumable: {next(filter(None, ended))!r}"
    if bytes_of(folder) != reference:
        return f"wrong end: {sorted(bytes_of(folder).items() ^ reference.items())}"
    return None


def prepare(folder: Path, used: bool, kind: str, world_size: int) -> None:
    """Make what the run finds: nothing, or a checkpoint, a damaged one in the way, and leftovers of a killed save."""
    folder.parent.mkdir(parents=True)
    if used:
        on_all(world_size, lambda peers: save(STORES[kind](folder), 5, peers if world_size > 1 else ALONE))
        if kind == "ours":
            shutil.copytree(folder / "step-00000005", folder / "step-00000020")
            shutil.copytree(folder / "step-00000005", folder / "step-00000010.tmp-1000000000")


def kill_points(folder: str, kind: str = "ours", world_size: int = 1, victim: int = 0, used: bool = False,
                mode: int = shim.KILL, background: bool = False, most: int | None = None, again: int = 0,
                seed: int = 0) -> dict[str, Any]:
    """Kill a run of three saves at its calls, each trial in a folder of its own.

    Args:
        most: so many calls, evenly spaced; None for every one.
        again: so many trials at random calls whose resumed run is killed at a random call, too.
    """
    began = time.perf_counter()
    base, draw = Path(folder), random.Random(seed)
    options = {"world_size": world_size, "victim": victim, "background": background}
    prepare(base / "template" / "run", used, kind, world_size)

    def fresh(name: str) -> Path:
        shutil.copytree(base / "template", base / name)
        return base / name / "run"

    whole_run = fresh("whole")
    statuses, _, calls = run_killed(whole_run, kind, n=0, mode=shim.COUNT if mode == shim.KILL else mode, **options)
    assert statuses == [0] * world_size and calls, (statuses, calls)
    assert after_a_kill(whole_run, kind, world_size, 30, {}) is not None, "the comparison must be able to fail"
    reference = bytes_of(whole_run)
    points = [(n,) for n in range(1, calls + 1)]
    if most is not None and most < calls:
        points = [points[round(i * (calls - 1) / (most - 1))] for i in range(most)]
    points += [(draw.randint(1, calls), draw.randint(1, calls)) for _ in range(again)]
    faults, hits = [], 0
    for point in points:
        place, saved = fresh(f"{point}"), 5 if used else 0
        for number, n in enumerate(point):
            statuses, newest, _ = run_killed(place, kind, n=n, mode=mode, **options)
            saved = max(saved, newest)
            hits += statuses[victim] == -9
            allowed = {victim: (-9,) if number == 0 else (-9, 0), 1 - victim: (0, 1)}
            if any(status not in allowed[rank] for rank, status in enumerate(statuses)):
                faults.append(f"{point}: the processes ended with {statuses}")
        fault = after_a_kill(place, kind, world_size, saved, reference)
        faults += [f"{point}: {fault}"] if fault else []
        shutil.rmtree(place.parent)
    return {"calls": calls, "trials": len(points), "kills": hits, "faults": faults,
            "per_minute": round(60 * len(points) / (time.perf_counter() - began))}
