"""What of the machine profile decides how a step is computed on this machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

import torch

from megatron_ttl.config.deepspeed import DeepSpeedProfile
from megatron_ttl.config.engine import EngineKind, engine_kind, records_graphs
from megatron_ttl.config.schema import RunFile
from megatron_ttl.kernels.paths import KernelPaths, resolve_paths

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Of weights and activations, by the precision of a machine profile."""


@dataclass(frozen=True)
class EngineOptions:
    """Choices between ways to compute the same numbers."""

    kind: EngineKind = "deepspeed"
    """Whose step it is."""
    compile: bool = False
    """Whether torch.compile makes the blocks' kernels."""
    graphs: Literal["off", "try", "require"] = "off"
    """Whether the flat engine's step is recorded; `try` goes on without where that fails."""
    paths: KernelPaths = KernelPaths()
    """The implementation of each operation."""

    def __str__(self) -> str:
        """Return one line for people."""
        chosen: dict[str, list[str]] = {}
        for operation, path in asdict(self.paths).items():
            chosen.setdefault(path, []).append(operation)
        words = [self.kind, *(["step recorded as CUDA graphs"] if self.graphs != "off" else []),
                 *(["blocks compiled"] if self.compile else [])]
        return f"{', '.join(words)}; {'; '.join(f'{path}: ' + ', '.join(names) for path, names in chosen.items())}"


def engine_options(run: RunFile, profile: DeepSpeedProfile, world_size: int, device: torch.device) -> EngineOptions:
    """Return what the profile chooses on so many processes and this device.

    Raises:
        ConfigError: an implementation that is asked for by name is not there.
    """
    cuda = device.type == "cuda"
    kind = engine_kind(profile, world_size, cuda)
    graphs: Literal["off", "try", "require"] = "off"
    if records_graphs(profile, run, kind, cuda):
        graphs = "require" if profile.cuda_graphs is True else "try"
    paths = resolve_paths(profile.kernels.model_dump(), device, DTYPES[profile.precision]).paths
    return EngineOptions(kind, profile.compile, graphs, paths)
