"""Dense bf16 peaks of GPUs: the denominator of MFU. Sparse figures are twice these and never apply to training."""

from __future__ import annotations

_PEAKS = (
    # (all of these words in the device's name, FLOP/s)
    # Source: NVIDIA's data sheets, "BFLOAT16 Tensor Core", halved where they print the sparse rate.
    (("H100", "PCIE"), 756e12),
    (("H100", "NVL"), 835e12),
    (("H100",), 989e12),
    (("H200",), 989e12),
    (("GH200",), 989e12),
    (("A100",), 312e12),
    (("A800",), 312e12),
    (("A40",), 149.7e12),
    (("L40S",), 362e12),
    (("L4",), 121e12),
    (("A10G",), 70e12),
    (("A10",), 125e12),
    (("RTX 3090",), 71e12),
    (("RTX 4090",), 165.2e12),
)


def peak_flops(device_name: str) -> float | None:
    """Return the dense bf16 peak in FLOP/s of a device such as "NVIDIA A100-SXM4-40GB"; None if it is not listed."""
    name = device_name.upper()
    words = name.replace("-", " ").split()
    for needed, peak in _PEAKS:
        if all(word in name if " " in word else any(w == word or w.startswith(word + "_") for w in words)
               for word in needed):
            return peak
    return None
