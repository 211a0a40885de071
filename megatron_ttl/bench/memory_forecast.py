"""Whether settings fit into the device's memory, before a process is started for them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_ttl.config.load import Settings
from megatron_ttl.files import human_bytes
from megatron_ttl.plan.memory import peak_memory


def why_it_does_not_fit(settings: Settings, device_bytes: int | None = None,
                        needed_bytes: Callable[[Settings], int] | None = None) -> str:
    """Return why a run with these settings is forecast not to fit into the memory of the device; nothing if it fits.

    Args:
        settings: of one process.
        device_bytes: what the device has; None for the GPU's, and on a CPU everything fits.
        needed_bytes: the forecast; None for that of `plan/memory.py`.
    """
    if device_bytes is None and torch.cuda.is_available():
        device_bytes = torch.cuda.get_device_properties(0).total_memory
    if device_bytes is None:
        return ""
    needed = (needed_bytes or _forecast)(settings)
    if needed <= device_bytes:
        return ""
    return f"needs {human_bytes(needed)} by the forecast; the device has {human_bytes(device_bytes)}"


def _forecast(settings: Settings) -> int:
    return peak_memory(settings, 1).needed
