"""The comparison with lm-eval's backend: the same answers from both, and fewer tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ttl.errors import ConfigError
from megatron_ttl.evaluate.bench_scoring import bench_scoring


def test_figures_of_every_set(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of 48 positions takes questions of a few words."""
    from megatron_ttl.evaluate import bench_scoring as module

    monkeypatch.setattr(module, "_QUESTION", 3)
    monkeypatch.setattr(module, "_CHOICE", 2)
    figures = bench_scoring(model_folder, questions=3, batch=2, repeats=1)
    assert figures["0-shot: ratio of tokens"] > 1 and figures["0-shot: ratio of times"] > 0
    assert figures["0-shot: largest difference"] < 1e-4
    assert "48 positions" in figures["25-shot: left out"]


def test_numbers_are_checked(model_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"--batch: is 0.*"):
        bench_scoring(model_folder, questions=-1, batch=0)
