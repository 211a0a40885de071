"""Turn tokens into text as they come, without ever showing half a character."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence

_HALF = "\N{REPLACEMENT CHARACTER}"  # what decoders write for bytes that make no character (yet)


class TextStream:
    """Give out the text that each new token completes.

    A character outside of the vocabulary comes as several byte tokens: text is held back until they make a
    character. All pieces together are the text of the new tokens behind the prompt, spaces included.

    Args:
        decode: token ids to text.
        prompt_ids: tokens before the first new one.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt_ids: Sequence[int] = ()) -> None:
        self._decode = decode
        # Only a window of tokens is decoded again and again, so that a long text costs no more per token:
        # those of the last piece given out (the first of a text may lose its space), and those held back.
        self._window = list(prompt_ids)
        self._given = len(self._window)

    def add(self, token: int) -> str:
        """Take a token; return the text it completes, empty while a character is half."""
        self._window.append(token)
        text = self._decode(self._window)
        return "" if text.endswith(_HALF) else self._release(text)

    def finish(self) -> str:
        """Return what was held back, half characters as U+FFFD."""
        return self._release(self._decode(self._window))

    def _release(self, text: str) -> str:
        new = text[len(self._decode(self._window[: self._given])) :]
        if new:
            self._window = self._window[self._given :]
        self._given = len(self._window)
        return new


def printable(text: str) -> str:
    """Show control characters as U+FFFD: text of a model must not steer the terminal."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else _HALF for c in text)
