"""Which implementation of each operation runs on a device, and why."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache

import torch

from megatron_ttl.errors import ConfigError, raise_faults
from megatron_ttl.kernels import build
from megatron_ttl.kernels.apex import apex_refusal
from megatron_ttl.kernels.attention_backend import attention_refusal
from megatron_ttl.kernels.self_check import error_ratios

_ASKED = "asked for by name"
ERROR_LIMIT = 8.0
"""Of a kernel over PyTorch's on the same inputs: above it something is wrong; chance reaches 3."""


@dataclass(frozen=True)
class KernelPaths:
    """One implementation per operation, by the names of the machine profile; the defaults run everywhere."""

    rms_norm: str = "torch"
    rotary: str = "torch"
    swiglu: str = "torch"
    cross_entropy: str = "torch"
    adamw: str = "torch"
    attention: str = "auto"


@dataclass(frozen=True)
class PathReport:
    """The implementations that a device gets, and a row (operation, path, why) for each."""

    paths: KernelPaths
    rows: list[tuple[str, str, str]]


def resolve_paths(choice: Mapping[str, str], device: torch.device, dtype: torch.dtype = torch.bfloat16) -> PathReport:
    """Decide which implementation each operation takes.

    "auto" is the CUDA kernel where there is one for the device, and PyTorch elsewhere. What is asked for by name must be
    there. The kernels are compiled here, on first use.

    Args:
        choice: section "kernels" of the machine profile; what it leaves out is "auto".
        device: where the model computes.
        dtype: of weights and activations.

    Raises:
        ConfigError: with everything that is asked for by name and is not there.
    """
    rows, faults = [], []
    for operation in asdict(KernelPaths()):
        asked = choice.get(operation, "auto")
        path, why = asked, _ASKED
        if asked == "auto":
            path, why = _best(operation, device, dtype)
        elif refusal := _refusal(operation, asked, device, dtype):
            faults.append(f"kernels.{operation}: is \"{asked}\", which is not there: {refusal}; must be there; "
                          "take \"auto\", or see tools/doctor.py")
        rows.append((operation, path, why))
    raise_faults(ConfigError, faults)
    return PathReport(KernelPaths(**{operation: path for operation, path, _ in rows}), rows)


def _best(operation: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """Return what "auto" means for an operation, and why."""
    if operation == "attention":
        return "auto", ("PyTorch's order: cuDNN on Hopper, then flash, efficient, math" if device.type == "cuda" else
                        f"PyTorch's order on {device.type}: flash, then math")
    if device.type != "cuda" or build.kernels_for("cuda") is None:
        return "torch", build.why_not(device.type) or f"the kernels are for CUDA devices, not for {device.type}"
    error = checked(device, dtype)[operation]
    if error <= ERROR_LIMIT:
        return "cuda", "our kernel is there, and moves the fewest bytes"
    print(f"warning: kernels.{operation}: our kernel's error is {error:.3g} times PyTorch's on {device}; it is not used, and "
          "PyTorch's operations run", file=sys.stderr, flush=True)
    return "torch", f"our kernel's error is {error:.3g} times PyTorch's on this device"


@lru_cache
def checked(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Run every CUDA kernel once before it is trusted, and return its error over PyTorch's; a second's work.

    Raises:
        ConfigError: the device refused one.
    """
    operations = [operation for operation in asdict(KernelPaths()) if operation != "attention"]
    try:
        return error_ratios(dict.fromkeys(operations, "cuda"), device, dtype)
    except RuntimeError as error:
        choice = ", ".join(f'"{operation}": "torch"' for operation in operations)
        raise ConfigError(f"kernels: the first run on {device} failed ({str(error).splitlines()[0]}); they must run; set "
                          f'"kernels": {{{choice}}} in the machine profile') from error


def _refusal(operation: str, path: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why what is asked for by name is not there; None where it is."""
    if operation == "attention":
        return attention_refusal(path, device, dtype)
    if path == "apex":
        return apex_refusal(operation, device)
    if path == "cuda" and build.kernels_for(device.type) is None:
        return build.why_not(device.type)
    return None
