"""Fixtures of the reliability tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from strangers import Place, make_place


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """One of everything; not to be changed."""
    return make_place(tmp_path_factory.mktemp("strangers"))


@pytest.fixture
def place(original: Place, tmp_path: Path) -> Place:
    """A copy to damage."""
    return original.copy(tmp_path / "place")
