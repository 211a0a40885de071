"""Read JSON that someone else may have written: bounded in size and depth, without duplicate keys and NaN."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NoReturn

from megatron_ttl.config.read import nested_deeper
from megatron_ttl.errors import CheckpointError
from megatron_ttl.files import read_regular

MAX_JSON_BYTES = 4 << 20
"""Enough for the manifest of 30,000 tensors; what is larger was not written by us."""

_HALF_CHARACTER = re.compile(rb"\\u[dD][89a-fA-F]")
_DEEPEST = 64  # what walks through it can stand so much
_CURE = "restore the file from a copy, or use another checkpoint or model folder"


def read_regular_file(path: Path, limit_bytes: int, follow_links: bool = False) -> bytes:
    """Return the bytes of a regular file of at most `limit_bytes`.

    Args:
        path: the file.
        limit_bytes: larger ones are refused unread.
        follow_links: whether a symbolic link is accepted; Hugging Face's cache consists of them.

    Raises:
        CheckpointError: it is missing, cannot be read, is no regular file or is too large.
    """
    try:
        return read_regular(path, limit_bytes, follow_links)
    except OSError as error:
        is_link = path.is_symlink() and not follow_links
        what = "is a symbolic link" if is_link else f"cannot be read ({error.strerror})"
        raise CheckpointError(f"{path}: {what}; it must be a regular file of at most {limit_bytes:,} bytes; "
                              f"{_CURE}") from None


def read_json_object(path: Path, follow_links: bool = False) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        CheckpointError: the file cannot be read or is not strict JSON.
    """
    return parse_json_object(read_regular_file(path, MAX_JSON_BYTES, follow_links), path)


def parse_json_object(payload: bytes, path: Path) -> dict[str, Any]:
    """Parse one JSON object; NaN, infinity, duplicate keys and half characters are refused.

    Raises:
        CheckpointError: it is something else; the fault names `path`.
    """
    try:
        value = json.loads(payload.decode("utf-8"), parse_constant=_refuse_constant,
                           object_pairs_hook=_without_duplicates)
        if nested_deeper(value, _DEEPEST):
            raise RecursionError
        if _HALF_CHARACTER.search(payload):  # alone, or with its other half beside it
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise CheckpointError(f"{path}: is nested too deeply; it must be a plain JSON object; "
                              f"{_CURE}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: is not JSON ({error}); it must be a JSON object; {_CURE}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds {type(value).__name__}; it must be a JSON object; {_CURE}")
    return value


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number of JSON")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        raise ValueError(f"key {next(key for key, _ in pairs if key in seen or seen.add(key))!r} stands "
                         "there twice")
    return result
