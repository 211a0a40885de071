"""How figures are shown: units and headings, the same on a screen and in a report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from megatron_ttl.files import human_bytes

_UNITS: dict[str, Callable[[Any], str]] = {
    "tokens_per_s": "{:,.0f}".format, "ours_tokens_per_s": "{:,.0f}".format, "hf_tokens_per_s": "{:,.0f}".format,
    "evaluation_tokens_per_s": "{:,.0f}".format, "ratio": "{:.3f}".format, "ratio_of_minima": "{:.3f}".format,
    "training_speed_up": "{:.2f}".format, "evaluation_speed_up": "{:.2f}".format, "mfu": "{:.1%}".format,
    "share_of_copy": "{:.1%}".format, "same_tokens": "{:.1%}".format, "peak_memory_bytes": human_bytes,
    "bytes": human_bytes, "bytes_per_s": lambda rate: f"{rate / 1e9:,.1f} GB/s", "median_ms": "{:.2f}".format,
    "minimum_ms": "{:.2f}".format, "median_us": "{:.1f}".format, "minimum_us": "{:.1f}".format, "loss": "{:.5f}".format,
    "error": "{:.2g}".format, "loss_difference": "{:+.5f}".format}
_HEADINGS = {"ratio": "ours is x times as fast", "ratio_of_minima": "by the best", "tokens_per_s": "tokens/s",
             "share_of_copy": "of a copy", "bytes_per_s": "achieved", "peak_memory_bytes": "peak memory", "mfu": "MFU"}


def headings(names: Iterable[str]) -> list[str]:
    """Return what stands over the columns of figures."""
    return [_HEADINGS.get(name, name.replace("_", " ")) for name in names]


def shown_row(row: Mapping[str, Any], columns: Sequence[str]) -> list[Any]:
    """Return the figures of a row in their units; None where there is none."""
    return [_UNITS[name](row[name]) if name in _UNITS and row.get(name) is not None else row.get(name) for name in columns]


def markdown_line(cells: Iterable[Any]) -> str:
    """Return one line of a table in Markdown."""
    shown = ("" if cell is None else str(cell).replace("|", "/").replace("\n", " ") for cell in cells)
    return f"| {' | '.join(shown)} |"
