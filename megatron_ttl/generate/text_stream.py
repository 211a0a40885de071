"""Turn tokens into text as they come, without ever showing half a character."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence

_HALF = "\N{REPLACEMENT CHARACTER}"  # what decoders write for bytes that make no character (yet)


class TextStream:
    """Give out the text that each new token completes.

    A character outside the vocabulary comes as several byte tokens: text is held back until they make a
    character. All pieces together are the text of the new tokens in the context of the prompt, spaces included.

    Args:
        decode: token ids to text.
        prompt_ids: tokens before the first new one.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt_ids: Sequence[int] = ()) -> None:
        self._decode = decode
        # Only tokens since the last whole character but one are decoded again: a long text costs no more per token.
        self._ids = list(prompt_ids)
        self._given = len(self._ids)

    def add(self, token: int) -> str:
        """Take a token; return the text it completes, empty while a character is half."""
        self._ids.append(token)
        before, text = self._decode(self._ids[: self._given]), self._decode(self._ids)
        if text.endswith(_HALF):
            return ""
        return self._release(before, text)

    def finish(self) -> str:
        """Return what was held back, half characters as U+FFFD."""
        return self._release(self._decode(self._ids[: self._given]), self._decode(self._ids))

    def _release(self, before: str, text: str) -> str:
        if len(text) > len(before):
            self._ids, self._given = self._ids[self._given :], len(self._ids) - self._given
        return text[len(before) :]


def printable(text: str) -> str:
    """Show control characters as U+FFFD: text of a model must not steer the terminal."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else _HALF for c in text)
