"""Check a table against its schema; turn each finding into a sentence with key, rule and way out."""

from __future__ import annotations

import datetime
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from megatron_ttl.config.describe import (
    field_texts,
    is_list,
    known_keys,
    plain_type,
    requirement,
    section_type,
    show,
)
from megatron_ttl.config.suggest import did_you_mean, nearest_words

_MOST_ERRORS = 2_000
Model = TypeVar("Model", bound=BaseModel)
Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Checked(Generic[Model]):
    """A table after its check: the rules between keys can still be applied to the keys that are right."""

    value: Model
    """Complete when there are no faults; else the keys in `wrong` are absent or stand at their default."""
    faults: tuple[tuple[str, str], ...]
    """(dotted key, `what it is; what it must be; what to do`)."""
    wrong: frozenset[str]
    """Dotted keys, sections included, whose value cannot be used."""


def validate(model: type[Model], raw: dict[str, Any],
             unknown: Callable[[str], tuple[str, set[str]]]) -> Checked[Model]:
    """Check `raw` against `model`, strictly and at every depth, and collect all faults.

    `unknown` returns, for a key that the schema does not know, the fault and the keys that were probably
    meant; these are then not reported as missing.
    """
    model.model_rebuild()
    faults: dict[str, str] = {}
    wrong: set[str] = set()
    plain = _without_strange_values(raw, (), faults)
    wrong.update(map(_leaf_of, faults))
    strange = tuple(faults)
    missing: dict[str, str] = {}
    meant: set[str] = set()
    errors = list(islice(_errors(model, plain), _MOST_ERRORS + 1))
    for path, kind, said in errors[:_MOST_ERRORS]:
        key = dotted(path)
        if any(key == other or key.startswith((other + ".", other + "[")) for other in strange):
            continue
        if kind == "extra_forbidden":
            faults[key], names = unknown(key)
            meant |= names
            if any(isinstance(part, int) for part in path):
                wrong.add(_leaf_of(key))
            continue
        if kind == "value_error":  # a rule between the keys of one table: it says `key: fault` itself
            name, _, text = said.removeprefix("Value error, ").partition(": ")
            faults[dotted((*path, name))] = text
            wrong.add(_leaf_of(dotted((*path, name))))
            continue
        key, text, is_missing = _explain(model, plain, path, kind)
        (missing if is_missing else faults)[key] = text
        wrong.add(_leaf_of(key))
    wrong |= {key for key in known_keys(model) if any(key.startswith(section + ".") for section in wrong)}
    faults |= {key: text for key, text in missing.items() if without_indices(key) not in meant}
    # A list with a faulty element is also reported as too short; the element says it better.
    lists = {_leaf_of(key) for key in faults if "[" in key}
    faults = {key: text for key, text in faults.items() if key not in lists}
    if len(errors) > _MOST_ERRORS:  # another kind of file, or a hostile one: not a minute for every key
        faults["..."] = "are more keys that are wrong; must be those of the schema; begin with the ones above"
        wrong |= set(known_keys(model))
        plain = {}
    if faults or wrong:
        return Checked(_partial(model, plain, wrong), tuple(faults.items()), frozenset(wrong))
    # JSON mode: arrays become tuples and 1 becomes 1.0 where the schema says so; all else stays strict.
    return Checked(model.model_validate_json(json.dumps(plain)), (), frozenset())


def dotted(path: Path) -> str:
    """Return ('data', 'sources', 0, 'prefix') as 'data.sources[0].prefix', odd keys in quotes."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{quoted(part)}" for part in path)[1:]


def quoted(part: str) -> str:
    """Return one key as TOML would have it: 'a.b' and what has spaces or control characters in quotes."""
    return part if re.fullmatch(r"[\w-]+", part) else json.dumps(part, ensure_ascii=False)


def without_indices(key: str) -> str:
    """Return 'data.sources[0].prefix' as 'data.sources[].prefix', the way the schema's keys are listed."""
    return re.sub(r"\[\d+\]", "[]", key)


def _leaf_of(key: str) -> str:
    return key.partition("[")[0]


def _errors(model: type[BaseModel], plain: dict[str, Any]) -> Iterator[tuple[Path, str, str]]:
    try:
        model.model_validate_json(json.dumps(plain))
    except ValidationError as error:
        for finding in error.errors(include_url=False, include_context=False, include_input=False):
            yield finding["loc"], finding["type"], finding["msg"]


