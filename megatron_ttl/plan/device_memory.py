"""How much memory devices have, by name."""

from __future__ import annotations

import re

# GB in the name of the product -> GiB that a program finds, rounded down. The first pattern found in the device's name
# counts. Source: the makers' data sheets for the sizes; for what is left of them, "total capacity" in PyTorch's messages.
_MEMORY: tuple[tuple[str, dict[int, float]], ...] = (
    (r"\bMIG\b", {}),  # a slice of a device
    (r"\bB200\b", {180: 177}),
    (r"\bGH200\b", {}),  # several sizes, none of them a round one
    (r"\bH200\b", {141: 139}),
    (r"\bH100 NVL\b", {94: 92}),
    (r"\bH[18]00\b", {80: 78}),
    (r"\bA[18]00\b", {40: 39, 80: 78}),
    (r"\bA30\b", {24: 23}),
    (r"\bA40\b", {48: 44}),
    (r"\bA10G?\b", {24: 21.9}),
    (r"\bRTX (A6000|6000 Ada)\b", {48: 47}),
    (r"\bL40S?\b", {48: 44}),
    (r"\bL4\b", {24: 22}),
    (r"\bRTX 4090\b(?! D| Laptop)", {24: 23.5}),
    (r"\bRTX 3090\b", {24: 23.5}),
    (r"\bV100\b", {16: 15.7, 32: 31.7}),
    (r"\bT4\b", {16: 14.5}),
    (r"\bMI300X\b", {192: 191}),
)


def memory_of(device_name: str) -> dict[str, int]:
    """Return the devices that a name can mean and their bytes: `A100` comes in two sizes, `A100-SXM4-40GB` in one.

    Empty for unknown devices.
    """
    sizes = next((sizes for pattern, sizes in _MEMORY if re.search(pattern, device_name)), {})
    named = re.search(r"(\d+) ?GB\b", device_name)
    if named:
        return {device_name: int(gib * 2**30) for gb, gib in sizes.items() if gb == int(named[1])}
    return {f"{device_name}, {gb} GB": int(gib * 2**30) for gb, gib in sizes.items()}
