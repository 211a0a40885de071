"""Say which weights were asked: what they are, where they come from, what they cost."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import xxhash
from pydantic import ValidationError
from torch import Tensor

from megatron_ttl.checkpoint.bounded_json import read_json_object
from megatron_ttl.checkpoint.hf import PROVENANCE
from megatron_ttl.checkpoint.hf_weights import find_weights, open_weights
from megatron_ttl.checkpoint.names import hf_shapes
from megatron_ttl.checkpoint.store import Checkpoint
from megatron_ttl.checkpoint.stored_run import StoredRun
from megatron_ttl.config.schema import ModelConfig
from megatron_ttl.console import print_warning
from megatron_ttl.errors import CheckpointError
from megatron_ttl.evaluate.records import ScoredModel


def describe_checkpoint(run: StoredRun, checkpoint: Checkpoint, weights: Mapping[str, Tensor]) -> ScoredModel:
    """Describe a checkpoint of a run, given its weights by Hugging Face's names."""
    return _described(run.name, run.config, weights.__getitem__, run.name, checkpoint.step, checkpoint.record,
                      checkpoint.directory / "record.json")


def describe_folder(folder: Path, config: ModelConfig) -> ScoredModel:
    """Describe a model folder; run, step, tokens and energy are those that its provenance names.

    A provenance that speaks of other weights than those beside it is warned of and left out.

    Raises:
        CheckpointError: the weights or the provenance cannot be read.
    """
    files, origin = find_weights(folder, config), {}
    path = folder / PROVENANCE
    if path.exists():
        origin = read_json_object(path, follow_links=True)
        if not _speaks_of(origin, folder, sorted(set(files.file_of.values()))):
            print_warning(f"{path}: is not about the weights beside it; run, step and energy of these are not known")
            origin = {}
    with ExitStack() as stack:
        return _described(folder.resolve().name, config, open_weights(files, stack), origin.get("run") or None,
                          origin.get("step"), origin, path)


def _described(name: str, config: ModelConfig, tensor_of: Callable[[str], Tensor], run: Any, step: Any,
               record: Mapping[str, Any], where: Path) -> ScoredModel:
    energy = record.get("energy")
    kwh = energy.get("energy_kwh") if isinstance(energy, dict) else None
    try:
        return ScoredModel(name=name, checksum=weights_checksum(tensor_of, config),
                           parameters=sum(math.prod(shape) for shape in hf_shapes(config).values()), run=run,
                           step=step, tokens=record.get("consumed_tokens"), kwh=kwh or None)
    except ValidationError as error:
        keys = ", ".join(str(fault["loc"][0]) for fault in error.errors())
        raise CheckpointError(f"{where}: cannot be read ({keys}); it must be as it was written; restore the file, or "
                              "convert the checkpoint again") from None


def weights_checksum(tensor_of: Callable[[str], Tensor], config: ModelConfig) -> str:
    """Return the xxh3-128 of all weights in fp32, in the order of the layers: `xxh3:<32 hex digits>`.

    The same weights have the same one, in a checkpoint of any layout and in a model folder of any number of files.
    """
    digest = xxhash.xxh3_128()
    for name, shape in hf_shapes(config).items():
        digest.update(f"{name} {list(shape)}".encode())
        digest.update(tensor_of(name).to(torch.float32).contiguous().numpy().data)
    return f"xxh3:{digest.hexdigest()}"


def _speaks_of(origin: Mapping[str, Any], folder: Path, files: list[str]) -> bool:
    """Return whether a provenance has the sha256 of all these files."""
    named = origin.get("files")
    for file in files:
        entry = named.get(file) if isinstance(named, dict) else None
        with open(folder / file, "rb") as handle:
            if not isinstance(entry, dict) or entry.get("sha256") != hashlib.file_digest(handle, "sha256").hexdigest():
                return False
    return True
