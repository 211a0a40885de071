"""Write one page that needs nothing else: drawings inside, numbers beside them, no address of anything outside."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import Any

from megatron_ttl.report.figure import TABLE_HEADER, Figure, thinned

MOST_ROWS = 60
"""Of a figure's numbers on the page; its CSV file has all."""
_STYLE = """
body { font: 16px/1.5 "DejaVu Sans", Verdana, sans-serif; color: #1a1a1a; background: #ffffff;
       max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
svg { max-width: 100%; height: auto; }
figure { margin: 2rem 0; }
figcaption { font-size: 0.9rem; }
table { border-collapse: collapse; font-size: 0.9rem; }
caption { text-align: left; font-weight: bold; padding: 0.5rem 0; }
th, td { border-bottom: 1px solid #bbbbbb; padding: 0.15rem 0.8rem 0.15rem 0; text-align: right; }
th:first-child, td:first-child { text-align: left; }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(title: str, paragraphs: Iterable[str], tables: Iterable[tuple[str, Sequence[str], Iterable[Sequence[Any]]]],
         drawings: Iterable[tuple[Figure, bytes]]) -> str:
    """Return the page.

    Args:
        title: its name.
        paragraphs: what is said before anything is shown.
        tables: caption, header, rows.
        drawings: figures, each with its SVG.
    """
    parts = [f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>',
             f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
             f'<meta name="viewport" content="width=device-width">\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>',
             f"<h1>{escape(title)}</h1>", *(f"<p>{escape(text)}</p>" for text in paragraphs)]
    for caption, header, rows in tables:
        parts += _table(caption, header, rows)
    for figure, drawing in drawings:
        parts += _figure(figure, drawing)
    return "\n".join([*parts, "</main>\n</body>\n</html>\n"])


def _figure(figure: Figure, drawing: bytes) -> Iterator[str]:
    rows = list(figure.table())
    shown = [rows[place] for place in thinned(len(rows), MOST_ROWS)]
    caption = f"{figure.title}: {len(shown):,} of {len(rows):,} rows" + (f", all are in {figure.name}.csv"
                                                                         if len(shown) < len(rows) else "")
    yield f"<h2>{escape(figure.title)}</h2>\n<figure>"
    yield inline_svg(figure, drawing)
    yield f"<figcaption>{escape(figure.note)}</figcaption>\n</figure>\n<details>\n<summary>Numbers</summary>"
    yield from _table(caption, TABLE_HEADER, shown)
    yield "</details>"


def inline_svg(figure: Figure, drawing: bytes) -> str:
    """Make of an SVG file a part of a page: no addresses, a title and a description, names that no other drawing has."""
    text = drawing.decode("utf-8")
    body = text[text.index("<svg"):]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, count=1, flags=re.DOTALL)
    body = re.sub(r'\sxmlns(?::\w+)?="[^"]*"', "", body.split(">", 1)[0]) + ">" + body.split(">", 1)[1]
    body = body.replace("xlink:href=", "href=")
    for before, after in ((r'\bid="', 'id="'), (r'\bhref="#', 'href="#'), (r"url\(#", "url(#")):
        body = re.sub(before, f"{after}{figure.name}-", body)
    named = f"{figure.name}-title {figure.name}-description"
    head = f'<svg role="img" aria-labelledby="{escape(named)}"'
    words = (f'<title id="{escape(figure.name)}-title">{escape(figure.title)}</title>'
             f'<desc id="{escape(figure.name)}-description">{escape(figure.description())}</desc>')
    return re.sub(r"<svg([^>]*)>", lambda match: f"{head}{match[1]}>{words}", body, count=1)


def _table(caption: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterator[str]:
    yield f"<table>\n<caption>{escape(caption)}</caption>"
    yield "<thead><tr>" + "".join(f'<th scope="col">{escape(name)}</th>' for name in header) + "</tr></thead>\n<tbody>"
    for row in rows:
        yield "<tr>" + "".join(f"<td>{escape(number_text(cell))}</td>" for cell in row) + "</tr>"
    yield "</tbody>\n</table>"


def number_text(value: Any) -> str:
    """Write a cell: whole numbers with commas, others with six digits, nothing as a dash."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) >= 1e4 else f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
