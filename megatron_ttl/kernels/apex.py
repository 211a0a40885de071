"""The door to NVIDIA Apex: its RMSNorm and its AdamW, where somebody has built them.

Apex is on no package index: the `apex` of PyPI is another project, a toolkit for Pyramid, and is recognised here.
Source: https://github.com/NVIDIA/apex.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_EXTENSIONS = {"rms_norm": "fused_layer_norm_cuda", "adamw": "amp_C"}
"""What Apex has compiled for each operation; without it, it falls back to slow Python or fails."""
_BUILD = "build it from github.com/NVIDIA/apex with its C++ and CUDA extensions"


def apex_refusal(operation: str, device: torch.device) -> str | None:
    """Return why Apex cannot do an operation of `KernelPaths` on a device; None where it can.

    Args:
        operation: "rms_norm" or "adamw".
        device: where it would compute.
    """
    found = installed_apex()
    if found is None:
        return f"NVIDIA Apex is not installed; {_BUILD}"
    if not found.startswith("NVIDIA"):
        return f"the installed package apex is {found}, not NVIDIA's; pip uninstall apex, and {_BUILD}"
    if importlib.util.find_spec(_EXTENSIONS[operation]) is None:
        return f"{found} was built without its extension {_EXTENSIONS[operation]}; {_BUILD}"
    if device.type != "cuda":
        return f"{found} computes on a GPU and not on {device.type}"
    return None


def installed_apex() -> str | None:
    """Return which package answers to the name `apex`, and its version, without importing it; None where none does."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return None
    try:
        version = importlib.metadata.version("apex")
    except importlib.metadata.PackageNotFoundError:
        version = "of unknown version"
    folders = [Path(place) for place in spec.submodule_search_locations or ()]
    if any((folder / "normalization" / "fused_layer_norm.py").is_file() for folder in folders):
        return f"NVIDIA Apex {version}"
    return f"the Pyramid toolkit of PyPI, {version}" if version.startswith("0.9") else f"another project, {version}"


def apex_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Apply Apex's fused RMSNorm over the last dimension: [..., h] -> [..., h]."""
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine

    result: Tensor = fused_rms_norm_affine(x, weight, weight.shape, eps)
    return result


def apex_adam() -> Any:
    """Return what Apex's FusedAdam runs where its scalars are on the device, `capturable`: one kernel over lists of tensors.

    Source: csrc/multi_tensor_adam.cu of Apex.
    """
    from amp_C import multi_tensor_adam_capturable

    return multi_tensor_adam_capturable
