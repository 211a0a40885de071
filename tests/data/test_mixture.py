"""Shares of the sources in exact integers, in one stage and in several."""

from __future__ import annotations

import time
from fractions import Fraction

import numpy as np
import pytest
from patience import processor

from megatron_ttl.data.causal_lm_dataset import CausalLMDataset
from megatron_ttl.data.indexed_dataset import IndexedDatasetWriter
from megatron_ttl.data.mixture import Mixture, StagedMixture

WEIGHTS = [[1.0], [0.6, 0.4], [7, 3], [0.693584, 0.306416], [0.2, 0.5, 0.3], [5, 0, 3, 1], [1, 2, 3, 4, 5, 6, 7],
           [0.9, 0.05, 0.03, 0.01, 0.01]]
STAGES = [(100, [3, 2, 0]), (137, [0, 0, 1.0]), (500, [0.1, 0.2, 0.7]), (None, [1, 0, 3])]
THOUSANDTH = Fraction(1, 1000)


def sequential(mixture, count):
    """Walk sample by sample, and see that each source gives 0, 1, 2 ..."""
    seen, sources = [0] * len(mixture.counts(0)), []
    for number in range(count):
        source, index = mixture.locate(number)
        assert index == seen[source], number
        seen[source] += 1
        sources.append(source)
    assert mixture.counts(count) == seen
    return sources


@pytest.mark.parametrize("weights", WEIGHTS)
def test_shares_hold_at_every_prefix(weights):
    """In fractions without rounding: no source is farther off than `bounds` says, nor than half a sample per level."""
    mixture, seen = Mixture(weights), [0] * len(weights)
    shares, bounds = mixture.shares, mixture.bounds()
    levels = (sum(weight > 0 for weight in weights) - 1).bit_length()
    assert all(bound <= Fraction(levels, 2) for bound in bounds) and (levels > 2 or max(bounds) < 1)
    enough, worst = mixture.samples_until_within(THOUSANDTH), Fraction(0)
    for k, source in enumerate(sequential(mixture, 4_000), 1):
        seen[source] += 1
        off = [abs(count - k * share) for count, share in zip(seen, shares, strict=True)]
        assert all(a <= b for a, b in zip(off, bounds, strict=True)), k
        assert k < enough or max(off) <= k * THOUSANDTH, k
        worst = max(worst, *off)
        if levels == 1:  # two sources: the whole number next to the share, so no other order is nearer
            assert off[0] <= Fraction(1, 2)
    assert worst >= max(bounds) * Fraction(3, 5), "the bound says something"


@pytest.mark.parametrize(("weights", "sequence_length", "tokens"), [
    ([0.6, 0.4], 1024, 409_600), ([0.6, 0.4], 2048, 819_200), ([0.6, 0.4], 4096, 1_638_400),
    ([7, 3], 1024, 512_000), ([7, 3], 2048, 1_024_000), ([7, 3], 4096, 2_048_000)])
def test_sixty_forty_and_seven_to_three_in_tokens(weights, sequence_length, tokens):
    """From how many tokens on each prefix is within 0.1 % of the whole; before, whole samples cannot be."""
    mixture = Mixture(weights)
    first = mixture.samples_until_within(THOUSANDTH)
    assert first * sequence_length == tokens
    part, whole = mixture.shares[0].numerator, mixture.shares[0].denominator
    sources, _ = mixture.locate_many(np.arange(10**6))
    prefix = np.arange(1, 10**6 + 1)
    off = np.abs(np.cumsum(sources == 0) * whole - prefix * part)  # samples off, times `whole`
    assert off.max() == whole // 2
    assert (off * 1000 <= prefix * whole)[first - 1:].all()
    nearest = np.minimum(prefix * part % whole, -(prefix * part) % whole)
    assert np.array_equal(off, nearest), "every other whole number is as far off or farther"
    assert Mixture(weights).counts(10**12) == [int(share * 10**12) for share in mixture.shares]


def test_the_order_is_pinned():
    """Runs that were begun with these orders must go on with them."""
    assert sequential(Mixture([0.2, 0.5, 0.3]), 20) == [1, 2, 0, 1, 1, 2, 1, 0, 2, 1, 1, 2, 0, 1, 1, 2, 1, 0, 2, 1]
    assert sequential(Mixture([0.693584, 0.306416]), 20) == [0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0]
    assert Mixture([0.693584, 0.306416]).locate(10**12 + 3) == (0, 693_584_000_002)
    assert sequential(StagedMixture([(4, [1, 1]), (6, [0, 1]), (None, [2, 1])]), 12) == [0, 1, 0, 1, 1, 1, 0, 1, 0, 0, 1, 0]


