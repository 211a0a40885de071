"""The CUDA kernels as a library: compiled on first use, kept, and called with tensors.

The library has a C interface and knows nothing of PyTorch's, so it compiles in seconds and loads without a GPU. It is kept
under a name made of its sources, the compiler, the flags and the versions of PyTorch and CUDA, in a folder that only its
owner may write: what lies there is run.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ttl.console import print_warning
from megatron_ttl.errors import ConfigError, on_one_line
from megatron_ttl.files import make_directory, open_own
from megatron_ttl.runtime import cache_folder, cuda_compiler, discover_ranks

SOURCES = Path(__file__).parent / "csrc"
NVCC_FLAGS = ("-O3", "-std=c++17", "-gencode", "arch=compute_80,code=sm_80", "-gencode", "arch=compute_90,code=sm_90",
              "-gencode", "arch=compute_90,code=compute_90", "-t", "2", "-Xcompiler", "-fPIC")
"""A100, H100, and PTX for what comes after; the two are compiled side by side."""
OLDEST_CAPABILITY = (8, 0)
COMPILER_TIMEOUT_S = 1800

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Number formats as csrc/common.cuh numbers them."""

Argument = Tensor | int | float | None


class KernelLibrary:
    """A loaded library of kernels."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = ctypes.CDLL(str(path))
        self._library.ttl_error_string.restype = ctypes.c_char_p
        self._functions: dict[str, Callable[..., int]] = {}

    def call(self, name: str, *arguments: Argument, device: torch.device) -> None:
        """Launch a kernel on the current stream of a device.

        Args:
            name: of the C function, without `ttl_`.
            arguments: tensors (their memory), whole numbers (64 bits), floats (32 bits), None (no memory); of the
                same kinds in every call.
            device: where the tensors are.

        Raises:
            RuntimeError: CUDA refused the launch.
        """
        if device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
            with torch.cuda.device(device):
                return self.call(name, *arguments, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        function = self._functions.get(name) or self._prepare(name, arguments)
        code = function(*(value.data_ptr() if isinstance(value, Tensor) else value for value in arguments), stream)
        if code:
            raise RuntimeError(f"kernel {name}: {self._library.ttl_error_string(code).decode()} (code {code})")

    def _prepare(self, name: str, arguments: Sequence[Argument]) -> Callable[..., int]:
        """Return a C function that converts arguments of these kinds by itself, which halves the cost of a call."""
        function: Any = getattr(self._library, f"ttl_{name}")
        function.argtypes = [*map(_c_type, arguments), ctypes.c_void_p]
        self._functions[name] = function
        return function  # type: ignore[no-any-return]


def _c_type(argument: Argument) -> type[ctypes.c_void_p | ctypes.c_int64 | ctypes.c_float]:
    if argument is None or isinstance(argument, Tensor):
        return ctypes.c_void_p
    return ctypes.c_float if isinstance(argument, float) else ctypes.c_int64


def kernels_for(device_type: str) -> KernelLibrary | None:
    """Return the library for tensors of a kind of device, compiling it where it must be.

    None where there is none: PyTorch's own path runs there, and `why_not` says why.
    """
    return _attempt(device_type)[0]


def why_not(device_type: str) -> str | None:
    """Return why there is no library for a kind of device; None where there is one."""
    return _attempt(device_type)[1]


def require_kernels(device: torch.device) -> KernelLibrary:
    """Return the library for tensors of a device.

    Raises:
        RuntimeError: there is none.
    """
    library = kernels_for(device.type)
    if library is None:
        raise RuntimeError(f"no kernels for {device.type}: {why_not(device.type)}; use the path \"torch\"")
    return library


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors a GPU has; a few where the CPU stands in for it."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


@lru_cache
def _attempt(device_type: str) -> tuple[KernelLibrary | None, str | None]:
    """Return the library, or why there is none; a GPU that stays without its kernels is told of once, by one process."""
    if device_type != "cuda":
        return None, f"the kernels are for CUDA devices, not for {device_type}"
    if torch.version.cuda is None:
        return None, f"PyTorch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return None, "PyTorch finds no CUDA device"
    try:
        return _library_of_this_machine(), None
    except (ConfigError, OSError, subprocess.SubprocessError) as error:
        reason = on_one_line(str(error))
    if _speaks():
        print_warning(f"CUDA kernels: {reason}; PyTorch's own operations run instead, slower")
    return None, reason


def _library_of_this_machine() -> KernelLibrary:
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST_CAPABILITY:
        raise ConfigError(f"{torch.cuda.get_device_name()} has compute capability {capability[0]}.{capability[1]}, and they "
                          "need 8.0 (A100) or newer")
    compiler = cuda_compiler()
    if compiler is None:
        raise ConfigError("no nvcc in CUDA_HOME, on the PATH or in /usr/local/cuda; install the CUDA toolkit, or export "
                          "CUDA_HOME=<its folder>")
    return KernelLibrary(compiled((str(compiler), *NVCC_FLAGS), SOURCES, cache_folder() / "kernels"))


def compiled(command: Sequence[str], sources: Path, folder: Path, headers: Sequence[Path] = ()) -> Path:
    """Return the library that a compiler makes of all `.cu` files of a folder, making it if it is not kept already.

    Several processes may ask at once: one compiles, the others wait for it.

    Args:
        command: compiler and flags, without files.
        sources: folder of `.cu` and `.cuh` files.
        folder: where libraries are kept; made for this user alone.
        headers: further files that the result depends on.

    Raises:
        ConfigError: the compiler failed, or somebody else may write what would be loaded.
        OSError: the folder cannot be written.
        subprocess.SubprocessError: the compiler does not run.
    """
    target = folder / f"{_fingerprint(command, sources, headers)}.so"
    _take_for_oneself(folder)
    if not target.exists():
        with _alone(folder):
            if not target.exists():  # nobody else was quicker
                _compile(command, sources, target)
    _require_own(target)
    return target


def _fingerprint(command: Sequence[str], sources: Path, headers: Sequence[Path]) -> str:
    """Return a name for what a compilation depends on."""
    version = subprocess.run([command[0], "--version"], capture_output=True, check=True, timeout=COMPILER_TIMEOUT_S).stdout
    digest = hashlib.sha256(repr((list(command), version, torch.__version__, torch.version.cuda)).encode())
    for path in (*sorted(sources.glob("*.cu*")), *headers):
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:32]


def _take_for_oneself(folder: Path) -> None:
    """Make a folder that only this user may enter, or see that it is one."""
    make_directory(folder.parent)
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.geteuid():
        raise ConfigError(f"{folder} belongs to user {found.st_uid}, and a library there would be run as user "
                          f"{os.geteuid()}; export XDG_CACHE_HOME=<a folder of your own>")
    if stat.S_IMODE(found.st_mode) & 0o077:
        folder.chmod(0o700)


def _require_own(library: Path) -> None:
    """Refuse to load what somebody else may have written: put there before the folder was closed to others."""
    found = library.lstat()
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022 or found.st_nlink > 1:
        raise ConfigError(f"{library} is a link, or others may write it; it would be run; remove it")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process compiles, and clear away what killed ones have left long ago.

    Long ago, for a file system shared by several machines may keep a lock to one of them, or know none at all: then the same
    work is done twice, and each result is whole.
    """
    with open_own(folder / "lock", "ab") as lock:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        for leftover in folder.glob("build-*"):
            with suppress(FileNotFoundError):
                if time.time() - leftover.stat().st_mtime > 2 * COMPILER_TIMEOUT_S:
                    shutil.rmtree(leftover, ignore_errors=True)
        yield


