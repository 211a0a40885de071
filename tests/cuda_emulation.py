"""The kernels' own sources, compiled for the host: what a GPU would compute, on CPU tensors."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_ttl.kernels import build
from megatron_ttl.runtime import cache_folder

EMULATOR = Path(__file__).parent / "kernels" / "cuda_emulator"
FLAGS = ("-O2", "-std=c++17", "-fPIC", "-DTTL_EMULATED", "-I", str(EMULATOR), "-x", "c++")


@lru_cache
def emulated_library() -> build.KernelLibrary:
    """Compile the kernels for the host and load them; needs g++, which DeepSpeed and torch.compile need as well."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    return build.KernelLibrary(build.compiled((compiler, *FLAGS), build.SOURCES, cache_folder() / "emulated",
                                              sorted(EMULATOR.glob("*.h"))))


@contextmanager
def emulation() -> Iterator[build.KernelLibrary]:
    """Let CPU tensors take the kernels' path."""
    library = emulated_library()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "kernels_for", {"cpu": library}.get)
        yield library


def set_order(backwards: bool) -> None:
    """Choose whether threads and blocks run from the first to the last or the other way; results must not differ."""
    emulated_library().call("emulator_order", int(backwards), device=torch.device("cpu"))


def in_both_orders(run: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
    """Return what a run gives, the same bits whichever threads and blocks come first."""
    results = []
    for backwards in (False, True):
        set_order(backwards)
        try:
            results.append(run())
        finally:
            set_order(False)
    for forth, back in zip(*results, strict=True):
        assert torch.equal(forth.reshape(-1).view(torch.uint8), back.reshape(-1).view(torch.uint8))
    return results[0]
