"""What a figure shows, before anybody draws it: series of numbers over tokens, and what must be said beside them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["line", "raw", "points", "prediction", "level"]
TABLE_HEADER = ("series", "tokens", "value", "standard error")


@dataclass(frozen=True)
class Series:
    """One curve."""

    label: str
    tokens: Sequence[float]
    values: Sequence[float]
    errors: Sequence[float | None] | None = None
    """Standard errors, one per value; None where there is none."""
    kind: Kind = "line"
    """`raw`: drawn faint, without an entry in the legend. `level`: one value that holds for all tokens."""
    colour: int = 0
    """Number in the palette: curves of one run share it."""


@dataclass(frozen=True)
class Mark:
    """Something that happened at one point of a run."""

    event: str
    run: str
    tokens: float


@dataclass(frozen=True)
class Figure:
    """A figure, complete: its series are all the numbers that it shows."""

    name: str
    """Of its files, without ending."""
    title: str
    y_label: str
    series: Sequence[Series]
    marks: Sequence[Mark] = ()
    note: str = ""
    """What a reader must know: windows, bars, what cannot be compared."""
    log_x: bool = False

    def table(self) -> Iterator[tuple[str, float, float | None, float | None]]:
        """Yield a row per number, in the columns of `TABLE_HEADER`; marks come last and have no value."""
        for one in self.series:
            errors = one.errors or [None] * len(one.values)
            for tokens, value, error in zip(one.tokens, one.values, errors, strict=True):
                yield one.label, tokens, value, error
        for mark in self.marks:
            yield f"{mark.run}: {mark.event}", mark.tokens, None, None

    def description(self) -> str:
        """Say in words what there is to see, for those who cannot."""
        parts = [f"{self.y_label} over training tokens"]
        for one in self.series:
            if one.kind != "raw" and len(one.values):
                ends = f" at {one.tokens[0]:,.0f} tokens to {one.values[-1]:.4g} at {one.tokens[-1]:,.0f}"
                parts.append(f"{one.label}: {one.values[0]:.4g}" + (ends if len(one.values) > 1 else ""))
        return "; ".join(parts) + "."


def thinned(length: int, most: int) -> range:
    """Return the places of at most about `most` of `length` entries, evenly spaced from the end, which is kept."""
    step = max(1, -(-length // most))
    return range((length - 1) % step, length, step)


def printable(text: str) -> str:
    """Replace what no drawing, page or terminal can show: control characters and halves of characters."""
    return text if text.isprintable() else "".join(sign if sign.isprintable() else "?" for sign in text)


def file_stem(text: str) -> str:
    """Make of any text a name for files and for places of a page: no folder, no blank, not too long."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", text)[:100]
