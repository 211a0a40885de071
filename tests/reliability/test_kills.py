"""A checkpoint survives a kill at every call that changes the disk: on one process, on two, and in the real session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fault_shim as shim
import pytest
import store_trials
from fault_server import Server, serve
