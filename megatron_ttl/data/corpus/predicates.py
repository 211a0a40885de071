"""Predicates on what is known of a document: `meta.set == "Github"`, `notes.toxicity >= 0.5`.

    predicate = field operator value
    field     = meta.<key>[.<key>...] | notes.<key>[.<key>...] | license | file | source
    operator  = == | != | < | <= | > | >= | in | exists
    value     = a JSON number, text in double quotes, true, false or null; for `in` a list of them; none for `exists`

A key with other signs than letters, digits, `_` and `-` stands in double quotes: `meta."url host"`. Numbers compare with
numbers and texts with texts (by code points). A predicate on a field that a document does not have, or whose value has
another type than `<`, `<=`, `>` and `>=` can compare, is false, and is counted. Nothing is evaluated as code.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_ttl.data.corpus.document import Document

_ROOTS = ("meta", "notes")
_PLAIN = ("license", "file", "source")
_KEY = r'(?:[\w-]+|"(?:[^"\\]|\\.)*")'
_PREDICATE = re.compile(rf"\s*(?P<field>[\w-]+(?:\.{_KEY})*)\s*(?P<operator>==|!=|<=|>=|<|>|\bin\b|\bexists\b)\s*"
                        r"(?P<value>.*)", re.DOTALL)
_ORDERS: dict[str, Callable[[Any, Any], bool]] = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_ABSENT = object()


@dataclass(frozen=True)
class Predicate:
    """One parsed predicate."""

    text: str
    """As the corpus file has it."""
    path: tuple[str, ...]
    """Field: its root and the keys under it."""
    operator: str
    value: Any

    @property
    def reads_notes(self) -> bool:
        """Whether it can only be asked after the steps that write notes."""
        return self.path[0] == "notes"

    def measured(self, document: Document) -> str | float:
        """Return what the document has in that field, for the report."""
        value = self._value(document)
        if value is _ABSENT:
            return "absent"
        return value if _kind(value) in ("number", "text") else json.dumps(value, ensure_ascii=False)

    def holds(self, document: Document) -> bool | None:
        """Say whether it is true of a document; None where the document does not have the field."""
        value = self._value(document)
        if self.operator == "exists":
            return value is not _ABSENT
        if value is _ABSENT:
            return None
        if self.operator == "in":
            return any(_equal(value, item) for item in self.value)
        if self.operator in _ORDERS:
            return _ORDERS[self.operator](value, self.value) if _kind(value) == _kind(self.value) else None
        return _equal(value, self.value) == (self.operator == "==")

    def _value(self, document: Document) -> Any:
        value: Any = getattr(document, self.path[0])
        for key in self.path[1:]:
            if not isinstance(value, Mapping) or key not in value:
                return _ABSENT
            value = value[key]
        return value


def parse_predicate(text: str) -> Predicate | str:
    """Return a predicate, or the fault of its text: what it is, what it must be, what to do."""
    match = _PREDICATE.fullmatch(text)
    if match is None:
        return f'is `{text}`; must be a field, an operator and a value; write e.g. meta.set == "Github"'
    path = tuple(json.loads(key) if key.startswith('"') else key for key in re.findall(_KEY, match["field"]))
    if not (path[0] in _ROOTS and len(path) > 1 or path in [(name,) for name in _PLAIN]):
        return (f"is about `{match['field']}`; must be about meta.<key>, notes.<key>, {', '.join(_PLAIN)}; "
                "name the key of the record under meta")
    written = match["value"].strip()
    if match["operator"] == "exists":
        return (Predicate(text, path, "exists", None) if not written
                else f"has `{written}` after exists; must end there; remove it")
    try:
        value = json.loads(written)
    except (ValueError, RecursionError):
        return (f"has the value `{written}`; must have a number, true, false, null, or a text in double quotes; "
                "quote it as JSON does")
    values = value if match["operator"] == "in" and isinstance(value, list) else [value]
    if match["operator"] == "in" and (not isinstance(value, list) or not value):
        return f'has the value `{written}`; must have a list after in; write e.g. in ["a", "b"]'
    if not all(_kind(item) in ("number", "text", "boolean", "null") for item in values):
        return f"has the value `{written}`; must have plain values; remove what is nested"
    if match["operator"] in _ORDERS and _kind(value) not in ("number", "text"):
        return f"compares with `{written}` by {match['operator']}; must be a number or a text; use == or !="
    return Predicate(text, path, match["operator"], value)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    return "number" if isinstance(value, int | float) else "text" if isinstance(value, str) else "nested"


def _equal(value: Any, other: Any) -> bool:
    return _kind(value) == _kind(other) and value == other
