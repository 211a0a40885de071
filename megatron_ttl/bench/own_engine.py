"""The engine and the implementations that a run with these settings would take."""

from __future__ import annotations

from functools import lru_cache

import torch

from megatron_ttl.bench.workload import Workload
from megatron_ttl.config.deepspeed import resolve_deepspeed
from megatron_ttl.config.engine import engine_world_faults
from megatron_ttl.config.kernels import KernelsConfig
from megatron_ttl.errors import ConfigError, raise_faults
from megatron_ttl.kernels.attention_backend import prefer_attention_backend
from megatron_ttl.kernels.paths import KernelPaths, resolve_paths
from megatron_ttl.train.engine import Engine
from megatron_ttl.train.engine_options import DTYPES, EngineOptions, engine_options


def build_engine(workload: Workload) -> Engine:
    """Build the engine that a run with these settings would train with.

    Raises:
        ConfigError: something is asked for that is not there.
    """
    return Engine(workload.run, resolve_deepspeed(workload.settings, 1), workload.mesh, workload.settings.profile.recompute,
                  workload.eos_id, _options(workload))


def engine_paths(workload: Workload) -> KernelPaths:
    """Return the implementations that the engine's model takes."""
    return _options(workload).paths


def prefer_attention(workload: Workload) -> None:
    """Switch PyTorch to the attention backend that the engine switches to."""
    dtype = DTYPES[workload.settings.profile.precision]
    prefer_attention_backend(engine_paths(workload).attention, workload.device, dtype)


def engine_words(workload: Workload) -> str:
    """Say who steps, and how."""
    profile = workload.settings.profile
    words = [str(_options(workload)), profile.precision]
    return ", ".join([*words, *([f"recompute {profile.recompute}"] if profile.recompute != "none" else [])])


@lru_cache
def require_path(op: str, path: str, device: torch.device) -> str:
    """Return the implementation of an operation, of `KernelsConfig`, if it is there.

    Raises:
        ConfigError: it is not.
    """
    if path != "torch":
        resolve_paths(KernelsConfig.model_validate({op: path}).model_dump(), device)
    return path


def _options(workload: Workload) -> EngineOptions:
    """Return what of the machine profile decides how a step is computed."""
    profile, where = workload.settings.profile, workload.settings.deepspeed_path
    faults = engine_world_faults(profile, 1, workload.device.type == "cuda")
    raise_faults(ConfigError, [f"{where}: {key}: {fault}" for key, fault in faults])
    return engine_options(workload.run, profile, 1, workload.device)
