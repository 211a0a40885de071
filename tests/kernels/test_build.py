"""The library of kernels: compiled once, kept where nobody else writes, and absent with a reason."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from cuda_emulation import emulated_library

from megatron_ttl.errors import ConfigError
from megatron_ttl.kernels import build, paths
from megatron_ttl.kernels.paths import resolve_paths

needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
COMMAND = ("g++", "-O0", "-fPIC", "-x", "c++")
ANSWER = 'extern "C" int ttl_answer(void*) { return 42; }\n'
WORDS = 'extern "C" const char* ttl_error_string(int) { return "forty-two"; }\n'


@pytest.fixture
def sources(tmp_path):
    """Return a folder of two small source files."""
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "answer.cu").write_text(ANSWER)
    (folder / "words.cu").write_text(WORDS)
    return folder


@pytest.fixture
def gpu_machine(monkeypatch, tmp_path, sources):
    """Let this machine look like one with a GPU, whose compiler is g++ and whose cache folder is a new one."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "H100")
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setattr(build, "NVCC_FLAGS", COMMAND[1:])
    monkeypatch.setattr(build, "cuda_compiler", lambda: Path("g++"))
    monkeypatch.setattr(build, "cache_folder", lambda: tmp_path / "cache")
    build._attempt.cache_clear()
    yield monkeypatch
    build._attempt.cache_clear()


def names(folder):
    """Return what lies in a folder."""
    return sorted(path.name for path in folder.iterdir())


@needs_gxx
def test_compiles_once_for_each_version(sources, tmp_path, capfd, monkeypatch):
    """Kept by sources, headers, flags and the versions of PyTorch and CUDA; each gets a library of its own."""
    folder = tmp_path / "kernels"
    first = build.compiled(COMMAND, sources, folder)
    assert build.KernelLibrary(first)._library.ttl_answer(None) == 42
    assert capfd.readouterr().err.splitlines()[0] == "compiling 2 files of kernels with g++, once ..."
    assert build.compiled(COMMAND, sources, folder) == first
    assert capfd.readouterr().err == ""
    found = {first, build.compiled((*COMMAND, "-DX"), sources, folder)}
    (sources / "header.cuh").write_text("// changed\n")
    found.add(build.compiled(COMMAND, sources, folder))
    monkeypatch.setattr(torch, "__version__", "9.9")
    found.add(build.compiled(COMMAND, sources, folder))
    assert len(found) == 4 and len(names(folder)) == 5
    assert folder.stat().st_mode & 0o777 == 0o700 and first.stat().st_mode & 0o777 == 0o500


