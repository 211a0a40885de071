"""Read from a verified checkpoint: a slice, a tensor or a group, wherever its pieces lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_ttl.checkpoint.manifest import Manifest, TensorEntry, file_name
from megatron_ttl.checkpoint.pieces import overlap
from megatron_ttl.checkpoint.tensor_file import TORCH_DTYPES
from megatron_ttl.errors import CheckpointError


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint folder."""

    directory: Path
    step: int
    record: dict[str, Any]
    manifest: Manifest

    @property
    def groups(self) -> list[str]:
        """Names of the groups of tensors."""
        return list(self.manifest.groups)

    def names(self, group: str) -> list[str]:
        """Names of the tensors of one group.

        Raises:
            CheckpointError: there is no such group.
        """
        if group not in self.manifest.groups:
            raise CheckpointError(f"{self.directory}: has no group {group!r}; it has "
                                  f"{', '.join(self.groups)}; use a checkpoint of a training run")
        return list(self.manifest.groups[group])

    def shape(self, group: str, name: str) -> tuple[int, ...]:
        """Shape of a whole tensor; reads nothing.

        Raises:
            CheckpointError: there is no such tensor.
        """
        return tuple(self._entry(group, name).shape)

    def tensors(self, group: str) -> dict[str, Tensor]:
        """Load one group on the CPU, every tensor whole; where it lies whole in one file, memory is the file's own
        pages until written to.

        Raises:
            CheckpointError: there is no such group.
        """
        names = self.names(group)
        if self.manifest.version > 1:
            return {name: self.read(group, name) for name in names}
        with safe_open(self.directory / file_name(group), framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in names}

    def read(self, group: str, name: str, offset: tuple[int, ...] | None = None,
             shape: tuple[int, ...] | None = None) -> Tensor:
        """Load a block of a tensor on the CPU, reading nothing else, from whichever files hold it.

        Args:
            group, name: which tensor.
            offset: where the block begins; None for the tensor's beginning.
            shape: how far it reaches; None for all of the tensor.

        Raises:
            CheckpointError: there is no such tensor.
        """
        entry = self._entry(group, name)
        wanted = (offset or (0,) * len(entry.shape), shape if shape is not None else tuple(entry.shape))
        assert all(0 <= a <= a + n <= most for a, n, most in zip(*wanted, entry.shape, strict=True)), (name, wanted)
        result = torch.empty(wanted[1], dtype=TORCH_DTYPES[entry.dtype])
        for piece in [entry.whole(file_name(group))] if entry.pieces is None else entry.pieces:
            block = (tuple(piece.offset), tuple(piece.shape))
            shared = overlap(wanted, block) if entry.shape else block
            if shared is None:
                continue
            with safe_open(self.directory / piece.file, framework="pt", device="cpu") as file:
                if not entry.shape:
                    return file.get_tensor(name)
                found = file.get_slice(name)[_slices(shared, block[0])]
            if shared == wanted:
                return found
            result[_slices(shared, wanted[0])] = found
        return result

    def _entry(self, group: str, name: str) -> TensorEntry:
        if name not in self.names(group):
            raise CheckpointError(f"{self.directory}: {group} has no tensor {name!r}; it must be of the same model; "
                                  "use a checkpoint of this run")
        return self.manifest.groups[group][name]


def _slices(block: tuple[tuple[int, ...], tuple[int, ...]], origin: tuple[int, ...]) -> tuple[slice, ...]:
    """Return a block as slices of a tensor that begins at `origin`."""
    return tuple(slice(start - base, start - base + size) for start, size, base in zip(*block, origin, strict=True))
