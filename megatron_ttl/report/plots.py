"""Draw figures: the only door to matplotlib. No display, no fonts from a network, the same bytes for the same numbers."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron_ttl.errors import ConfigError
from megatron_ttl.report.figure import Figure, Series, printable, thinned

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
"""Told apart by eyes that confuse red and green. Source: Okabe and Ito, Color Universal Design, 2008."""
_LINES = ("-", "--", "-.", ":")
_POINTS = "osD^vP*"
_EVENTS = {"resume": ("|", "#555555"), "spike": ("^", "#d55e00"), "skip": ("x", "#000000"), "left out": ("s", "#cc79a7")}
_MOST_POINTS = 2000  # per curve: more than pixels, less than megabytes
_SIZE_INCHES, _DOTS_PER_INCH = (8.0, 4.6), 150
_INK = "#1a1a1a"
_SETTINGS = {
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 10, "text.parse_math": False,
    "svg.fonttype": "none", "path.simplify": True,
    "text.color": _INK, "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK, "axes.edgecolor": _INK,
    "axes.spines.top": False, "axes.spines.right": False, "figure.facecolor": "white", "axes.facecolor": "white",
    "axes.grid": True, "grid.color": "#dddddd", "grid.linewidth": 0.6,
}


def png(figure: Figure) -> bytes:
    """Draw a figure as PNG.

    Raises:
        ConfigError: matplotlib is missing.
    """
    with _drawn(figure) as canvas:
        return _saved(canvas, "png", dpi=_DOTS_PER_INCH)


def svg(figure: Figure) -> bytes:
    """Draw a figure as SVG whose text stays text.

    Raises:
        ConfigError: matplotlib is missing.
    """
    with _drawn(figure) as canvas:
        return _saved(canvas, "svg", metadata={"Date": None, "Creator": None})


def _saved(canvas: Any, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a box in the drawing says as much
        canvas.savefig(buffer, format=form, **options)
    return buffer.getvalue()


@contextmanager
def _drawn(figure: Figure) -> Iterator[Any]:
    """Yield matplotlib's figure; made without pyplot, so nothing of it stays behind and no backend is chosen."""
    try:
        import matplotlib
        from matplotlib.figure import Figure as Canvas
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
    except ModuleNotFoundError:
        raise ConfigError("matplotlib: is not installed; it is needed for figures (--format csv needs none); "
                          "pip install 'megatron_ttl[report]'") from None
    with matplotlib.rc_context({**_SETTINGS, "svg.hashsalt": figure.name}):
        canvas = Canvas(figsize=_SIZE_INCHES, layout="constrained")
        axes = canvas.add_subplot()
        axes.set_title(_label(figure.title))
        axes.set_xlabel("training tokens")
        axes.set_ylabel(_label(figure.y_label))
        if figure.log_x:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tokens_text(value)))
        for number, series in enumerate(figure.series):
            _draw(axes, series, number)
        for event in dict.fromkeys(mark.event for mark in figure.marks):
            places = [mark.tokens for mark in figure.marks if mark.event == event]
            sign, colour = _EVENTS.get(event, (".", _INK))
            axes.plot(places, [0.02] * len(places), sign, color=colour, markersize=8, transform=axes.get_xaxis_transform(),
                      label=event, clip_on=False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
        yield canvas


def _draw(axes: Any, series: Series, number: int) -> None:
    colour = PALETTE[series.colour % len(PALETTE)]
    label = _label(series.label)
    keep = thinned(len(series.tokens), _MOST_POINTS)
    tokens, values = ([column[place] for place in keep] for column in (series.tokens, series.values))
    if series.kind == "raw":
        axes.plot(tokens, values, color=colour, alpha=0.25, linewidth=0.7)
    elif series.kind == "level":
        axes.axhline(values[0], color=colour, linestyle=_LINES[1 + series.colour % 3], linewidth=1.2, label=label)
    elif series.kind == "points":
        errors = [(series.errors or {})[place] or 0.0 for place in keep] if series.errors else None
        axes.errorbar(tokens, values, errors, color=colour, marker=_POINTS[series.colour % len(_POINTS)], markersize=5,
                      linewidth=1.2, capsize=3, label=label)
    elif series.kind == "prediction":
        axes.plot(tokens, values, color=colour, linestyle=_LINES[1 + series.colour % 3], linewidth=1.2, label=label)
    else:
        few = len(tokens) <= 30
        again = series.colour // len(PALETTE)
        axes.plot(tokens, values, color=colour, linestyle=_LINES[again % len(_LINES)], linewidth=1.6,
                  marker=_POINTS[number % len(_POINTS)] if few else None, markersize=4, label=label)


def _label(text: str) -> str:
    """Keep matplotlib from leaving out of the legend what begins with an underscore; keep control characters out of SVG."""
    return printable(f"\N{ZERO WIDTH SPACE}{text}" if text.startswith("_") else text)


def tokens_text(value: float) -> str:
    """Write a number of tokens as on an axis: 819.2M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"
