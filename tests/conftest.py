"""Fixtures that every test may use."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# Set before torch is imported anywhere: one thread per process, so that results and timings do not depend on the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DS_ACCELERATOR", "cuda" if os.path.exists("/dev/nvidia0") else "cpu")

# A suite that was started in the background inherits an ignored Ctrl-C, and would pass it on to what it interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the working tree."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with real Portuguese text, beside the repository on the project's own machines."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not (folder / "text").is_dir():
        pytest.skip("the real Portuguese text (../shared/data) is not on this machine")
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    """A tokenizer of 350 pieces."""
    from tiny_folder import write_tokenizer

    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tiny")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tokenizer_folder) -> Path:
    """A random model with 48 positions, written by transformers."""
    from tiny_folder import write_model_folder

    return write_model_folder(tmp_path_factory.mktemp("model") / "tiny", tokenizer_folder)


@pytest.fixture
def call_tool(repository, monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Call a tool in this process, where its libraries are imported already.

    (File name, arguments) -> exit code, standard output, standard error.
    """
    from megatron_ttl.console import run_tool

    def call(name: str, *arguments: object) -> tuple[int, str, str]:
        spec = importlib.util.spec_from_file_location(Path(name).stem + "_tool", repository / "tools" / name)
        tool = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(tool)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            run_tool(tool.main)
        return left.value.code, *capsys.readouterr()

    return call
