"""Read TOML and JSON, and say in which line and column a file is wrong."""

from __future__ import annotations

import json
import re
import tomllib
from bisect import bisect_left
from pathlib import Path
from typing import Any

from megatron_ttl.files import read_regular

MAX_SETTINGS_BYTES = 128 << 10
"""Of a run file and of a DeepSpeed JSON: some KB are usual, and what is larger could take long to read."""
DEEPEST = 32
"""Levels of nesting: no file of ours has ten, and what walks through values must not run out of stack."""
_MOST_DOTS = 400
_JSON_TOKEN = re.compile(
    r"""(?P<space>[ \t\r\n]+)
      | (?P<comment>//[^\n]*|/\*.*?(?:\*/|\Z)|\#[^\n]*)
      | (?P<string>"(?:[^"\\\n]|\\.)*")
      | (?P<constant>-?Infinity|NaN)
      | (?P<mark>[{}\[\],:])
      | (?P<word>[^\s{}\[\],:"]+)""",
    re.VERBOSE | re.DOTALL,
)
_TOML_PLACE = re.compile(r"^(?P<what>.*) \(at line (?P<line>\d+), column (?P<column>\d+)\)$", re.DOTALL)


def read_text(path: Path, what: str, option: str) -> tuple[str, list[str]]:
    """Return the text of a settings file and the faults found on the way (then the text is empty)."""
    try:
        text = read_regular(path, MAX_SETTINGS_BYTES).decode("utf-8-sig")
        if text.strip():
            return text, []
        is_, do = "is empty", f"write it, or give another with {option}"
    except FileNotFoundError:
        is_, do = "does not exist", f"give its path with {option}"
    except IsADirectoryError:
        is_, do = "is a folder", f"give the file itself with {option}"
    except UnicodeDecodeError as error:
        is_, do = f"is not UTF-8 at byte {error.start:,}", "save it again as UTF-8"
    except OSError as error:
        is_, do = f"cannot be read ({error.strerror})", "repair its permissions"
    return "", [f"{path}: {is_}; it must be {what}; {do}"]


def nested_deeper(value: Any, levels: int) -> bool:
    """Return whether a value holds dicts and lists in more than so many levels."""
    level = [value]
    for _ in range(levels):
        level = [child for item in level if isinstance(item, dict | list)
                 for child in (item.values() if isinstance(item, dict) else item) if isinstance(child, dict | list)]
        if not level:
            return False
    return True


def parse_toml(text: str, path: Path, what: str = "run file") -> tuple[dict[str, Any], list[str]]:
    """Return the tables of a TOML text and its faults (then the tables are empty)."""
    for number, line in enumerate(text.splitlines(), 1):
        if line.count(".") > _MOST_DOTS:  # in a key they would take Python's reader minutes
            return {}, [f"{path}:{number}: has {line.count('.'):,} dots in a line; must have at most {_MOST_DOTS}; "
                        "break the line"]
    try:
        tables = tomllib.loads(text)
        if nested_deeper(tables, DEEPEST):
            return {}, [f"{path}: is nested more than {DEEPEST} deep; must be tables of settings; repair it"]
        return tables, []
    except tomllib.TOMLDecodeError as error:
        place = _TOML_PLACE.match(str(error))
        where = f"{path}:{place['line']}:{place['column']}" if place else str(path)
        return {}, [f"{where}: {place['what'] if place else error}; the {what} must be TOML; repair this "
                    "line"]
    except (RecursionError, ValueError) as error:  # nested thousands deep, or as many digits
        return {}, [f"{path}: {error}; the {what} must be TOML; repair it"]


def parse_json(text: str, path: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the object in a JSON text and its faults (then the object is empty).

    Comments, trailing commas, duplicate keys, NaN and Infinity are faults, as they are in the JSON standard.
    """
    faults = [f"{path}:{line}:{column}: {fault}" for line, column, fault in _json_faults(text)]
    if faults:
        return {}, faults
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}:{error.lineno}:{error.colno}"
        return {}, [f"{where}: {error.msg}; the DeepSpeed configuration must be JSON; repair this line"]
    except (RecursionError, ValueError) as error:
        return {}, [f"{path}: {error}; the DeepSpeed configuration must be JSON; repair it"]
    if not isinstance(value, dict):
        return {}, [f"{path}: holds {json.dumps(value)[:40]}; it must hold one JSON object; put the keys "
                    "into {...}"]
    if nested_deeper(value, DEEPEST):
        return {}, [f"{path}: is nested more than {DEEPEST} deep; must be tables of settings; repair it"]
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return {}, [f"{path}: holds half a character (\\ud800 to \\udfff alone); must be Unicode; repair "
                    "that text"]
    return value, []


def _json_faults(text: str) -> list[tuple[int, int, str]]:
    """Find what Python's reader lets pass or blames on the wrong place: (line, column, fault)."""
    faults: list[tuple[int, int, str]] = []
    keys: list[dict[str, int]] = []  # of the objects (and arrays: unused) that are open
    previous, previous_at = "", 0
    line_ends = [-1, *(match.start() for match in re.finditer("\n", text))]

    def add(at: int, fault: str) -> None:
        line = bisect_left(line_ends, at)
        faults.append((line, at - line_ends[line - 1], fault))

    at = 0
    while at < len(text) and (token := _JSON_TOKEN.match(text, at)):
        kind, word = token.lastgroup, token.group()
        if kind == "comment":
            add(at, "is a comment; JSON knows none; move it into \"_comment\"")
        elif kind == "constant":
            add(at, f"is {word}; JSON knows finite numbers only; write a number")
        elif word in "{[" and kind == "mark":
            keys.append({})
        elif word in "}]" and kind == "mark":
            if previous == ",":
                add(previous_at, "is a comma before a closing bracket; JSON knows none there; remove it")
            if keys:
                keys.pop()
        elif word == ":" and keys and previous.startswith('"'):
            first = keys[-1].setdefault(previous, previous_at)
            if first != previous_at:
                line = text.count("\n", 0, first) + 1
                add(previous_at, f"is the key {previous} again (first in line {line}); "
                                 "a key may appear once; remove one of the two")
        if kind not in ("space", "comment"):
            previous, previous_at = word, at
        at = token.end()
    return faults
