"""The CUDA kernels as a library: compiled on first use, kept, and called with tensors.

The library has a C interface and knows nothing of PyTorch, so one compilation of seconds serves every version of it; it
is kept under a name made of its sources, the compiler and the flags.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from megatron_ttl.files import make_directory, open_own
from megatron_ttl.runtime import cache_folder, cuda_compiler

SOURCES = Path(__file__).parent / "csrc"
NVCC_FLAGS = ("-O3", "-std=c++17", "-gencode", "arch=compute_80,code=sm_80", "-gencode", "arch=compute_90,code=sm_90",
              "-gencode", "arch=compute_90,code=compute_90", "-shared", "-Xcompiler", "-fPIC")
"""A100, H100, and PTX for what comes after."""

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Number formats as csrc/common.cuh numbers them."""

Argument = Tensor | int | float | None


class KernelLibrary:
    """A loaded library of kernels."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = ctypes.CDLL(str(path))
        self._library.ttl_error_string.restype = ctypes.c_char_p

    def call(self, name: str, *arguments: Argument, device: torch.device) -> None:
        """Launch a kernel on the current stream of a device.

        Args:
            name: of the C function, without `ttl_`.
            arguments: tensors (their memory), whole numbers (64 bits), floats (32 bits), None (no memory).
            device: where the tensors are.

        Raises:
            RuntimeError: CUDA refused the launch.
        """
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        code = getattr(self._library, f"ttl_{name}")(*map(_c_value, arguments), ctypes.c_void_p(stream))
        if code:
            raise RuntimeError(f"kernel {name}: {self._library.ttl_error_string(code).decode()} (code {code})")


def _c_value(argument: Argument) -> ctypes.c_void_p | ctypes.c_int64 | ctypes.c_float:
    if argument is None or isinstance(argument, Tensor):
        return ctypes.c_void_p(None if argument is None else argument.data_ptr())
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_int64(argument)


@lru_cache
def kernels_for(device_type: str) -> KernelLibrary | None:
    """Return the library for tensors of a kind of device; None where there is none, and PyTorch's own path runs."""
    compiler = cuda_compiler()
    if device_type != "cuda" or not torch.cuda.is_available() or compiler is None:
        return None
    return KernelLibrary(compiled((str(compiler), *NVCC_FLAGS), SOURCES, cache_folder() / "kernels"))


def require_kernels(device: torch.device) -> KernelLibrary:
    """Return the library for tensors of a device.

    Raises:
        RuntimeError: there is none.
    """
    library = kernels_for(device.type)
    if library is None:
        raise RuntimeError(f"no kernels for {device.type}; use the path \"torch\"")
    return library


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors a GPU has; a few where the CPU stands in for it."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def compiled(command: Sequence[str], sources: Path, folder: Path, headers: Sequence[Path] = ()) -> Path:
    """Return the library that a compiler makes of all `.cu` files of a folder, making it if it is not kept already.

    Several processes may ask at once: one compiles, the others wait for it.

    Args:
        command: compiler and flags, without files.
        sources: folder of `.cu` and `.cuh` files.
        folder: where libraries are kept.
        headers: further files that the result depends on.
    """
    version = subprocess.run([command[0], "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(repr((list(command), version)).encode())
    for path in (*sorted(sources.glob("*.cu*")), *headers):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    target = folder / f"{digest.hexdigest()[:32]}.so"
    if target.exists():
        return target
    make_directory(folder)
    with open_own(folder / "lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            print(f"compiling kernels with {os.path.basename(command[0])} (once) ...", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                made = Path(scratch) / "kernels.so"
                files = [str(path) for path in sorted(sources.glob("*.cu"))]
                subprocess.run([*command, "-I", str(sources), *files, "-o", str(made)], check=True, capture_output=True)
                made.rename(target)
    return target
