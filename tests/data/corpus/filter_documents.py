"""Documents and settings for the tests of filters."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from megatron_ttl.data.corpus.document import Document
from megatron_ttl.data.corpus.filter_settings import FilterSettings, FilterTables


def document(text: str) -> Document:
    """Return a document with this text."""
    return Document(text, "fonte", "CC0", "a.jsonl", 1)


def settings(**tables: Any) -> FilterSettings:
    """Return settings as a corpus file would give them."""
    return FilterSettings.model_validate_json(json.dumps(tables))


def only(preset: str, tables: dict[str, dict[str, Any]]) -> FilterSettings:
    """Return settings in which nothing of a preset is on but what `tables` says."""
    off: dict[str, dict[str, Any]] = {}
    for name, field in FilterTables.model_fields.items():
        for key, kind in field.annotation.model_fields.items():
            if "False" in str(kind.annotation) or "bool" in str(kind.annotation):
                off.setdefault(name, {})[key] = False
    off["repair"]["normalization"] = "none"
    return settings(preset=preset, **{name: {**off[name], **tables.get(name, {})} for name in off})


def cpu_seconds(call: Callable[..., Any], *arguments: Any) -> float:
    """Return the processor time that a call takes: other processes do not count."""
    started = time.process_time()
    call(*arguments)
    return time.process_time() - started
