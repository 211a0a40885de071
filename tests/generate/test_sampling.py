"""Temperature, top-k and nucleus against definitions written out; draws against their probabilities."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ttl.errors import CheckpointError, UserError
from megatron_ttl.generate.sampling import Sampling, TokenChooser, choose_sampling, probabilities


def brute_force(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """The definitions, on Python numbers: rank, cut at k, cut where the mass reaches p, renormalise."""
    ranks = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    kept = ranks[:top_k] if top_k else ranks
    best = max(logits)
    weights = {i: math.exp((logits[i] - best) / temperature) for i in kept}
    total = sum(weights.values())
    nucleus, mass = [], 0.0
    for i in kept:
        if mass >= top_p:
            break
        nucleus.append(i)
        mass += weights[i] / total
    kept_mass = sum(weights[i] for i in nucleus)
    return [weights[i] / kept_mass if i in nucleus else 0.0 for i in range(len(logits))]


# Eighths: logits with many ties, and differences that are exact in fp32.
LOGITS = st.lists(st.integers(-40, 40).map(lambda n: n / 8), min_size=1, max_size=12)


@settings(max_examples=300, deadline=None)
@given(LOGITS, st.sampled_from([0.3, 0.7, 1.0, 2.0]), st.integers(0, 14), st.floats(0.013, 1.0))
def test_probabilities_equal_the_definition(logits, temperature, top_k, top_p):
    found = probabilities(torch.tensor([logits]), Sampling(temperature, top_k, top_p))[0].tolist()
    wanted = brute_force(logits, temperature, top_k, top_p)
    again = brute_force(logits, temperature, top_k, top_p * (1 + 1e-6))
    if top_p < 1 and wanted == again:  # else p meets a sum to the last bit, and rounding decides
        assert found == pytest.approx(wanted, abs=1e-6)
    assert sum(found) == pytest.approx(1, abs=1e-6)


def test_rows_do_not_touch_each_other():
    rows = torch.randn(5, 300, generator=torch.Generator().manual_seed(0)) * 3
    how = Sampling(0.8, 20, 0.9)
    together = probabilities(rows, how)
    assert torch.equal(together, torch.cat([probabilities(row[None], how) for row in rows]))
    assert ((together > 0).sum(-1) <= 20).all()


def test_ties_at_the_border_go_to_the_lowest_ids():
    assert probabilities(torch.zeros(1, 6), Sampling(1.0, 4, 1.0)).tolist() == [[0.25] * 4 + [0.0] * 2]
    assert probabilities(torch.zeros(1, 8), Sampling(1.0, 0, 0.5)).tolist() == [[0.25] * 4 + [0.0] * 4]


def test_the_token_that_crosses_p_stays():
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    assert probabilities(logits, Sampling(1.0, 0, 0.51))[0].tolist() == pytest.approx([0.625, 0.375, 0])
    assert probabilities(logits, Sampling(1.0, 0, 1e-9))[0].tolist() == [1, 0, 0]


def test_extreme_temperatures_stay_numbers():
    logits = torch.tensor([[1e4, 1e4 - 1, -1e4]])
    assert probabilities(logits, Sampling(1e-37, 0, 1.0))[0].tolist() == [1, 0, 0]
    assert probabilities(logits, Sampling(1e30, 0, 1.0))[0].tolist() == pytest.approx([1 / 3] * 3)
    assert probabilities(logits.bfloat16(), Sampling(1.0, 2, 0.9)).dtype == torch.float32


def test_greedy_takes_the_lowest_id_among_equals():
    logits = torch.tensor([[0.0, 7.0, 7.0], [3.0, 1.0, 3.0], [0.0, 0.0, 0.0]])
    assert TokenChooser(Sampling(temperature=0), 3)(logits).tolist() == [1, 0, 0]
    assert choose_sampling(greedy=True) == choose_sampling(temperature=0.0) == Sampling(temperature=0)


def test_frequencies_follow_the_probabilities():
    shares = [0.4, 0.25, 0.2, 0.1, 0.05, 0.0]
    logits = torch.tensor(shares).log().clamp(min=-1e9).expand(20_000, -1)
    drawn = TokenChooser(Sampling(1.0, 0, 1.0, seed=3), 20_000)(logits)
    counts = torch.bincount(drawn, minlength=6).double()
    wanted = torch.tensor(shares[:5], dtype=torch.float64) * 20_000
    assert counts[5] == 0
    # 4 degrees of freedom: chi-square exceeds 18.5 once in a thousand seeds, and this seed is fixed
    assert ((counts[:5] - wanted) ** 2 / wanted).sum() < 18.5


def test_one_generator_draws_evenly_over_steps():
    choose = TokenChooser(Sampling(1.0, 0, 1.0, seed=11))
    counts = torch.bincount(torch.cat([choose(torch.zeros(1, 4)) for _ in range(4000)]), minlength=4)
    assert ((counts - 1000) ** 2 / 1000).sum() < 16.3  # 3 degrees of freedom, one in a thousand


def test_same_seed_same_draws_and_samples_are_independent_of_their_number():
    logits = torch.randn(40, 1, 50, generator=torch.Generator().manual_seed(0))

    def draw(seed: int, samples: int) -> torch.Tensor:
        choose = TokenChooser(Sampling(1.0, 0, 1.0, seed), samples)
        return torch.stack([choose(row.expand(samples, -1)) for row in logits])  # [steps, samples]

    assert torch.equal(draw(5, 4), draw(5, 4))
    assert torch.equal(draw(5, 4)[:, :2], draw(5, 2))
    assert not torch.equal(draw(5, 1), draw(6, 1))
    four = draw(5, 4)
    assert all(not torch.equal(four[:, i], four[:, j]) for i in range(4) for j in range(i))


def test_a_token_without_a_share_is_never_drawn(monkeypatch):
    for uniform in (0.0, 0.5, 1 - 2**-53):
        monkeypatch.setattr(torch, "rand", lambda *_, u=uniform, **__: torch.tensor([u], dtype=torch.float64))
        for size in range(1, 200):  # shares of 1/size add up to a little less or more than 1
            logits = torch.full((1, 2 * size + 1), -1e9)
            logits[:, 1::2] = 0.0
            place = int(TokenChooser(Sampling(1.0, 0, 1.0))(logits))
            assert place % 2 == 1
            assert place == {0.0: 1, 1 - 2**-53: 2 * size - 1}.get(uniform, place)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_refused(value, temperature):
    with pytest.raises(CheckpointError, match="logits hold NaN or infinity; they must be numbers"):
        TokenChooser(Sampling(temperature))(torch.tensor([[0.0, value, 1.0]]))


@pytest.mark.parametrize(("given", "message"), [
    (dict(temperature=-0.5), "temperature: -0.5; it must be 0"),
    (dict(temperature=math.nan), "temperature: nan"),
    (dict(temperature=math.inf), "temperature: inf"),
    (dict(top_k=-1), "top_k: -1; it must be 0"),
    (dict(top_p=2.0), "top_p: 2; it must lie above 0 and at most at 1"),
    (dict(top_p=0.0), "top_p: 0;"),
    (dict(top_p=math.nan), "top_p: nan;"),
    (dict(seed=-1), "seed: -1; it must lie between"),
    (dict(seed=2**63), "seed: 9223372036854775808;"),
    (dict(num_samples=0), "num_samples: 0; it must be at least 1"),
    (dict(max_new_tokens=-3), "max_new_tokens: -3; it must be at least 1"),
    (dict(greedy=True, temperature=0.7), "greedy: given together with temperature 0.7; .*; leave out one"),
    (dict(greedy=True, top_k=5), "greedy: given together with top_k 5"),
    (dict(greedy=True, top_p=0.5), "greedy: given together with top_p 0.5"),
    (dict(greedy=True, num_samples=2), "num_samples: 2 with greedy; all samples would be equal"),
    (dict(temperature=0.0, num_samples=3), "num_samples: 3 with temperature 0;"),
])
def test_senseless_values_are_refused(given, message):
    with pytest.raises(UserError, match=message) as caught:
        choose_sampling(**given)
    assert len(caught.value.faults) == 1


def test_all_faults_come_at_once():
    with pytest.raises(UserError) as caught:
        choose_sampling(temperature=-1.0, top_k=-1, top_p=2.0, seed=-1, num_samples=0, max_new_tokens=0)
    assert [fault.split(":")[0] for fault in caught.value.faults] == [
        "temperature", "top_k", "top_p", "seed", "num_samples", "max_new_tokens"]


def test_what_is_left_open_takes_the_default():
    assert choose_sampling() == Sampling() == Sampling(1.0, 50, 0.95, 0)
    assert choose_sampling(top_k=0, seed=7) == Sampling(1.0, 0, 0.95, 7)
