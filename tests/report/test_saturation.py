"""Saturation says of the paper's own run what the paper found, and of made-up runs what was put into them."""

from __future__ import annotations

import math
import random

import pytest
from made_runs import evaluation_rows, train_rows, write_run

from megatron_ttl.errors import DataError
from megatron_ttl.report.paper import Published, table6
from megatron_ttl.report.runs import read_runs
from megatron_ttl.report.saturation import Point, energy_table, points_of, saturation, sentences


def points(loss, seed=0, noise=0.0, kwh_per_token=1e-9, count=20):
    draw = random.Random(seed)
    return [Point(tokens, loss(tokens) + draw.gauss(0, noise), tokens * kwh_per_token) for tokens in
            (1e9 * step for step in range(1, count + 1))]


def test_the_papers_table_6(repository):
    """The second half of the energy of TTL-460m, 57.95 kWh, bought 1.84 perplexity; and it still learnt."""
    found = table6(Published(repository / "examples/paper/published"))
    assert (found.latter.perplexity, found.latter.kwh) == pytest.approx((1.84, 57.95))
    assert found.latter.kwh_per_centinat == pytest.approx(57.95 / (100 * math.log(13.61 / 11.77)))
    assert (found.former.perplexity, found.former.kwh) == pytest.approx((20.49 - 13.61, 57.74 - 9.40))
    assert found.middle.tokens == 4915200000
    said = list(sentences(found))
    assert said[0].startswith("not saturated: over the last 50% of the tokens loss changes by -0.49")
    assert said[2] == ("the second part, 4,915,200,000 to 9,830,400,000 tokens, bought 1.84 perplexity (13.61 to 11.77) "
                       "for 57.95 kWh: 3.99 kWh per 0.01 nat.")
    rows = list(energy_table(found.points))
    assert rows[0][5:] == (None, None, None)
    assert rows[1][5:] == pytest.approx((3.59, 9.42, 9.42 / (100 * math.log(20.49 / 16.90))))
    assert rows[-1][5:7] == pytest.approx((0.19, 9.63))


def test_the_slope_is_that_of_the_line():
    found = saturation(points(lambda tokens: 5 - 0.7 * math.log10(tokens)))
    assert (found.slope.per_decade, found.slope.points) == (pytest.approx(-0.7), 11)
    assert found.slope.high - found.slope.low < 1e-9


@pytest.mark.parametrize("per_decade", [0.0, -0.5])
def test_the_interval_covers_the_truth_as_often_as_it_says(per_decade):
    """Of 400 noisy runs 95 % have the true slope in their interval: between 92 and 98 with a chance of over 99 %."""
    found = [saturation(points(lambda tokens: 3 + per_decade * math.log10(tokens), seed, 0.02)).slope for seed in range(400)]
    assert 0.92 < sum(slope.low <= per_decade <= slope.high for slope in found) / 400 < 0.98


@pytest.mark.parametrize("per_decade, verdict", [(0.0, "saturated at the noise level"), (-0.5, "not saturated"),
                                                 (0.5, "not saturated but rising: the model gets worse")])
def test_the_verdict(per_decade, verdict):
    found = saturation(points(lambda tokens: 3 + per_decade * math.log10(tokens), 1, 0.005))
    assert found.slope.verdict == verdict
    assert next(sentences(found)).startswith(f"{verdict}: ")


def test_points_that_could_still_fall_are_not_called_saturated():
    """Three points of a run that learns: the interval holds 0, and steep falls too."""
    found = saturation([Point(8.2e5, 2.052), Point(1.23e6, 1.350), Point(1.64e6, 1.171)], 0.99)
    assert found.slope.low < -1 < 0 < found.slope.high
    assert found.slope.verdict == "not to be told from so few or so noisy points"


def test_energy_that_buys_nothing_or_was_not_measured_has_no_price():
    rising = saturation(points(lambda tokens: 3 + tokens / 1e11))
    assert rising.latter.kwh_per_centinat is None
    assert list(sentences(rising))[2].endswith("kWh: loss did not fall.")
    unmeasured = saturation([Point(tokens, 3 - tokens / 1e10) for tokens in (1e9, 2e9, 3e9)])
    assert list(sentences(unmeasured))[1].endswith("; energy was not measured.")


def test_two_points_tell_no_slope_and_none_is_an_error():
    few = saturation(points(lambda _: 3.0, count=2))
    assert "hold 2 held-out losses; a slope with an interval needs 3" in next(sentences(few))
    with pytest.raises(DataError, match="no held-out loss; it needs some to look at; let the run evaluate"):
        saturation([])


def test_a_run_gives_its_energy_with_each_held_out_loss(tmp_path):
    """The meter is read in rows of training; a held-out loss has that of the last one before it."""
    rows = train_rows(100, 10) + evaluation_rows(100, 25)
    run, = read_runs([write_run(tmp_path / "a", rows)])
    assert [(point.tokens, point.kwh, point.kg) for point in points_of(run, "data/held")] == [
        (25e3, 0.2, 0.02), (50e3, 0.5, 0.05), (75e3, 0.7, 0.07), (100e3, 1.0, 0.1)]
    assert run.energy_source == "cpu estimated, gpu measured"


def test_a_loss_before_the_first_reading_has_no_energy(tmp_path):
    run, = read_runs([write_run(tmp_path / "a", evaluation_rows(10, 5) + train_rows(10, 10))])
    assert [point.kwh for point in points_of(run, "data/held")] == [None, 0.1]
