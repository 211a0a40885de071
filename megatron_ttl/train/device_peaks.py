"""Peak bf16 FLOP/s of devices by name, the denominator of MFU."""

from __future__ import annotations

import re

# Dense bf16 with fp32 accumulation, in FLOP/s. Data sheets print the figure with structured sparsity first,
# which is twice as large: it never applies here. The first pattern found in the device's name counts.
# Source: the makers' data sheets (NVIDIA A100, A800, H100, H200, GH200, B200, A30, A40, A10, L4, L40, L40S,
# RTX A6000, RTX 6000 Ada; the GA102 and AD102 architecture white papers for the RTX 3090 and 4090;
# AMD Instinct MI250X, MI300X).
_PEAKS: tuple[tuple[str, float], ...] = (
    (r"\bMIG\b", 0.0),  # a slice of a device: its share is not in the name
    (r"\bB200\b", 2250e12),
    (r"\bH200 NVL\b", 836e12),
    (r"\bG?H200\b", 989e12),
    (r"\bH[18]00 PCIe\b", 756e12),
    (r"\bH100 NVL\b", 835e12),
    (r"\bH[18]00\b", 989e12),
    (r"\bA[18]00\b", 312e12),
    (r"\bA30\b", 165e12),
    (r"\bA40\b", 149.7e12),
    (r"\bA10\b", 125e12),
    (r"\bRTX A6000\b", 154.8e12),
    (r"\bRTX 6000 Ada\b", 364e12),
    (r"\bL40S\b", 362e12),
    (r"\bL40\b", 181e12),
    (r"\bL4\b", 121e12),
    (r"\bRTX 4090\b(?! D| Laptop)", 165.2e12),
    (r"\bRTX 3090\b(?! Ti)", 71e12),
    (r"\bMI300X\b", 1307.4e12),
    (r"\bMI250X\b", 191.5e12),  # one of its two dies: that is what the runtime calls a device
)


def peak_flops_per_s(device_name: str) -> float | None:
    """Return the dense bf16 peak of a device by its driver's name; None for a CPU or an unknown device."""
    for pattern, peak in _PEAKS:
        if re.search(pattern, device_name):
            return peak or None
    return None


def model_flops_utilisation(tokens_per_s: float, flops_per_token: float, peak: float | None,
                            devices: int = 1) -> float | None:
    """Return the share of the peak that the model's arithmetic uses, over all devices; None without a peak.

    Source: PaLM (Chowdhery et al. 2022), appendix B; the FLOPs are those of `model/flops.py`, formula C.
    """
    return tokens_per_s * flops_per_token / (peak * devices) if peak else None
