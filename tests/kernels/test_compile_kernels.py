"""Every kernel as nvcc compiles it for A100, H100 and what comes after: no spills, 16-byte accesses, 64-bit offsets."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from megatron_ttl.kernels import build
from megatron_ttl.runtime import cuda_compiler

FILES = sorted(build.SOURCES.glob("*.cu"))
# Kernels that go element by element because they must: rows of any width or alignment, sums of a few partial sums.
WITHOUT_VECTORS = re.compile(r"any_width|Single|sum_|multiply")
ONLY_READ = re.compile("partial")  # their results are a number for each row or block
_WIDE = r"\.global[\w.:]*\.v(4\.[ubsf]32|2\.[ubsf]64)"
_COPY = r"cp\.async\.(bulk|c[ag]\.shared\.global[^;]* 16\b)"  # straight into shared memory


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Compile every file as the package does, keeping nvcc's report and its PTX; return {stem: (report, PTX, object)}."""
    compiler = cuda_compiler()
    if compiler is None or shutil.which("g++") is None:
        pytest.skip("needs nvcc")

    def compile_one(path):
        folder = tmp_path_factory.mktemp(path.stem)
        made = folder / f"{path.stem}.o"
        done = subprocess.run([compiler, *build.NVCC_FLAGS, "-Xptxas", "-v", "--keep", "--keep-dir", folder, "-I",
                               build.SOURCES, "-c", path, "-o", made], capture_output=True, text=True, timeout=900,
                              check=False)
        assert done.returncode == 0, done.stderr
        return done.stderr, next(folder.glob("*compute_90.ptx"), folder / f"{path.stem}.ptx").read_text(), made

    with ThreadPoolExecutor(4) as pool:
        return dict(zip([path.stem for path in FILES], pool.map(compile_one, FILES), strict=True))


@pytest.fixture(scope="module")
def library(compiled, tmp_path_factory):
    """Link what was compiled."""
    made = tmp_path_factory.mktemp("library") / "kernels.so"
    subprocess.run([cuda_compiler(), "-shared", *(path for _, _, path in compiled.values()), "-o", made], check=True,
                   capture_output=True, timeout=300)
    return build.KernelLibrary(made)


@pytest.mark.slow
def test_no_kernel_spills(compiled):
    """Not for either machine: an array in local memory would cost more than the kernel saves."""
    for stem, (report, _, _) in compiled.items():
        kernels = re.findall(r"Compiling entry function '(\w+)' for '(sm_\d+)'.*?(\d+) bytes spill stores, "
                             r"(\d+) bytes spill loads", report, re.DOTALL)
        assert {machine for _, machine, *_ in kernels} == ({"sm_80", "sm_90"} if stem != "library" else set()), stem
        assert [kernel for kernel in kernels if kernel[2:] != ("0", "0")] == []
        assert "warning" not in report, report


@pytest.mark.slow
def test_vector_kernels_access_16_bytes(compiled):
    """PTX shows loads of 16 bytes in every kernel that is no exception by its name, and stores in one form of each."""
    stores = {}
    for stem, (_, ptx, _) in compiled.items():
        for name, body in re.findall(r"\.entry (\w+)\((.*?)\n}", ptx, re.DOTALL):
            if WITHOUT_VECTORS.search(name):
                continue
            assert re.search(f"ld{_WIDE}|{_COPY}", body), f"{name}: no load of 16 bytes"
            kernel = f"{stem}: {re.findall(r'[0-9]([a-z_]{4,})[IE]', name)[0]}"
            stores[kernel] = stores.get(kernel, False) or re.search("st" + _WIDE, body) is not None
    assert {"rms_norm: forward_vectors", "rms_norm: backward_vectors"} <= set(stores)
    assert [kernel for kernel, found in stores.items() if not found and not ONLY_READ.search(kernel)] == []


@pytest.mark.slow
def test_loads_without_a_gpu_and_says_what_is_missing(library):
    """All functions are there; without a device a launch is refused in CUDA's own words."""
    for path in FILES:
        for name in re.findall(r'extern "C" [\w* ]+?(ttl_\w+)\(', path.read_text()):
            assert isinstance(getattr(ctypes.CDLL(str(library.path)), name), ctypes._CFuncPtr)
    if not torch.cuda.is_available():
        x = torch.ones(2, 64)
        with pytest.raises(RuntimeError, match=r"kernel rms_norm_forward: .*(driver|device).* \(code \d+\)"):
            library.call("rms_norm_forward", x, None, x[0], None, x.clone(), torch.ones(2), 2, 64, 1e-5, 0, device=x.device)


def test_every_stem_has_its_python_file():
    """One kernel, one stem: sources, function and tests are found by name."""
    for path in FILES:
        if path.stem != "library":
            assert (build.SOURCES.parent / f"{path.stem}.py").is_file()
            assert re.search(r'extern "C" int ttl_\w+\(', path.read_text()), f"{path.name} exports nothing"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_sources_keep_to_what_runs_everywhere(path):
    """Launches with their code returned, shared memory by the one function, no product of 32 bits as an offset."""
    text = re.sub(r"//[^\n]*", "", path.read_text())
    assert not re.search(r"<<<|extern\s+__shared__|cooperative_groups", text)
    # `blockIdx.x * blockDim.x` is a product of unsigned numbers of 32 bits, whatever it is added to
    assert not re.findall(r"(?:blockIdx|gridDim)\.[xyz] \* (?:blockDim|gridDim|threadIdx|[A-Z][A-Z_]+)\b", text)
    assert not re.search(r"\bint (?:rows|width|size|count|elements)\b(?=[,)])(?=[^;{]*void\* stream)", text)
