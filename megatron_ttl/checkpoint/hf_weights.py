"""The weights of a model folder: safetensors in one file, or in several with an index."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from megatron_ttl.checkpoint.bounded_json import read_json_object
from megatron_ttl.checkpoint.names import hf_names, hf_shapes, join_from_hf
from megatron_ttl.checkpoint.tensor_file import open_tensors, write_tensors
from megatron_ttl.config.schema import ModelConfig
from megatron_ttl.errors import CheckpointError, raise_faults
from megatron_ttl.model.llama import build_model

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors")
_FLOATS = {"F32", "BF16", "F16"}
_CURE = "get the folder again, or convert the checkpoint again with tools/convert_to_hf.py"
# Old Llama files carry the rotary frequencies, which follow from the config.
_DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def write_weights(folder: Path, tensors: Mapping[str, Tensor], config: ModelConfig, dtype: torch.dtype,
                  max_shard_bytes: int, report: Callable[[float], None]) -> None:
    """Write the weights in a dtype, several files with an index if they are larger than `max_shard_bytes`.

    Args:
        folder: where the files go; must not have them yet.
        tensors: fp32, by Hugging Face's names.
        config: the model's shape.
        dtype: what is stored.
        max_shard_bytes: a file is larger only where one tensor is.
        report: is told the bytes written so far.
    """
    shards: list[list[str]] = [[]]
    room = max_shard_bytes
    for name, shape in hf_shapes(config).items():
        size = math.prod(shape) * dtype.itemsize
        if size > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size
    total = 0
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        content = {name: tensors[name].to(dtype) for name in names}
        write_tensors(folder / file, content, {"format": "pt"})
        total += sum(tensor.nbytes for tensor in content.values())
        weight_map.update(dict.fromkeys(names, file))
        report(total)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class WeightFiles:
    """Which file of a model folder holds which tensor."""

    folder: Path
    file_of: dict[str, str]


def find_weights(folder: Path, config: ModelConfig) -> WeightFiles:
    """Find every weight that the config asks for, and check names, shapes and dtypes without reading tensors.

    Raises:
        CheckpointError: with all faults.
    """
    files = [SINGLE] if (folder / SINGLE).exists() else _indexed_files(folder)
    expected = hf_shapes(config)
    faults: list[str] = []
    file_of: dict[str, str] = {}
    for file in files:
        try:
            with open_tensors(folder / file) as handle:
                for name in handle.keys():
                    piece = handle.get_slice(name)
                    faults += _tensor_faults(name, tuple(piece.get_shape()), piece.get_dtype(), expected,
                                             file_of)
                    file_of[name] = file
        except (SafetensorError, OSError) as error:
            faults.append(f"{file}: is no readable safetensors file ({error}); it must be one")
    missing = [name for name in expected if name not in file_of]
    faults += [f"{name}: is missing; the config asks for {expected[name]}" for name in missing]
    raise_faults(CheckpointError, (f"{folder}: {fault}; {_CURE}" for fault in faults))
    return WeightFiles(folder, {name: file_of[name] for name in expected})


def load_weights(weights: WeightFiles, config: ModelConfig, device: torch.device | str,
                 dtype: torch.dtype) -> nn.Sequential:
    """Build the model and read its weights, one at a time."""
    with ExitStack() as stack:
        return build_from(open_weights(weights, stack), config, device, dtype)


def open_weights(weights: WeightFiles, stack: ExitStack) -> Callable[[str], Tensor]:
    """Open the files until the stack is closed; return what reads a tensor by its name."""
    handles = {file: stack.enter_context(open_tensors(weights.folder / file))
               for file in sorted(set(weights.file_of.values()))}
    return lambda name: handles[weights.file_of[name]].get_tensor(name)


def build_from(tensor_of: Callable[[str], Tensor], config: ModelConfig, device: torch.device | str = "cpu",
               dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Build the model from weights by Hugging Face's names."""
    model = build_model(config, None, device, dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(join_from_hf(name, {hf: tensor_of(hf) for hf in hf_names(name, config)}, config))
    return model


def _indexed_files(folder: Path) -> list[str]:
    """Return the files of the index; they must lie in the folder itself."""
    if not (folder / INDEX).exists():
        pickles = (".bin", ".pt", ".pth", ".ckpt")
        pickled = ", ".join(sorted(path.name for path in folder.iterdir() if path.suffix in pickles))
        why = f"; {pickled[:80]} is not read, for opening such a file can run code" if pickled else ""
        raise CheckpointError(f"{folder}: has no {SINGLE}{why}; weights must be safetensors; {_CURE}")
    weight_map = read_json_object(folder / INDEX, follow_links=True).get("weight_map")
    names = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else {"weight_map"}
    wrong = [name for name in sorted(names) if not _FILE_NAME.fullmatch(name)]
    raise_faults(CheckpointError, (f"{folder / INDEX}: file {name[:80]!r}; it must be a safetensors file of "
                                   f"this folder; {_CURE}" for name in wrong))
    return sorted(names)


def _tensor_faults(name: str, shape: tuple[int, ...], dtype: str, expected: Mapping[str, tuple[int, ...]],
                   seen: Mapping[str, str]) -> list[str]:
    if _DERIVED.fullmatch(name):
        return []
    if name not in expected:
        return [f"{name[:120]!r}: is not a weight of this model; there must be no other"]
    if name in seen:
        return [f"{name}: stands in two files; it must stand in one"]
    faults = []
    if shape != expected[name]:
        faults.append(f"{name}: has shape {shape}; the config asks for {expected[name]}")
    if dtype not in _FLOATS:
        faults.append(f"{name}: is {dtype}; it must be one of {', '.join(sorted(_FLOATS))}")
    return faults
