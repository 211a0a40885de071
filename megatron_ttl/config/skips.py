"""Optimizer steps that a run leaves out, as `812` or `1200-1203`: their samples are passed over, their number is not."""

from __future__ import annotations

import re
from collections.abc import Iterable

_RANGE = re.compile(r"([1-9][0-9]{0,11})(?:-([1-9][0-9]{0,11}))?")


def range_fault(text: str) -> str:
    """Return what is wrong with a range of steps, or nothing."""
    found = _RANGE.fullmatch(text)
    if found and int(found[1]) <= int(found[2] or found[1]):
        return ""
    return f"is {text[:40]!r}; must be a step or the first and the last one, counted from 1; e.g. \"1200-1203\""


def ranges_of(texts: Iterable[str]) -> list[tuple[int, int]]:
    """Return (first, last) of each run of steps, ascending and apart; texts without a fault alone."""
    pairs = sorted((int(first), int(last or first)) for first, _, last in (text.partition("-") for text in texts))
    found: list[tuple[int, int]] = []
    for first, last in pairs:
        if found and first <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(found[-1][1], last))
        else:
            found.append((first, last))
    return found


def union(*lists: Iterable[str]) -> tuple[str, ...]:
    """Return all ranges of several lists, in one way of writing them."""
    return tuple(f"{first}-{last}" for first, last in ranges_of(text for texts in lists for text in texts))


def up_to(texts: Iterable[str], step: int) -> list[tuple[int, int]]:
    """Return the ranges as far as a run that stands at `step` has passed them."""
    return [(first, min(last, step)) for first, last in ranges_of(texts) if first <= step]
