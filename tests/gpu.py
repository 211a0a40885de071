"""The one mark and the one reason of tests that need a GPU."""

from __future__ import annotations

import pytest
import torch

needs_gpu = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))
"""Marks of a test or parameter: `pytestmark = list(needs_gpu)`, `pytest.param("cuda", marks=needs_gpu)`."""


def gpu_test(function):
    """Mark one test."""
    for mark in needs_gpu:
        function = mark(function)
    return function
