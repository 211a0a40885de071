"""Repair a text before it is measured, and mask personal data in it; what was done is noted with the document."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import takewhile
from typing import Literal

from megatron_ttl.data.corpus.document import Document, Step
from megatron_ttl.errors import DataError

_SNIPPET = 80  # characters kept of what was repaired
_BEFORE_CHANGE = 20  # of them before the first change
_LINE_ENDS = re.compile("\r\n|[\r\v\f\x1c-\x1e\x85\u2028\u2029]")
# No line ends: without them lines would run together.
_CONTROLS = re.compile("[\x00-\x08\x0e-\x1b\x1f\x7f-\x84\x86-\x9f\ufeff]")

# Bounded, and begun only where a name can begin: no text takes more than time in proportion to its length.
_EMAIL = re.compile(r"(?<![\w.%+-])[\w.%+-]{1,64}@(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.){1,8}[^\W\d_]{2,24}(?![\w-])")
_CPF = re.compile(r"(?<![0-9])(?<![0-9][./-])(?:[0-9]{11}|[0-9]{3}\.[0-9]{3}\.[0-9]{3}-[0-9]{2})(?![0-9])(?![./-][0-9])")


def mojibake_step() -> Step:
    """Return a step that repairs text decoded with the wrong encoding (`nÃ£o`), line by line.

    Nothing else is touched: no quotes, no widths, no normal form. The note `mojibake` says how many characters and
    lines were repaired, and shows the first place before and after.

    Raises:
        DataError: ftfy is not installed.
    """
    try:
        from ftfy import TextFixerConfig, fix_text
    except ImportError:
        raise DataError("ftfy is not installed; it is needed for the repair of mojibake; "
                        "pip install 'megatron_ttl[corpus]'") from None
    settings = TextFixerConfig(
        unescape_html=False, remove_terminal_escapes=False, fix_latin_ligatures=False, fix_character_width=False,
        uncurl_quotes=False, fix_line_breaks=False, fix_surrogates=False, remove_control_chars=False,
        normalization=None, explain=False)

    def apply(document: Document) -> Document:
        text = document.text
        if text.isascii():
            return document
        before = text.split("\n")
        after = [line if line.isascii() else fix_text(line, settings) for line in before]
        changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
        if not changed:
            return document
        note = {"characters": sum((Counter(new) - Counter(old)).total() for old, new in changed),
                "lines": len(changed), **_snippets(*changed[0])}
        return document.with_text("\n".join(after)).with_note("mojibake", note)

    return apply


def _snippets(old: str, new: str) -> dict[str, str]:
    """Return the surroundings of the first character in which two lines differ."""
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(old, new, strict=False)))
    start = max(0, same - _BEFORE_CHANGE)
    return {"before": old[start:start + _SNIPPET], "after": new[start:start + _SNIPPET]}


def line_ends_step(document: Document) -> Document:
    """Turn every kind of line end into a line feed; note how many as `line_ends`."""
    return _replaced(document, _LINE_ENDS, "\n", "line_ends")


def control_characters_step(document: Document) -> Document:
    """Remove control characters but tab and line ends, and byte order marks; note how many as `control_characters`."""
    return _replaced(document, _CONTROLS, "", "control_characters")


def _replaced(document: Document, pattern: re.Pattern[str], replacement: str, note: str) -> Document:
    text, number = pattern.subn(replacement, document.text)
    return document.with_text(text).with_note(note, number) if number else document


def normalization_step(form: Literal["NFC", "NFKC"]) -> Step:
    """Return a step that brings a text into a Unicode normal form; it notes `normalization` where it changed one."""
    def apply(document: Document) -> Document:
        if unicodedata.is_normalized(form, document.text):
            return document
        return document.with_text(unicodedata.normalize(form, document.text)).with_note("normalization", form)

    return apply


def personal_data_step(email_token: str | None, cpf_token: str | None) -> Step:
    """Return a step that puts the tokens in place of e-mail addresses and CPF numbers; None leaves them.

    A CPF is masked only if its check digits are right. Of eleven digits without dots one in a hundred is so by
    chance. The note `personal_data` says how many of each were masked.
    """
    masks: list[tuple[str, Callable[[str], tuple[str, int]]]] = []
    if email_token is not None:
        masks.append(("email", partial(_mask_emails, token=email_token)))
    if cpf_token is not None:
        masks.append(("cpf", partial(_mask_cpfs, token=cpf_token)))

    def apply(document: Document) -> Document:
        text, counts = document.text, {}
        for kind, mask in masks:
            text, number = mask(text)
            if number:
                counts[kind] = number
        return document.with_text(text).with_note("personal_data", counts) if counts else document

    return apply


def _mask_emails(text: str, token: str) -> tuple[str, int]:
    return _EMAIL.subn(lambda _: token, text) if "@" in text else (text, 0)


def _mask_cpfs(text: str, token: str) -> tuple[str, int]:
    masked = 0

    def replace(match: re.Match[str]) -> str:
        nonlocal masked
        if not is_cpf(match[0]):
            return match[0]
        masked += 1
        return token

    return _CPF.sub(replace, text), masked


def is_cpf(number: str) -> bool:
    """Tell whether the check digits of a CPF are right; eleven equal digits are no CPF.

    Source: Receita Federal; both check digits are sums modulo 11 with the weights 10 to 2 and 11 to 2.
    """
    digits = [int(sign) for sign in number if sign in "0123456789"]
    if len(digits) != 11 or len(set(digits)) == 1:
        return False
    sums = (sum(digit * (length + 1 - place) for place, digit in enumerate(digits[:length])) for length in (9, 10))
    return digits[9:] == [10 * weighted % 11 % 10 for weighted in sums]
