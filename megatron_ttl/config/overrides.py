"""Overrides on the command line: `section.key=value`, where the value is TOML or a bare word."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from typing import Any

from megatron_ttl.config.describe import leaf_keys
from megatron_ttl.config.read import nested_deeper
from megatron_ttl.config.schema import RunFile
from megatron_ttl.config.suggest import split_key

WHERE = "command line"
_DEEPEST = 8
_KEY = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


def parse_value(text: str) -> tuple[Any, str]:
    """Return the value of an override and a fault ('' when there is none).

    What is not TOML is a bare word and taken as text; what opens a list, a table or a quotation must be TOML.
    """
    if any("\ud800" <= char <= "\udfff" for char in text):  # how Python passes on bytes that are no UTF-8
        return None, "has a value that is no UTF-8; must be Unicode; write it in a UTF-8 terminal"
    try:
        table = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError) as error:
        if text[:1] in ("[", "{", '"', "'"):
            reason = str(error).partition(" (at ")[0]
            return None, (f"is {text}; must be TOML ({reason}); put quotes around texts and single quotes "
                          "around the whole")
        if not text or any(not char.isprintable() for char in text):
            return None, ("has no value; must be key=value; write one after the sign ('none' takes an "
                          "optional key away)")
        return text, ""
    if nested_deeper(table, _DEEPEST):
        return None, f"is nested more than {_DEEPEST} deep; must be a value of a setting; write one"
    if set(table) != {"value"}:
        return None, f"holds more than one value ({text!r}); must be one; write one override for each key"
    return table["value"], ""


def apply_overrides(raw: dict[str, Any], overrides: list[str], unknown: Callable[[str], tuple[str, set[str]]]
                    ) -> tuple[dict[str, Any], set[str], list[tuple[str, str]]]:
    """Return the tables with the overrides in them, the keys they gave, and the faults.

    `none` takes an optional key away, so that e.g. a run can be given in tokens where the file gives steps.
    """
    known = set(leaf_keys(RunFile))
    sections = {split_key(key)[0] for key in known}
    merged = {name: dict(table) if isinstance(table, dict) else table for name, table in raw.items()}
    given: set[str] = set()
    faults: list[tuple[str, str]] = []
    for override in overrides:
        key, sign, text = override.partition("=")
        key = key.strip()
        value, fault = parse_value(text.strip())
        if not sign or not _KEY.fullmatch(key):
            fault = "is no override; must be section.key=value; e.g. train.steps=1000"
            key = override
        elif key in given:
            fault = "is given twice; a key may be given once; remove one of the two"
        elif key in sections:
            fault = f"is a whole section; must be section.key=value; write one for each key, {key}.<key>=..."
        elif key not in known:
            fault = unknown(key)[0]
        if fault:
            faults.append((key, fault))
            continue
        given.add(key)
        section, leaf = split_key(key)
        table = merged.setdefault(section, {})
        if not isinstance(table, dict):
            continue  # the file is wrong there, and is told so
        if value == "none" and _optional(section, leaf):
            table.pop(leaf, None)
        else:
            table[leaf] = value
    return merged, given, faults


def _optional(section: str, leaf: str) -> bool:
    schema = RunFile.model_fields[section].annotation
    assert schema is not None
    field = schema.model_fields[leaf]
    return not field.is_required() and field.default is None