@pytest.mark.parametrize("weights", [*WEIGHTS, [0.1234567890123456, 0.8765432109876544], [1e-300, 1, 3e9 + 0.1]])
def test_many_at_once_are_each_by_itself(weights):
    """Near 0, near 2^61, unsorted, of shares whose products do not fit 64 bits; one stage is no stage."""
    draw = np.random.default_rng(0)
    numbers = np.concatenate([np.arange(300), draw.integers(0, 2**61, 300), [2**61]])
    for mixture in (Mixture(weights), StagedMixture([(None, weights)])):
        sources, indices = mixture.locate_many(numbers)
        assert list(zip(sources.tolist(), indices.tolist(), strict=True)) == [
            Mixture(weights).locate(number) for number in numbers.tolist()]
        assert sources.dtype == indices.dtype == np.int64
    assert all(len(part) == 0 for part in Mixture(weights).locate_many(np.array([], np.int64)))


def test_a_million_samples_take_less_than_a_second():
    """Of process time: ten sources, four stages of a long run."""
    weights = [[1 + (source + stage) % 4 for source in range(10)] for stage in range(4)]
    mixture = StagedMixture([(10**5, weights[0]), (2 * 10**5, weights[1]), (10**6, weights[2]), (None, weights[3])])
    began = time.process_time()
    mixture.locate_many(np.arange(10**6))
    assert time.process_time() - began < processor(1)


def test_stages_go_on_where_the_former_one_stood():
    """Every stage has its own shares, a source of weight 0 rests, and each goes on without gap or repeat."""
    staged = StagedMixture(STAGES)
    sources = sequential(staged, 2_000)
    assert staged.counts_by_stage(2_000) == [[60, 40, 0], [0, 0, 37], [36, 73, 254], [375, 0, 1125]]
    assert staged.counts_by_stage(120) == [[60, 40, 0], [0, 0, 20], [0, 0, 0], [0, 0, 0]]
    found, indices = staged.locate_many(np.arange(2_000)[::-1])
    assert found[::-1].tolist() == sources
    assert [staged.locate(number)[1] for number in (99, 100, 137, 1_999)] == indices[::-1][[99, 100, 137, 1_999]].tolist()
    far = staged.locate(10**15)
    assert far == (2, staged.counts(10**15)[2])


def test_what_comes_later_changes_nothing_before():
    """A last stage that is longer, ends, or has others after it; other weights from sample 500 on."""
    numbers = np.arange(2_000)
    whole = np.stack(StagedMixture(STAGES).locate_many(numbers))
    for later in ([*STAGES[:3], (2_000, [1, 0, 3]), (None, [0, 1, 0])], [*STAGES[:3], (9_999, [1, 0, 3])]):
        assert np.array_equal(np.stack(StagedMixture(later).locate_many(numbers)), whole)
    other = np.stack(StagedMixture([*STAGES[:3], (None, [1, 1, 1])]).locate_many(numbers))
    assert np.array_equal(other[:, :500], whole[:, :500]) and not np.array_equal(other, whole)


def test_epochs_go_on_across_stages(tmp_path):
    """Of real data: each window of a source once per epoch, whichever stages draw it; the record tells them apart."""
    draw = np.random.default_rng(0)
    for name, count in (("a", 250), ("b", 90)):
        with IndexedDatasetWriter(tmp_path / name, "uint16", 500, 2) as writer:
            writer.add_documents(np.where(np.arange(count) % 10 == 9, 2, draw.integers(4, 500, count)), [10] * (count // 10))
            writer.finish()
    sources = [(str(tmp_path / "a"), 1.0), (str(tmp_path / "b"), 1.0)]
    dataset = CausalLMDataset(sources, 8, seed=3, stages=[(40 * 8, [0.6, 0.4]), (75 * 8, [0, 1]), (None, [3, 1])])
    seen = [[], []]
    for number, (source, epoch, window) in enumerate(map(dataset.locate, range(200))):
        drawn = dataset.samples_drawn(number)
        assert epoch == drawn[source] // dataset.samples_per_epoch[source]  # exact integer division
        seen[source].append(window)
    assert [len(windows) for windows in seen] == dataset.samples_drawn(200) == [24 + 94, 16 + 35 + 31]
    for windows, size in zip(seen, dataset.samples_per_epoch, strict=True):
        for epoch in range(len(windows) // size):
            assert sorted(windows[epoch * size : (epoch + 1) * size]) == list(range(size))
    plain = CausalLMDataset(sources, 8, seed=3)
    assert dataset.record() != plain.record() and "stages" not in plain.record()
    assert dataset.record()["stages"][1] == {"until_tokens": 600, "weights": [0, 1]}
