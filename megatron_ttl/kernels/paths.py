"""Which implementation of each operation runs on a device, and why."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KernelPaths:
    """One implementation per operation, by the names of the machine profile; the defaults run everywhere."""

    rms_norm: str = "torch"
    rotary: str = "torch"
    swiglu: str = "torch"
    cross_entropy: str = "torch"
    adamw: str = "torch"
    attention: str = "auto"
