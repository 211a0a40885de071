"""Paragraphs: pieces of a text between blank lines; how they are told apart and taken out."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

_BLANK_LINES = re.compile(r"(\n\s*\n)")


def paragraphs_of(text: str) -> Iterator[tuple[int, str]]:
    """Yield number, from 0, and text of every paragraph that is not blank."""
    for number, piece in enumerate(_BLANK_LINES.split(text)[::2]):
        if piece and not piece.isspace():
            yield number, piece


def without_paragraphs(text: str, numbers: Collection[int]) -> str:
    """Return the text without the paragraphs of these numbers; each takes the blank lines after it along."""
    pieces = _BLANK_LINES.split(text)
    paragraphs, gaps = pieces[::2], [*pieces[1::2], ""]
    kept = [number for number in range(len(paragraphs)) if number not in numbers]
    if kept and kept[-1] != len(paragraphs) - 1:  # what was before the end is now the end
        gaps[kept[-1]] = ""
    return "".join(paragraphs[number] + gaps[number] for number in kept)
