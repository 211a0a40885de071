"""The energy that a GPU has drawn, by its own counter. The only door to pynvml."""

from __future__ import annotations

from collections.abc import Callable

import torch

SHORTEST_S = 1.0
"""Below this the counter's steps of some ten milliseconds are too coarse."""


def energy_counter(device: torch.device) -> tuple[Callable[[], float] | None, str]:
    """Return what reads the board's joules since its driver was loaded, or None and why there is none.

    Source: NVML, nvmlDeviceGetTotalEnergyConsumption, in millijoules, Volta and newer.
    """
    if device.type != "cuda":
        return None, "not measured on a CPU"
    try:
        import pynvml
    except ImportError as error:
        return None, f"not measured: nvidia-ml-py cannot be imported ({error})"
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except (pynvml.NVMLError, AttributeError) as error:
        return None, f"not measured: {error}"
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3, ""
