"""Change valid files the way damage and malice do: bits, cuts, splices, magic integers, tokens of JSON and TOML."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

LARGEST = 1 << 14
"""Bytes of the longest input: small enough for thousands a second, and deep nesting still fits."""

_TOKEN = re.compile(rb'"(?:[^"\\\n]|\\.)*"|-?[0-9][0-9.eE+-]*|[A-Za-z_][A-Za-z0-9_]*|[\[\]{}:,=]')
_INTEGERS = (0, 1, -1, 2, 7, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53 + 1, 2**62, 2**63 - 1,
             2**63, 2**64 - 1, -2**31, -2**63)
_WORDS = (b"null", b"true", b"false", b"0", b"-0", b"-1", b"1", b"2", b"1.5", b"0.0", b"1e999", b"-1e999", b"1e-999",
          b"NaN", b"Infinity", b"nan", b"inf", b'""', b'"a"', b'"1"', b'"\\u0000"', b'"\\ud800"', b'"\\n"', b'"\x7f"',
          b'"\xe2\x80\xa8"', b'"../x"', b'"/etc/passwd"', b"[]", b"{}", b"[[]]", b'{"a":1}', b"[0]", b"[null]",
          b"2020-01-01", b"12:00:00", b"0x10", b"1_000", b"9007199254740993", b"18446744073709551616",
          b"9" * 400, b"9" * 5000, b'"' + b"a" * 3000 + b'"', b'{"a":1,"a":2}', b'"\xff"', b"'x'", b"none", b"auto",
          b"{" + b"a." * 1500 + b"a=1}", b"[" * 200 + b"]" * 200, b"0x" + b"f" * 4500)
_CHUNKS = (b"\0", b"\xff", b"\n", b"\r\n", b"\xef\xbb\xbf", b"\xff\xfe", b"\x1f\x8b", b"\xed\xa0\x80", b"\xf0\x9f\x99\x82",
           b"\xe2\x80\xa8", b"\x85", b"\x1b[2J", b"\\ud800", b"\\u0000", b'"', b"'", b"\\", b"{", b"}", b"[", b"]", b",",
           b":", b"#", b"//", b"=", b".", b"[" * 3000, b'{"a":' * 3000, b"[[" * 3, b" " * 300, b"\0" * 300,
           b"\n[model]\n", b"\n\n", b"MMIDIDX\0\0", b"a.b.c = 1\n", b"\n" + b"a." * 2000 + b"a = 1\n")


@dataclass(frozen=True)
class Change:
    """One change of a payload; positions are fractions in 2**16 of its length, so any numbers fit any payload."""

    kind: int
    at: int
    extent: int
    choice: int


KINDS = 11


def apply(payload: bytes, changes: list[Change], seeds: tuple[bytes, ...]) -> bytes:
    """Return a payload after all changes, at most `LARGEST` bytes of it."""
    for change in changes:
        payload = _changed(payload, change, seeds)[:LARGEST]
    return payload


def draw(random_numbers: random.Random) -> list[Change]:
    """Draw one to four changes."""
    number = random_numbers.getrandbits
    return [Change(number(16) % KINDS, number(16), number(16), number(16)) for _ in range(1 + number(2))]


def _changed(payload: bytes, change: Change, seeds: tuple[bytes, ...]) -> bytes:
    size, choice = len(payload), change.choice
    at = change.at * size >> 16
    end = min(size, at + 1 + (change.extent & 15 if change.extent & 16 else change.extent * (size - at) >> 16))
    data = bytearray(payload)
    match change.kind:
        case 0 if size:  # flip a bit
            data[at] ^= 1 << choice % 8
        case 1 if size:  # any byte
            data[at] = choice % 256
        case 2:  # cut a part out
            del data[at:end]
        case 3:  # cut the rest off
            del data[at:]
        case 4:  # insert what has a meaning somewhere
            data[at:at] = _CHUNKS[choice % len(_CHUNKS)]
        case 5:  # repeat a part
            data[at:at] = data[at:end]
        case 6:  # splice with another valid file
            other = seeds[choice % len(seeds)]
            data[at:end] = other[change.extent * len(other) >> 16:][:1 + choice % 999]
        case 7 if size:  # zeros
            data[at:end] = bytes(end - at)
        case 8:  # a magic integer where a field may be
            width = (1, 2, 4, 8)[choice % 4]
            start = at - at % width + (2 if choice & 32 else 0)  # the fields of an index are not aligned
            value = _INTEGERS[(choice >> 6) % len(_INTEGERS)] % (1 << 8 * width)
            data[start:start + width] = value.to_bytes(width, "little" if choice & 16 else "big")
        case _:  # tokens of a text: another word, or one of its own from elsewhere
            return _other_token(payload, change)
    return bytes(data)


def _other_token(payload: bytes, change: Change) -> bytes:
    tokens = list(_TOKEN.finditer(payload))
    if not tokens:
        return payload + _WORDS[change.choice % len(_WORDS)]
    token = tokens[change.at * len(tokens) >> 16]
    word = (_WORDS[change.choice % len(_WORDS)] if change.kind == 9 else
            tokens[change.choice % len(tokens)].group() if change.extent & 7 else b"")
    return payload[:token.start()] + word + payload[token.end():]
