"""Say whether a model still learns, and what a little more of it costs: slope per decade of tokens, kWh per 0.01 nat."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_ttl.errors import ConfigError, DataError
from megatron_ttl.report.runs import Run, is_number

LATTER_PART = 0.5
CONFIDENCE = 0.95
FLAT = 0.1
"""Nats per decade: where ten times the tokens can lower the loss by no more than this, a run is called saturated."""
_FEWEST = 3  # points: with two there is a line, and nothing that tells how far off it is
ENERGY_HEADER = ("tokens", "loss", "perplexity", "kWh", "kg CO2e", "perplexity gained", "kWh spent", "kWh per 0.01 nat")


@dataclass(frozen=True)
class Point:
    """Held-out loss at one point of a run, and the energy spent until then."""

    tokens: float
    loss: float
    """Nats per token."""
    kwh: float | None = None
    kg: float | None = None
    """CO2 equivalent."""

    @property
    def perplexity(self) -> float:
        """To the base e, like the loss."""
        return math.exp(min(self.loss, 700.0))


@dataclass(frozen=True)
class Stretch:
    """What was gained between two points, and what for."""

    begin: Point
    end: Point

    @property
    def perplexity(self) -> float:
        """By how much perplexity fell."""
        return self.begin.perplexity - self.end.perplexity

    @property
    def kwh(self) -> float | None:
        """Energy spent; None where nobody measured."""
        return None if self.begin.kwh is None or self.end.kwh is None else self.end.kwh - self.begin.kwh

    @property
    def kwh_per_centinat(self) -> float | None:
        """Energy per 0.01 nat of loss; None where loss did not fall or nobody measured."""
        fall = self.begin.loss - self.end.loss
        return None if self.kwh is None or fall <= 0 else self.kwh / (100 * fall)


@dataclass(frozen=True)
class Slope:
    """Least squares of loss on log10 of tokens."""

    per_decade: float
    """Nats for ten times the tokens."""
    low: float
    high: float
    """Ends of the interval."""
    points: int

    @property
    def verdict(self) -> str:
        """What the interval allows to say."""
        if self.high < 0:
            return "not saturated"
        if self.low > 0:
            return "not saturated but rising: the model gets worse"
        return "saturated at the noise level" if self.low >= -FLAT else "not to be told from so few or so noisy points"


@dataclass(frozen=True)
class Saturation:
    """The latter part of a run."""

    points: Sequence[Point]
    share: float
    slope: Slope | None
    """None with fewer than three points."""

    @property
    def middle(self) -> Point:
        """The point nearest to where the latter part begins."""
        return self.points[_middle(self.points, self.share)]

    @property
    def former(self) -> Stretch:
        """From the first point to the middle."""
        return Stretch(self.points[0], self.middle)

    @property
    def latter(self) -> Stretch:
        """From the middle to the last point."""
        return Stretch(self.middle, self.points[-1])


def saturation(points: Sequence[Point], share: float = LATTER_PART, confidence: float = CONFIDENCE) -> Saturation:
    """Fit a line to the latter part of a run's held-out losses over log10 of tokens.

    The interval is Student's t of a straight line with independent errors. Losses of one run bend and hang together, so it
    is rather too narrow; and while a learning rate decays, a part of the slope is the schedule's.

    Args:
        points: in the order of their tokens, all above zero.
        share: which last part of the tokens is fitted; from the point nearest to its beginning.
        confidence: of the interval.

    Raises:
        DataError: there are no points.
        ConfigError: scipy is missing.
    """
    if not points:
        raise DataError("saturation: no held-out loss; it needs some to look at; let the run evaluate "
                        "(evaluation.every_steps)")
    return Saturation(points, share, _slope(points[_middle(points, share):], confidence))


def _middle(points: Sequence[Point], share: float) -> int:
    wanted = points[-1].tokens * (1 - share)
    return min(range(len(points)), key=lambda place: abs(points[place].tokens - wanted))


def _slope(points: Sequence[Point], confidence: float) -> Slope | None:
    if len(points) < _FEWEST:
        return None
    try:
        from scipy import stats
    except ModuleNotFoundError:
        raise ConfigError("scipy: is not installed; it is needed for intervals of slopes; "
                          "pip install 'megatron_ttl[report]'") from None
    fit = stats.linregress([math.log10(point.tokens) for point in points], [point.loss for point in points])
    wide = float(stats.t.ppf(0.5 + confidence / 2, len(points) - 2) * fit.stderr)
    return Slope(float(fit.slope), float(fit.slope) - wide, float(fit.slope) + wide, len(points))


def points_of(run: Run, prefix: str) -> list[Point]:
    """Return a run's held-out losses with the energy of the last row of training before each."""
    measured = [row for row in run.train if is_number(row.get("energy_kwh"))]
    places = [row["tokens"] for row in measured]
    points = []
    for tokens, loss in zip(*run.evaluation("loss", prefix), strict=True):
        before = bisect_right(places, tokens)
        row = measured[before - 1] if before else {}
        kg = row.get("emissions_kg_co2e")
        if tokens > 0:
            points.append(Point(tokens, loss, row.get("energy_kwh"), kg if is_number(kg) else None))
    return points


def energy_table(points: Sequence[Point]) -> Iterator[tuple[float | None, ...]]:
    """Yield a row per point in the columns of `ENERGY_HEADER`; gains are those since the point before."""
    for before, point in zip([None, *points], points, strict=False):
        gained = (None, None, None)
        if before is not None:
            stretch = Stretch(before, point)
            gained = (stretch.perplexity, stretch.kwh, stretch.kwh_per_centinat)
        yield point.tokens, point.loss, point.perplexity, point.kwh, point.kg, *gained


def sentences(found: Saturation, confidence: float = CONFIDENCE) -> Iterator[str]:
    """Say what came out, the verdict first."""
    slope = found.slope
    part = f"the last {found.share:.0%} of the tokens"
    if slope is None:
        held = len(found.points) - _middle(found.points, found.share)
        yield f"not told: {part} hold {held} held-out losses; a slope with an interval needs {_FEWEST}."
    else:
        yield (f"{slope.verdict}: over {part} loss changes by {slope.per_decade:+.3f} nats per decade of tokens "
               f"({confidence:.0%} interval {slope.low:+.3f} to {slope.high:+.3f}, {slope.points} points).")
    if len(found.points) > 1:
        for name, stretch in (("first", found.former), ("second", found.latter)):
            if stretch.end.tokens > stretch.begin.tokens:
                yield _bought(name, stretch)


def _bought(name: str, stretch: Stretch) -> str:
    begin, end = stretch.begin, stretch.end
    text = (f"the {name} part, {begin.tokens:,.0f} to {end.tokens:,.0f} tokens, bought {stretch.perplexity:.2f} perplexity "
            f"({begin.perplexity:.2f} to {end.perplexity:.2f})")
    if stretch.kwh is None:
        return f"{text}; energy was not measured."
    price = stretch.kwh_per_centinat
    per = "loss did not fall" if price is None else f"{price:.4g} kWh per 0.01 nat"
    return f"{text} for {_kwh(stretch.kwh)} kWh: {per}."


def _kwh(value: float) -> str:
    return f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.3g}"
