"""Modules that own a part, by themselves; what they exchange is tested with processes, in tests/train."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from megatron_ttl.kernels.paths import KernelPaths
from megatron_ttl.kernels.rms_norm import rms_norm
from megatron_ttl.model.llama import use_paths
from megatron_ttl.parallel.tensor import SequenceParallelNorm


def test_the_norm_of_some_tokens_adds_shares_its_weight_and_takes_its_path():
    """As the norm it stands for: alone, and with something to add."""
    norm = SequenceParallelNorm(torch.rand(8), 1e-6, SimpleNamespace(share=lambda weight: 2 * weight))
    use_paths(nn.Sequential(norm), KernelPaths(rms_norm="torch", swiglu="another"))
    assert norm.paths.swiglu == "another" and list(norm.state_dict()) == ["weight"]
    x, delta = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    assert torch.equal(norm(x), rms_norm(x, 2 * norm.weight, 1e-6))
    total, normed = norm(x, delta)
    assert torch.equal(total, x + delta) and torch.equal(normed, norm(x + delta))
