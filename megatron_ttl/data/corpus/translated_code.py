"""Find code whose keywords a translator took for words: `importar torch`, `retornar x`, `imprimir("olá")`.

Machine-translated web pages and instructions are full of it, and a model that reads it writes it.
Which words are keywords is data of a preset.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ttl.data.corpus.document import Document, Dropped, Step

_FENCE = re.compile(r"\s*(?:```|~~~)")
_NAME = r"[^\W\d]\w*(?:\.\w+)*"
# What prose does not have: a bracket that follows a name, operators, brackets, an underscore, four spaces before.
_LOOKS_LIKE_CODE = re.compile(r"\w\(|[=\[\]{}<>_\\]|^(?: {4}|\t)")


@dataclass(frozen=True)
class _Keywords:
    """Compiled keywords, each by its name in the preset."""

    beginning: dict[str, re.Pattern[str]]
    """Of a line."""
    calls: dict[str, re.Pattern[str]]
    """Anywhere in a line of code."""
    any_beginning: re.Pattern[str]
    """Any of the first: most texts have none, and then nothing more is done."""


def translated_code_step(keywords: Sequence[str], max_lines: float | None) -> Step:
    """Return a step that notes the lines of translated code, and drops a text with more than `max_lines`.

    Inside a code fence a keyword at the beginning of a line counts, and a call anywhere in it. Elsewhere the line must
    look like code, or consist of the keyword and its names alone (`importar torch`). The note `translated_code` holds
    the number of such lines by keyword.
    """
    compiled = _compile(keywords)

    def apply(document: Document) -> Document | Dropped:
        found = _translated_lines(document.text, compiled)
        if max_lines is not None and found.total() > max_lines:
            return Dropped("translated_code.max_lines", float(found.total()), max_lines)
        return document.with_note("translated_code", dict(sorted(found.items()))) if found else document

    return apply


def _translated_lines(text: str, keywords: _Keywords) -> Counter[str]:
    """Count the lines of translated code by the first keyword of each."""
    found: Counter[str] = Counter()
    lines = text.split("\n")
    if not any(map(keywords.any_beginning.match, lines)) and not any(call in text for call in keywords.calls):
        return found
    fenced = False
    for line in lines:
        if _FENCE.match(line):
            fenced = not fenced
        elif keyword := _keyword_of(line, fenced or _LOOKS_LIKE_CODE.search(line) is not None, keywords):
            found[keyword] += 1
    return found


def _keyword_of(line: str, is_code: bool, keywords: _Keywords) -> str | None:
    for keyword, pattern in keywords.beginning.items():
        if (match := pattern.match(line)) and (is_code or not line[match.end():].strip()):
            return keyword
    if is_code:
        return next((keyword for keyword, pattern in keywords.calls.items() if pattern.search(line)), None)
    return None


def _compile(keywords: Sequence[str]) -> _Keywords:
    beginning, calls = {}, {}
    for keyword in keywords:
        pattern = r"[ \t]+".join(re.escape(word).replace("NAME", _NAME) for word in keyword.split())
        if re.fullmatch(r"\w+\(", keyword) and not keyword.startswith("NAME"):
            calls[keyword] = re.compile(rf"(?<![\w.]){pattern}")
        else:
            beginning[keyword] = re.compile(rf"[ \t]*{pattern}" + (r"(?!\w)" if keyword[-1].isalnum() else ""))
    either = "|".join(pattern.pattern for pattern in beginning.values())
    return _Keywords(beginning, calls, re.compile(either or r"(?!)"))
