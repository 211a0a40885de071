"""Run folders with two checkpoints, made by hand or by real runs, and every way to damage a file of the newer one."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from store_peers import on_all
from tiny_session import train_here, write_data, write_settings

from megatron_ttl.checkpoint.pieces import Piece, whole
from megatron_ttl.checkpoint.store import CheckpointStore
from megatron_ttl.config.load import Settings, load_settings
from megatron_ttl.files import write_json
from megatron_ttl.testing import run_distributed
from megatron_ttl.train.run_folder import RunFolder

PAGE = 4096
OLDER, NEWEST = 2, 4


@dataclass(frozen=True)
class Place:
    """A run folder whose two checkpoints are whole, the same of another number of processes, and its command."""

    settings: Settings
    other: Path
    arguments: tuple[str, ...]
    """For `pretrain_ttl.py`."""

    @property
    def run(self) -> Path:
        """The run folder."""
        return Path(self.settings.run.run.dir)

    @property
    def newest(self) -> Path:
        """The folder that gets damaged."""
        return self.run / f"checkpoints/step-{NEWEST:08d}"

    @property
    def older(self) -> Path:
        """The folder that is left."""
        return self.run / f"checkpoints/step-{OLDER:08d}"

    @property
    def files(self) -> list[str]:
        """Every file of the newest checkpoint."""
        return sorted(path.name for path in self.newest.iterdir())

    def folder(self) -> RunFolder:
        """Return the run folder as a new run sees it."""
        return RunFolder(self.settings)


def synthetic(folder: Path, processes: int, rows: int) -> Place:
    """Save two steps as a number of processes does together; `rows` of 256 bytes a group."""
    folder.mkdir(parents=True)
    place = _place(folder, folder / "data", [])
    settings = place.settings.run.model_dump(mode="json")
    for count, run in ((processes, "run"), (3 - processes, "other")):
        for step in (OLDER, NEWEST):
            saved = on_all(count, lambda peers, run=run, step=step: CheckpointStore(folder / run / "checkpoints").save(
                step, _state(step, rows, peers), {"step": step, "consumed_samples": 8 * step, "run": settings,
                                                  "consumed_tokens": 256 * step, "note": "épocas"}, peers))
            assert all(found.written for found in saved), saved
    write_json(place.run / "settings.json", {"run": settings})
    return place


def _state(step: int, rows: int, peers) -> dict[str, dict[str, Piece]]:
    generator = torch.Generator().manual_seed(step)
    state: dict[str, dict[str, Piece]] = {}
    for group in ("weights", "exp_avg", "exp_avg_sq"):
        table = torch.randn(rows, 64, generator=generator)
        share = rows // peers.world_size
        state[group] = {"table": Piece(table[peers.rank * share:][:share], (rows, 64), (peers.rank * share, 0))}
        if peers.rank == 0:
            state[group]["norm"] = whole(torch.randn(64, generator=generator))
    state["rng"] = {"torch": whole(generator.get_state())} if peers.rank == 0 else {}
    return state


def trained(folder: Path, processes: int, hidden_size: int) -> Place:
    """Train four steps on the tiny dataset, on one process or on two that share every layer."""
    folder.mkdir(parents=True)
    data = write_data(folder / "data")
    sizes = [f"model.hidden_size={hidden_size}", f"model.intermediate_size={4 * hidden_size}"]
    for count, run in ((processes, "run"), (3 - processes, "other")):
        place = _place(folder, data, sizes, count)
        arguments = [str(place.settings.deepspeed_path), str(place.settings.run_path), [*place.arguments[4:-1],
                                                                                       f"run.dir={folder / run}"]]
        assert run_distributed(train_here, count, *arguments) == [0] * count
    return _place(folder, data, sizes, processes)


def _place(folder: Path, data: Path, sizes: list[str], processes: int = 1) -> Place:
    profile = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1},
               "parallel": {"tensor": processes}}
    deepspeed, run = write_settings(folder, data, folder / "run", profile)
    overrides = ["train.steps=4", "checkpoint.every_steps=2", "schedule.warmup_steps=1", *sizes,
                 f"run.dir={folder / 'run'}"]
    return Place(load_settings(deepspeed, run, overrides), folder / "other/checkpoints",
                 ("--deepspeed_config", str(deepspeed), "--config", str(run), *overrides))


def flips(place: Place, count: int, seed: int) -> Iterator[tuple[str, str]]:
    """Flip one bit after the other, in all files alike; yield what and in which file, while it is damaged."""
    draw = random.Random(seed)
    files = place.files
    for number in range(count):
        path = place.newest / files[number % len(files)]
        at, bit = draw.randrange(path.stat().st_size), draw.randrange(8)
        with open(path, "r+b") as handle:
            handle.seek(at)
            byte = handle.read(1)
            with _written(handle, at, bytes([byte[0] ^ 1 << bit]), byte):
                yield f"bit {bit} of byte {at:,}", path.name


def zeroed_pages(place: Place, count: int, seed: int) -> Iterator[tuple[str, str]]:
    """Let a disk forget one page of 4 KiB after the other; pages that are zero already do not count."""
    draw = random.Random(seed)
    files, done = place.files, 0
    while done < count:
        path = place.newest / files[done % len(files)]
        at = draw.randrange(path.stat().st_size) // PAGE * PAGE
        with open(path, "r+b") as handle:
            handle.seek(at)
            page = handle.read(PAGE)
            if any(page):
                done += 1
                with _written(handle, at, bytes(len(page)), page):
                    yield f"page at {at:,}", path.name


@contextlib.contextmanager
def _written(handle, at: int, damage: bytes, former: bytes) -> Iterator[None]:
    for payload in (damage, former):
        handle.seek(at)
        handle.write(payload)
        handle.flush()
        if payload is damage:
            yield


def torn(place: Place, cuts: int) -> list[tuple[str, str, Callable[[Path], None]]]:
    """List (what, file, how) for every file: what is left of a file that was not written or copied to its end."""
    found = []
    for name in place.files:
        size = (place.newest / name).stat().st_size
        ways: dict[str, Callable[[Path], None]] = {
            "missing": os.unlink,
            "one byte more": lambda path: _rewrite(path, path.read_bytes() + b"\0"),
            "of another step": lambda path: _rewrite(path, (place.older / path.name).read_bytes()),
            "a symbolic link to the same": _link_to_itself,
            "a link to nothing": lambda path: (path.unlink(), path.symlink_to("nowhere")),
            "a folder": lambda path: (path.unlink(), path.mkdir()),
            "a FIFO": lambda path: (path.unlink(), os.mkfifo(path)),
        }
        for offset in sorted({0, 1, 7, 8, 9, size // 2, size - 1, *(size * cut // cuts for cut in range(cuts))}):
            if offset < size:
                ways[f"cut at {offset:,} of {size:,}"] = lambda path, offset=offset: _rewrite(path, path.read_bytes()[:offset])
        for other in (*sorted(place.other.glob(f"step-{NEWEST:08d}/{_kin(name)}")), *sorted(place.newest.glob(_kin(name)))):
            if other.read_bytes() != (place.newest / name).read_bytes():
                ways[f"{other.name} of {other.parent.parent.parent.name}"] = lambda path, other=other: _rewrite(
                    path, other.read_bytes())
        if (place.older / name).read_bytes() == (place.newest / name).read_bytes():
            del ways["of another step"]  # the generators of a run without dropout stand still
        found += [(what, name, way) for what, way in ways.items()]
    return found


def _kin(name: str) -> str:
    """Files of the same group, of any rank and any number of ranks."""
    return name.split("-")[0].split(".")[0] + "*." + name.rpartition(".")[2]


def _rewrite(path: Path, payload: bytes) -> None:
    path.unlink()
    path.write_bytes(payload)


def _link_to_itself(path: Path) -> None:
    path.rename(path.parent.parent / f"moved-{path.name}")
    path.symlink_to(path.parent.parent / f"moved-{path.name}")


@contextlib.contextmanager
def damaged(place: Place, name: str, way: Callable[[Path], object]) -> Iterator[None]:
    """Damage one file of the newest checkpoint, and put it back afterwards."""
    path = place.newest / name
    payload = path.read_bytes()
    way(path)
    try:
        yield
    finally:
        remove(path)
        remove(path.parent.parent / f"moved-{name}")
        path.write_bytes(payload)


def remove(path: Path) -> None:
    """Delete whatever has this name."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()


def settings_damage(path: Path, flip_count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Yield (what, content) of settings files that say nothing, too little, or something else."""
    text, draw = path.read_bytes(), random.Random(seed)
    other = json.loads(text)
    other["run"]["run"]["seed"] += 1
    yield from {"empty": b"", "null": b"null", "a list": b"[]", "no run": b"{}", "a run of text": b'{"run": "x"}',
                "an empty run": b'{"run": {}}', "zeros": bytes(len(text)), "deep": b'{"run":' * 3000,
                "of another run": json.dumps(other).encode(), "no UTF-8": text.replace(b"run", b"r\xffn", 1),
                "huge": text + b" " * (5 << 20)}.items()
    for _ in range(flip_count):
        at = draw.randrange(1, len(text) - 2)  # without the line break at the end
        yield f"cut at {at}", text[:at]
