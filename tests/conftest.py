"""Fixtures that every test may use."""

from __future__ import annotations

import os
import signal
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