def _without_strange_values(raw: Any, path: Path, faults: dict[str, str]) -> Any:
    """Copy `raw` without what JSON cannot hold: TOML's dates and times, numbers that are none, and integers
    of any length, which neither floats nor Python's own printing can take."""
    if isinstance(raw, dict):
        kept = {key: _without_strange_values(value, (*path, key), faults) for key, value in raw.items()}
        return {key: value for key, value in kept.items() if dotted((*path, key)) not in faults}
    if isinstance(raw, list):
        return [_without_strange_values(value, (*path, i), faults) for i, value in enumerate(raw)]
    if isinstance(raw, float) and not math.isfinite(raw):
        faults[dotted(path)] = f"is {raw}; must be a finite number; write one"
    elif isinstance(raw, int) and abs(raw) >= 2**128:
        faults[dotted(path)] = f"is a whole number of {raw.bit_length():,} bits; must be one that a setting can have; write a smaller one"
    elif isinstance(raw, (datetime.date, datetime.time)):
        faults[dotted(path)] = f"is a date or time ({raw}); must be a number or a text; put a text in quotes"
    return None if dotted(path) in faults else raw


def _explain(model: type[BaseModel], plain: dict[str, Any], path: Path, kind: str) -> tuple[str, str, bool]:
    """Return (key, fault, whether the key is missing) for a finding of pydantic at `path`."""
    key: Path = ()
    field: FieldInfo | None = None
    doc = ""
    schema: type[BaseModel] | None = model
    value: Any = plain
    absent = False
    for part in path:  # down to the last key that the schema names: an element of a plain list has no name
        if schema is None:
            break
        key += (part,)
        if isinstance(part, int):
            value = value[part]
            continue
        field, doc = schema.model_fields[part], field_texts(schema).get(part, "").split("; ")[0].rstrip(".")
        schema = section_type(field.annotation)
        absent = not isinstance(value, dict) or part not in value
        value = None if absent else value[part]
    assert field is not None
    name = dotted(key)
    if absent:
        if schema is not None and not is_list(field.annotation):
            return name, f"is missing; must be a table; add [{name}] with its keys", True
        doc = f" ({doc})" if doc else ""
        return name, f"is missing; must be {requirement(field)}; add it{doc}", True
    if schema is not None and (isinstance(key[-1], int) or not is_list(field.annotation)):
        return name, f"is {show(value)}; must be a table; write a table of its keys", False
    if kind == "json_invalid":
        raise AssertionError(f"{name}: what json.dumps wrote is JSON")
    return name, f"is {show(value)}; must be {requirement(field)}; {_advice(field, value, doc)}", False


def _advice(field: FieldInfo, value: Any, doc: str) -> str:
    """Return what to do about a value of the wrong kind or out of bounds."""
    wanted = plain_type(field)
    choices = [show(choice).strip('"') for choice in get_args(wanted)] if get_origin(wanted) is Literal else []
    if isinstance(value, str) and choices:
        near = nearest_words(value, choices)
        return did_you_mean(near) if near else f"choose one ({doc})"
    if isinstance(value, str) and wanted in (int, float, bool):
        if value == "auto":
            return "write the value: 'auto' is for the keys that the run file owns"
        if value.lower() in ("true", "false") and wanted is bool:
            return f"write {value.lower()}, without quotes"
        return "write it without quotes" if _is_number(value) else f"write the value ({doc})"
    if isinstance(value, float) and wanted is int:
        return f"write {int(value)}" if value.is_integer() else f"round it ({doc})"
    if isinstance(value, str) and len(value) == 3 and value.isalpha() and value.upper() != value:
        return f'write "{value.upper()}"'
    if wanted is str and not isinstance(value, (str, dict, list)):
        return f'write "{value}", in quotes (in a shell: \'key="{value}"\')'
    return f"change it ({doc})"


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _partial(model: type[Model], plain: Any, wrong: set[str], prefix: str = "") -> Model:
    """Build a model from the keys that are right; the others are absent or stand at their default."""
    values: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        table = section_type(field.annotation)
        given = isinstance(plain, dict) and name in plain
        if table is not None and not is_list(field.annotation):
            if not field.is_required() and (not given or plain[name] is None):
                continue  # its default is right, and may be that there is no such section
            values[name] = _partial(table, plain[name] if given else {}, wrong, f"{prefix}{name}.")
        elif given and prefix + name not in wrong:
            values[name] = TypeAdapter(field.annotation).validate_json(json.dumps(plain[name]))
    return model.model_construct(**values)
