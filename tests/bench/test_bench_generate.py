"""Generation against transformers': the same tokens, and what cannot be asked for."""

from __future__ import annotations

import json

import pytest

from megatron_ttl.bench.generate import bench_generate
from megatron_ttl.errors import ConfigError


def test_both_write_the_same(model_folder, call_tool):
    """Greedily in fp32, alone and side by side; a token that ends a text ends nothing."""
    code, out, said = call_tool("bench.py", "generate", "--model", model_folder, "--batch", 1, 3, "--new-tokens", 30,
                                "--repeats", 1, "--json")
    assert code == 0, said
    rows = json.loads(out)["rows"]
    assert [row["batch"] for row in rows] == [1, 3]
    for row in rows:
        assert row["same_tokens"] == 1 and row["ratio"] == pytest.approx(row["ours_tokens_per_s"] / row["hf_tokens_per_s"])


def test_more_tokens_than_positions_are_refused(model_folder):
    with pytest.raises(ConfigError, match="--new-tokens: is 33; with a prompt of 16 the model has positions for 32"):
        bench_generate(model_folder, new_tokens=33)
    with pytest.raises(ConfigError, match="--batch: is 0"):
        bench_generate(model_folder, batches=[0])
