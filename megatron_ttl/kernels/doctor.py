"""What this machine can run: versions, the implementation of each operation, and how exact it is here."""

from __future__ import annotations

import ctypes
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch

from megatron_ttl.kernels import build
from megatron_ttl.kernels.apex import installed_apex
from megatron_ttl.kernels.attention_backend import attention_that_runs
from megatron_ttl.kernels.paths import resolve_paths
from megatron_ttl.kernels.self_check import error_ratios
from megatron_ttl.runtime import cache_folder, cuda_compiler

_ABSENT = "absent"


def examine(choice: Mapping[str, str], device: torch.device, dtype: torch.dtype,
            packages: Iterable[str]) -> dict[str, Any]:
    """Return versions and, for each operation, its implementation, why, and on a GPU how its error compares.

    Args:
        choice: section "kernels" of a machine profile.
        device, dtype: where and in what the model computes.
        packages: whose versions are wanted.

    Returns:
        `versions`, a dict of texts, and `operations`, a list of dicts with operation, path, why and error: that of outputs
        and gradients over the error of PyTorch's own operations in the same dtype, the larger one; None where nothing ran.

    Raises:
        ConfigError: something is asked for by name that is not there.
    """
    report = resolve_paths(choice, device, dtype)
    errors = error_ratios(asdict(report.paths), device, dtype) if device.type == "cuda" else {}
    ran = {"attention": f"; {attention_that_runs(device, report.paths.attention, dtype)} ran"} if device.type == "cuda" else {}
    return {"versions": versions(device, packages),
            "operations": [{"operation": operation, "path": path, "why": why + ran.get(operation, ""), "error": errors.get(operation)}
                           for operation, path, why in report.rows]}


def versions(device: torch.device, packages: Iterable[str]) -> dict[str, str]:
    """Return versions and places of what decides which implementation runs."""
    compiler = cuda_compiler()
    found = {"python": sys.version.split()[0], "torch": torch.__version__,
             "CUDA of torch": torch.version.cuda or _ABSENT, "CUDA of the driver": _driver_version(),
             "nvcc": _ABSENT if compiler is None else f"{_nvcc_version(str(compiler))}, {compiler}"}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = _ABSENT
    found["apex"] = installed_apex() or _ABSENT
    found["device"] = f"{device}: {build.why_not('cuda')}" if device.type == "cpu" else str(device)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = (f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
                           f"{properties.multi_processor_count} multiprocessors, {properties.total_memory / 2**30:.1f} GiB")
    return found | {"compiled kernels": str(cache_folder() / "kernels")}


def _nvcc_version(compiler: str) -> str:
    try:
        told = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"does not run ({type(error).__name__})"
    match = re.search(r"release ([\d.]+)", told)
    return match[1] if match else "of unknown version"


def _driver_version() -> str:
    """Return the newest CUDA that the driver knows; PyTorch has no public word for it."""
    number = ctypes.c_int()
    try:
        code = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    except OSError:
        return _ABSENT
    return f"{number.value // 1000}.{number.value % 1000 // 10}" if code == 0 else f"error {code}"
