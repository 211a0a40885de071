"""Say what a key of a schema must hold, from the schema itself: for errors and `show_config.py --docs`."""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from collections.abc import Iterator
from functools import cache
from itertools import islice
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_ttl.config.engine import engine_words

_MOST_SHOWN = 80  # elements of a list: more than a line takes
_BOUNDS = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
_WORDS: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false",
                          str: "a text in quotes"}


def plain_type(field: FieldInfo) -> Any:
    """Return the type of a field without `| None`."""
    return without_none(field.annotation)


def without_none(annotation: Any) -> Any:
    """Strip `| None` from a type."""
    if get_origin(annotation) in (Union, types.UnionType):
        return next(choice for choice in get_args(annotation) if choice is not type(None))
    return annotation


def section_type(annotation: Any) -> type[BaseModel] | None:
    """Return the schema of a table, or of the tables in a list; None for a plain value."""
    annotation = without_none(annotation)
    if get_origin(annotation) is tuple:
        annotation = get_args(annotation)[0]
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def is_list(annotation: Any) -> bool:
    """Tell whether a field holds a list."""
    return get_origin(without_none(annotation)) is tuple


def requirement(field: FieldInfo) -> str:
    """Return what a field must hold, e.g. 'a whole number > 0'."""
    annotation = plain_type(field)
    bounds = [f"{sign} {_bound(getattr(rule, name))}" for rule in field.metadata for name, sign in _BOUNDS
              if getattr(rule, name, None) is not None]
    pattern = next((rule.pattern for rule in field.metadata if getattr(rule, "pattern", None)), None)
    text = _type_words(annotation)
    if pattern == "^[A-Z]{3}$":
        text = "three capital letters in quotes, ISO 3166 alpha-3"
    elif any(getattr(rule, "min_length", 0) for rule in field.metadata):
        text += ", not empty"
    return " ".join([text, " and ".join(bounds)]).strip()


def _type_words(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(show(choice) for choice in get_args(annotation))
    if get_origin(annotation) is tuple:
        inner = get_args(annotation)
        if inner[-1] is not Ellipsis:
            return f"a list of {len(inner)} numbers"
        table = section_type(annotation)
        if table is None:
            return "a list of texts"
        return "a list of tables {" + ", ".join(f"{name} = ..." for name in table.model_fields) + "}"
    if get_origin(annotation) is dict:
        return "a table of numbers {name = ..., ...}"
    return _WORDS.get(annotation, "a table")


def _bound(value: float) -> str:
    return {2**63: "2^63", 2**40: "2^40", 2**31 - 1: "2^31 - 1"}.get(value, f"{value:,}")  # type: ignore[call-overload]


@cache
def known_keys(model: type[BaseModel]) -> tuple[str, ...]:
    """Return the dotted keys of a schema, tables included; `x[].y` is a key of the tables in list x."""
    return tuple(path for path, _, _ in walk(model))


@cache
def leaf_keys(model: type[BaseModel]) -> tuple[str, ...]:
    """Return the dotted keys that hold a value; a list of tables is one value."""
    return tuple(path for path, _, leaf in walk(model) if leaf and "[]" not in path)


def walk(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo, bool]]:
    """Yield (dotted key, field, whether it holds a value) of a schema at every depth."""
    model.model_rebuild()  # schemas are built when first used
    for name, field in model.model_fields.items():
        table = section_type(field.annotation)
        as_list = is_list(field.annotation)
        yield prefix + name, field, table is None or as_list
        if table is not None:
            yield from walk(table, f"{prefix}{name}{'[]' if as_list else ''}.")


def documentation(model: type[BaseModel], prefix: str = "") -> list[tuple[str, str, str, str]]:
    """List (key, what it must hold, default, documentation) of every key that holds a value."""
    rows = []
    texts = field_texts(model)
    for name, field in model.model_fields.items():
        table, as_list = section_type(field.annotation), is_list(field.annotation)
        if table is None or as_list:
            default = "required" if field.is_required() else show(field.default)
            rows.append((prefix + name, requirement(field), default, texts.get(name, "")))
        if table is not None:
            rows += documentation(table, f"{prefix}{name}{'[]' if as_list else ''}.")
    return rows


@cache
def field_texts(model: type[BaseModel]) -> dict[str, str]:
    """Read the text under each field of a schema from its source."""
    body = ast.parse(textwrap.dedent(inspect.getsource(model))).body[0]
    assert isinstance(body, ast.ClassDef)
    return {field.target.id: str(text.value.value)
            for field, text in zip(body.body, body.body[1:], strict=False)
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)}


def show(value: Any) -> str:
    """Return a value as a user would write it, shortened to one line."""
    if value is None:
        return "absent"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        text = f'"{value}"'
    elif isinstance(value, int):
        text = f"{value:,}"
    elif isinstance(value, BaseModel):
        text = show(value.model_dump())
    elif isinstance(value, dict):
        text = "{" + ", ".join(f"{k} = {show(v)}" for k, v in islice(value.items(), _MOST_SHOWN)) + "}"
    elif isinstance(value, (list, tuple)):
        text = "[" + ", ".join(show(item) for item in value[:_MOST_SHOWN]) + "]"
    else:
        text = str(value)
    text = " ".join(text.split())
    return text if len(text) <= 160 else text[:157] + "..."


def resolved_rows(settings: Any) -> list[dict[str, str]]:
    """Return key, value, origin, requirement and documentation of every setting, the run file's first."""
    rows = []
    for part in (settings.run, settings.profile):
        for key, must_be, _, text in documentation(type(part)):
            value: Any = part
            for name in key.split("."):
                value = getattr(value, name, None)
            if "[]" not in key:
                shown = show(_plain(value))
                if key == "engine" and value == "auto":
                    shown += f" (one process: {engine_words(settings.profile, 1, True if settings.device else None)})"
                rows.append({"key": key, "value": shown,
                             "origin": settings.origins.get(key, "default"), "must be": must_be,
                             "documentation": text})
    return rows


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