@needs_gxx
def test_four_processes_at_once_compile_once(sources, tmp_path):
    """Ranks that start together: one compiles, the others wait, all get the whole library."""
    fork, folder, log = multiprocessing.get_context("fork"), tmp_path / "kernels", tmp_path / "log"
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *-shared*) echo linked >> {log}; sleep 0.3 ;; esac\nexec g++ "$@"\n')
    compiler.chmod(0o700)
    barrier, results = fork.Barrier(4), fork.SimpleQueue()

    def rank():
        barrier.wait(20)
        results.put(str(build.compiled((str(compiler), *COMMAND[1:]), sources, folder)))

    processes = [fork.Process(target=rank) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    found = {results.get() for _ in processes}
    assert len(found) == 1 and log.read_text().split() == ["linked"] and len(names(folder)) == 2


@needs_gxx
def test_what_others_may_write_is_not_loaded(sources, tmp_path, monkeypatch):
    """A library is run with all rights of its user: folder and file must be the user's own."""
    folder = tmp_path / "kernels"
    folder.mkdir(mode=0o777)
    library = build.compiled(COMMAND, sources, folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    library.chmod(0o770)
    with pytest.raises(ConfigError, match="is a link, or others may write it; it would be run; remove it"):
        build.compiled(COMMAND, sources, folder)
    library.chmod(0o500)
    real = library.rename(tmp_path / "elsewhere.so")
    library.symlink_to(real)
    with pytest.raises(ConfigError, match="is a link"):
        build.compiled(COMMAND, sources, folder)
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(ConfigError, match=r"belongs to user \d+, .* export XDG_CACHE_HOME"):
        build.compiled(COMMAND, sources, folder)


@needs_gxx
def test_failed_and_interrupted_compilations_leave_nothing(sources, tmp_path, monkeypatch):
    """The compiler's own word is told; what a killed process left is cleared away by the next."""
    folder = tmp_path / "kernels"
    (sources / "answer.cu").write_text("int f( { }\n")
    with pytest.raises(ConfigError, match=r"g\+\+ ended with status 1: .*answer.cu:1:.* error: "):
        build.compiled(COMMAND, sources, folder)
    assert names(folder) == ["lock"]
    (sources / "answer.cu").write_text(ANSWER)

    def interrupted(command):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build, "_run_compiler", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build.compiled(COMMAND, sources, folder)
    assert names(folder) == ["lock"]
    (folder / "build-killed").mkdir()
    (folder / "build-killed" / "half.o").write_bytes(b"half")
    (folder / "build-running").mkdir()  # by another machine, whose lock is not seen here
    long_ago = time.time() - 3 * build.COMPILER_TIMEOUT_S
    os.utime(folder / "build-killed", (long_ago, long_ago))
    library = build.compiled(COMMAND, sources, folder)
    assert names(folder) == sorted(["build-running", "lock", library.name])


@needs_gxx
def test_file_systems_without_locks(sources, tmp_path, monkeypatch):
    """There the same work may be done twice; it is done."""
    def no_locks(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert build.compiled(COMMAND, sources, tmp_path / "kernels").is_file()


@needs_gxx
def test_a_gpu_machine_gets_the_library(gpu_machine, capfd):
    """Compiled on first use, from the sources, into the cache folder; "auto" takes it."""
    assert build.why_not("cuda") is None
    assert build.kernels_for("cuda") is build.kernels_for("cuda") is not None
    with pytest.raises(RuntimeError, match=r"kernel answer: forty-two \(code 42\)"):
        build.kernels_for("cuda").call("answer", device=torch.device("cpu"))
    gpu_machine.setattr(paths, "checked", lambda *_: dict.fromkeys(("rms_norm", "rotary", "cross_entropy", "adamw"), 1.0))
    report = resolve_paths({"swiglu": "torch"}, torch.device("cuda"))
    assert report.paths.rms_norm == report.paths.adamw == "cuda" and report.paths.swiglu == "torch"
    assert report.paths.attention == "auto"
    assert capfd.readouterr().err.count("compiling") == 1


@pytest.mark.parametrize(("broken", "reason"), [
    ("compiler", "g.. ended with status 1: .* error: "),
    ("folder", "Not a directory|File exists"),
    ("missing", "no nvcc in CUDA_HOME, on the PATH or in /usr/local/cuda"),
    ("gone", "No such file"),
    ("old", "H100 has compute capability 7.5, and they need 8.0"),
])
@needs_gxx
def test_without_a_library_one_warning_and_pytorch(gpu_machine, tmp_path, sources, capfd, broken, reason):
    """Whatever is wrong: "auto" goes on with PyTorch after one line; asked for by name it is an error with the reason."""
    if broken == "compiler":
        (sources / "answer.cu").write_text("int f( { }\n")
    elif broken == "folder":
        (tmp_path / "cache").write_text("a file")
    elif broken == "old":
        gpu_machine.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    else:
        gpu_machine.setattr(build, "cuda_compiler", lambda: None if broken == "missing" else Path("/nowhere/nvcc"))
    report = resolve_paths({}, torch.device("cuda"))
    resolve_paths({}, torch.device("cuda"))
    assert report.paths.rms_norm == "torch" and build.kernels_for("cuda") is None
    warnings = [line for line in capfd.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 1 and warnings[0].startswith("warning: CUDA kernels: ")
    with pytest.raises(ConfigError, match=rf'kernels.rms_norm: is "cuda", which is not there: .*({reason}).*; must be'):
        resolve_paths({"rms_norm": "cuda"}, torch.device("cuda"))


def test_only_one_process_of_a_machine_speaks(gpu_machine, monkeypatch, capfd):
    """Eight ranks without nvcc say it once."""
    gpu_machine.setattr(build, "cuda_compiler", lambda: None)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert build.kernels_for("cuda") is None and capfd.readouterr().err == ""


def test_without_a_gpu_nothing_is_compiled(monkeypatch, capfd):
    """No device, no work, no word; the reason is there for who asks."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    build._attempt.cache_clear()
    assert build.kernels_for("cuda") is None and build.kernels_for("cpu") is None
    assert build.why_not("cuda") in ("PyTorch finds no CUDA device", f"PyTorch {torch.__version__} is built without CUDA")
    assert capfd.readouterr().err == ""
    build._attempt.cache_clear()


def test_a_refused_launch_is_an_error():
    """CUDA's own words, and the name of the kernel."""
    x = torch.ones(2, 8)
    with pytest.raises(RuntimeError, match=r"kernel rms_norm_forward: invalid argument \(code 1\)"):
        emulated_library().call("rms_norm_forward", x, None, x[0], None, x.clone(), torch.ones(2), 2, 8, 1e-5, 7,
                                device=x.device)
