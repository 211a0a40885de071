"""Peaks of devices are the dense ones, by the names that drivers give."""

from __future__ import annotations

import pytest

from megatron_ttl.train.device_peaks import model_flops_utilisation, peak_flops_per_s


@pytest.mark.parametrize(("name", "peak"), [
    ("NVIDIA A100-SXM4-40GB", 312e12),
    ("NVIDIA A100-PCIE-40GB", 312e12),
    ("NVIDIA A100 80GB PCIe", 312e12),
    ("NVIDIA H100 80GB HBM3", 989e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100 NVL", 835e12),
    ("NVIDIA H200", 989e12),
    ("NVIDIA GH200 480GB", 989e12),
    ("NVIDIA B200", 2250e12),
    ("NVIDIA A10", 125e12),
    ("NVIDIA L4", 121e12),
    ("NVIDIA L40S", 362e12),
    ("NVIDIA GeForce RTX 4090", 165.2e12),
    ("AMD Instinct MI300X", 1307.4e12),
    # Not in the table: no figure is better than a wrong one.
    ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ("NVIDIA GeForce RTX 3090 Ti", None),
    ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
    ("NVIDIA A10G", None),
    ("NVIDIA A1000", None),
    ("Tesla V100-SXM2-16GB", None),
    ("x86_64 CPU", None),
    ("", None),
])
def test_peak_by_name(name, peak):
    assert peak_flops_per_s(name) == peak


def test_utilisation_counts_all_devices():
    # 8 devices at 1,000 tokens/s each, 1e11 FLOP per token, peak 1e15: a tenth.
    assert model_flops_utilisation(8000.0, 1e11, 1e15, devices=8) == pytest.approx(0.1)
    assert model_flops_utilisation(8000.0, 1e11, None, devices=8) is None
