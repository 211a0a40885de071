"""States of a few bytes for the tests of the checkpoint store."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from megatron_ttl.checkpoint.store import Checkpoint, CheckpointStore

FILES = ["weights.safetensors", "exp_avg.safetensors", "rng.safetensors", "record.json", "manifest.json"]
FUTURE = 10**9  # no process has such a number


def state(step: int) -> dict[str, dict[str, Tensor]]:
    """A small training state, another one for every step."""
    generator = torch.Generator().manual_seed(step)
    weights = {"model.a.weight": torch.randn(7, 5, generator=generator),
               "model.b.weight": torch.randn(3, generator=generator)}
    return {"weights": weights, "exp_avg": {name: tensor * 0.1 for name, tensor in weights.items()},
            "rng": {"torch": generator.get_state()}}


def save(store: CheckpointStore, *steps: int) -> None:
    for step in steps:
        store.save(step, state(step), {"consumed_samples": step * 8, "note": "épocas"})


def assert_holds(checkpoint: Checkpoint, step: int) -> None:
    assert checkpoint.step == checkpoint.record["consumed_samples"] // 8 == step
    for group, tensors in state(step).items():
        loaded = checkpoint.tensors(group)
        assert list(loaded) == list(tensors)
        for name, tensor in tensors.items():
            assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)


def names(store: CheckpointStore) -> list[str]:
    return sorted(os.listdir(store.directory))


def flip(position: float, bit: int = 0) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        payload = bytearray(path.read_bytes())
        payload[int(position * (len(payload) - 1))] ^= 1 << bit
        path.write_bytes(payload)
    return damage


def cut(position: float) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes()[: int(position * path.stat().st_size)])


def twin(path: Path) -> Path:
    """Return the same file of step 10."""
    return path.parent.with_name("step-00000010") / path.name


def replace_by(path: Path, make: Callable[[Path], None]) -> None:
    path.unlink()
    make(path)
