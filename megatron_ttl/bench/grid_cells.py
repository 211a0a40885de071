"""The settings that a grid explores: one at a time around a centre, and the way from fp32 to it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

AXES = ("precision", "attention", "optimizer", "micro_batch", "recompute", "compiled", "engine", "cuda_graphs", "data")
"""What may be explored, in the order of the rows."""
_ATTENTION = ("math", "flash", "efficient", "cudnn", "flash_attn")
_OPTIMIZER = ("torch", "cuda", "apex")


@dataclass(frozen=True)
class Cell:
    """One row: how the same steps of the same run are computed."""

    model: str = "ours"
    """`ours`, or `hf`: Hugging Face's Llama in a plain loop, as TTL's scripts had it."""
    precision: str = "fp32"
    """`fp32` without tf32, `tf32`, `bf16`, `fp16`."""
    attention: str = "auto"
    """Of ours, as `kernels.attention` of the machine profile; of Hugging Face's, `eager` or `sdpa`."""
    optimizer: str = "auto"
    """As `kernels.adamw` of the machine profile."""
    micro_batch: int = 1
    """Sequences at a time; the step stays the same, so that it decides the accumulation."""
    recompute: str = "none"
    """As in the machine profile."""
    compiled: bool = False
    """torch.compile of the blocks."""
    engine: str = "auto"
    """As in the machine profile."""
    cuda_graphs: bool | str = "auto"
    """As in the machine profile."""
    data: str = "memmap"
    """`memmap` reads the data as they are needed, `preload` before the first step."""

    @property
    def key(self) -> str:
        """What a row is recognised by."""
        return " ".join(f"{name}={value}" for name, value in asdict(self).items())

    def difference(self, other: Cell) -> str:
        """Say what is not as in another cell."""
        return ", ".join(f"{item.name} {getattr(self, item.name)}" for item in fields(self)
                         if getattr(self, item.name) != getattr(other, item.name))


VANILLA = Cell(model="hf", precision="fp32", attention="eager")
"""The row that speed-ups are told against: fp32 without tf32, attention written out."""


def cell_of(values: Mapping[str, Any]) -> Cell:
    """Return the cell of a row that was read from a file."""
    return Cell(**values)


def centre_of(cuda: bool, micro_batch: int) -> Cell:
    """Return what is varied: what the machine computes fastest without losing accuracy."""
    return Cell(precision="bf16" if cuda else "fp32", micro_batch=micro_batch)


def reference_of(micro_batch: int) -> Cell:
    """Return the row whose loss the others' must equal."""
    return Cell(micro_batch=micro_batch)


def plan_cells(cuda: bool, micro_batch: int, samples_per_step: int, axes: Sequence[str] = AXES) -> list[Cell]:
    """Return the rows to measure: vanilla and what TTL made of it, then ours by precision, then one axis at a time.

    Args:
        cuda: whether there is a GPU.
        micro_batch: of the centre.
        samples_per_step: which every micro batch divides.
        axes: names of `AXES`.
    """
    centre, vanilla = centre_of(cuda, micro_batch), replace(VANILLA, micro_batch=micro_batch)
    cells = [vanilla, *(replace(vanilla, precision=precision, attention="sdpa") for precision in ("fp32", "tf32", "bf16")),
             reference_of(micro_batch)]
    values: dict[str, Sequence[Any]] = {
        "precision": ("tf32", "bf16", "fp16"), "attention": _ATTENTION, "optimizer": _OPTIMIZER,
        "micro_batch": [size for size in (micro_batch // 4, micro_batch // 2, 2 * micro_batch, 4 * micro_batch)
                        if size and samples_per_step % size == 0],
        "recompute": ("selective", "full"), "compiled": (True,), "engine": ("deepspeed", "flat"),
        "cuda_graphs": (False, True), "data": ("preload",)}
    cells.append(centre)
    for axis in AXES:
        cells += [replace(centre, **{axis: value}) for value in values[axis] if axis in axes]
    return list(dict.fromkeys(cells))


def combined(centre: Cell, fastest: Mapping[str, Any]) -> Cell:
    """Return the centre with the fastest value of every axis: what pays alone need not pay together."""
    return replace(centre, **fastest)


def profile_of(cell: Cell, base: Mapping[str, Any]) -> dict[str, Any]:
    """Return the machine profile of a cell of ours: the base with what the cell says.

    Of Hugging Face's cells it says precision and micro batch, which is what is read of it there; tf32 is no key of a
    profile and is fp32 in it.
    """
    profile = copy.deepcopy(dict(base))
    for key in ("bf16", "fp16", "communication_data_type", "recompute", "compile", "engine", "cuda_graphs"):
        profile.pop(key, None)
    profile["train_micro_batch_size_per_gpu"] = cell.micro_batch
    if cell.precision in ("bf16", "fp16"):
        profile[cell.precision] = {"enabled": True}
    if cell.model == "hf":
        profile.pop("kernels", None)
        return profile
    kernels = dict(profile.pop("kernels", None) or {})
    for key, value in (("attention", cell.attention), ("adamw", cell.optimizer)):
        kernels.pop(key, None)
        if value != "auto":
            kernels[key] = value
    loader = {**(profile.pop("data_loader", None) or {}), "preload": cell.data == "preload"}
    given = {"recompute": (cell.recompute, "none"), "compile": (cell.compiled, False), "engine": (cell.engine, "auto"),
             "cuda_graphs": (cell.cuda_graphs, "auto"), "kernels": (kernels, {}),
             "data_loader": (loader, {"preload": False})}
    return profile | {key: value for key, (value, usual) in given.items() if value != usual}
