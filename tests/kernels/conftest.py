"""Fixtures of the kernels' tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cuda_emulation import emulation

from megatron_ttl.kernels.build import KernelLibrary


@pytest.fixture
def emulated_kernels() -> Iterator[KernelLibrary]:
    """Let CPU tensors take the kernels' path."""
    with emulation() as library:
        yield library
