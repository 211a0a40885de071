"""Scaling laws give the figures that were worked out by hand for the models of both papers."""

from __future__ import annotations

import math

import pytest

from megatron_ttl.errors import ConfigError
from megatron_ttl.plan.scaling_laws import SCALING_LAWS, choose_laws

TTL_160M, TTL_460M, TINYLLAMA = 162_417_408, 468_239_360, 1_100_048_384


@pytest.mark.parametrize("name, losses", [
    ("ttl-paper", (3.5264, 3.0411, 3.0372)), ("hoffmann-text", (3.2234, 2.8152, 2.8112)),
    ("hoffmann-tex", (3.1477, 2.7553, 2.7517)), ("besiroglu", (3.1657, 2.7558, 2.7521))])
def test_the_predicted_losses(name, losses):
    found = [SCALING_LAWS[name].loss(*point) for point in ((160e6, 3.5e9), (460e6, 9.3e9), (460e6, 9.5e9))]
    assert found == pytest.approx(losses, abs=5.1e-5)


@pytest.mark.parametrize("name, tokens, per_parameter_at_70b", [
    ("ttl-paper", (1.559e9, 5.228e9, 1.388e10), 22.8), ("hoffmann-text", (4.84e9, 17.5e9, 49.4e9), 109),
    ("hoffmann-tex", (3.36e9, 11.8e9, 32.7e9), 65.6), ("besiroglu", (4.03e9, 11.0e9, 24.9e9), 18.4)])
def test_the_optimal_tokens(name, tokens, per_parameter_at_70b):
    law = SCALING_LAWS[name]
    assert [law.optimal_tokens(size) for size in (TTL_160M, TTL_460M, TINYLLAMA)] == pytest.approx(tokens, rel=5e-3)
    assert law.optimal_tokens(70e9) / 70e9 == pytest.approx(per_parameter_at_70b, rel=5e-3)


@pytest.mark.parametrize("law", SCALING_LAWS.values(), ids=lambda law: law.name)
def test_no_other_split_of_the_operations_is_better(law):
    size, tokens = 468e6, law.optimal_tokens(468e6)
    for factor in (0.9, 0.99, 1.01, 1.1):
        assert law.loss(size * factor, tokens / factor) > law.loss(size, tokens)


def test_perplexity_is_to_the_base_e():
    assert math.exp(SCALING_LAWS["ttl-paper"].loss(460e6, 9.3e9)) == pytest.approx(20.929, abs=1e-3)


def test_an_unknown_set_of_constants_is_named_with_its_likely_meaning():
    with pytest.raises(ConfigError, match=r"'hofman-tex' is not known; it must be one of ttl-paper, .*did you mean 'hoff"):
        choose_laws(["besiroglu", "hofman-tex"])
    assert [law.name for law in choose_laws(["besiroglu", "ttl-paper", "besiroglu"])] == ["besiroglu", "ttl-paper"]