def _compile(command: Sequence[str], sources: Path, target: Path) -> None:
    """Compile every file by a process of its own, side by side, link, and give the library its name."""
    files, began = sorted(sources.glob("*.cu")), time.monotonic()
    compiler = os.path.basename(command[0])
    print(f"compiling {len(files)} files of kernels with {compiler}, once ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="build-", dir=target.parent) as scratch, \
            ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        objects = [Path(scratch, f"{path.stem}.o") for path in files]
        list(pool.map(_run_compiler, [[*command, "-I", str(sources), "-c", str(path), "-o", str(made)]
                                      for path, made in zip(files, objects, strict=True)]))
        made = Path(scratch, "kernels.so")
        _run_compiler([command[0], "-shared", *map(str, objects), "-o", str(made)])
        made.chmod(0o500)
        made.rename(target)
    print(f"compiled in {time.monotonic() - began:.0f} s: {target}", file=sys.stderr, flush=True)


def _run_compiler(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=COMPILER_TIMEOUT_S, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).splitlines()
        told = next((line for line in lines if "error" in line or "fatal" in line), lines[0] if lines else "no word why")
        raise ConfigError(f"{os.path.basename(command[0])} ended with status {done.returncode}: {told.strip()}")


def _speaks() -> bool:
    """Return whether this process speaks for those of its machine."""
    with suppress(ConfigError):
        return discover_ranks().local_rank == 0
    return True
