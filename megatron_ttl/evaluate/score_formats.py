"""Write a table of scores for a terminal, Markdown, CSV, LaTeX, or as JSON for programs."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ttl.console import print_table
from megatron_ttl.errors import ConfigError
from megatron_ttl.evaluate.score_table import Cell, Row, ScoreTable
from megatron_ttl.files import or_disk_error, write_text

FORMATS = {"terminal": "", "markdown": ".md", "csv": ".csv", "latex": ".tex", "json": ".json"}
"""Formats, and the suffixes of files that mean them."""
_NOT_ABOVE = "†"
_LATEX = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
          "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", _NOT_ABOVE: r"\textdagger{}"}
_MARKDOWN = {sign: f"\\{sign}" for sign in "\\|*_`<[]"}


def write_table(table: ScoreTable, format_name: str | None = None, output: str | os.PathLike[str] | None = None) -> None:
    """Print a table, or write it to a file.

    Args:
        table: what to show.
        format_name: one of `FORMATS`; None: what the suffix of `output` means, `terminal` without one.
        output: the file; None: standard output.

    Raises:
        ConfigError: there is no such format, or it is for terminals and a file was asked for.
        DiskError: the file cannot be written.
    """
    suffix = Path(output).suffix.lower() if output is not None else ""
    name = format_name or next((name for name, known in FORMATS.items() if known == suffix), "")
    if name not in FORMATS or (name == "terminal" and output is not None):
        raise ConfigError(f"--format: {name or 'none'} for {output or 'standard output'}; it must be one of "
                          f"{', '.join(FORMATS)}, for a file not terminal; give another --format, or name the file *.md, "
                          "*.csv, *.tex or *.json")
    if name == "terminal":
        print_table(*_terminal(table))
        print("\n".join(table.notes))
        return
    text = {"markdown": to_markdown, "csv": to_csv, "latex": to_latex, "json": to_json}[name](table)
    if output is None:
        print(text, end="")
        return
    with or_disk_error(Path(output)):
        write_text(output, text)


def _terminal(table: ScoreTable) -> tuple[list[str], list[list[str]]]:
    rows = []
    for row in table.rows:
        cells = [_number(cell) + (" *" if cell is not None and cell.best else "") for cell in _cells(table, row)]
        rows.append([f"({row.label})" if row.baseline else row.label, *cells])
    return ["model (* best)", *_headings(table)], rows


def _headings(table: ScoreTable) -> list[str]:
    return [*(column.heading for column in table.columns), *(["average"] if table.averaged else [])]


def _cells(table: ScoreTable, row: Row) -> list[Cell | None]:
    return [*row.cells, *([row.average] if table.averaged else [])]


def _number(cell: Cell | None, bold: str = "{}") -> str:
    """Write `24.83 ± 1.27`, the value in bold where it is the best."""
    if cell is None:
        return "-"
    value = bold.format(f"{cell.value:.2f}") if cell.best else f"{cell.value:.2f}"
    return value + ("" if cell.stderr is None else f" ± {cell.stderr:.2f}") + ("" if cell.above_baselines else f" {_NOT_ABOVE}")


def _escaped(text: str, signs: dict[str, str]) -> str:
    return "".join(signs.get(sign, sign) for sign in text)


def to_markdown(table: ScoreTable) -> str:
    """Return the table as GitHub's Markdown: best scores bold, baselines in italics, notes below."""
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    lines = [line(["model", *(_escaped(heading, _MARKDOWN) for heading in _headings(table))]),
             line([":--", *("--:" for _ in _headings(table))])]
    for row in table.rows:
        label = _escaped(row.label, _MARKDOWN)
        lines.append(line([f"*{label}*" if row.baseline else label,
                           *(_number(cell, "**{}**") for cell in _cells(table, row))]))
    return "\n".join([*lines, "", *(f"- {_escaped(note, _MARKDOWN)}" for note in table.notes)]) + "\n"


def to_latex(table: ScoreTable) -> str:
    """Return the table as a LaTeX tabular; its rules need the package booktabs."""
    def line(cells: Sequence[str]) -> str:
        return f"{' & '.join(cells)} \\\\"

    headings = [_escaped(heading, _LATEX) for heading in _headings(table)]
    lines = [f"\\begin{{tabular}}{{l{'r' * len(headings)}}}", "\\toprule", line(["model", *headings]), "\\midrule"]
    after_models = False
    for row in table.rows:
        if row.baseline and not after_models:
            lines.append("\\midrule")
            after_models = True
        label = _escaped(row.label, _LATEX)
        cells = [_escaped(_number(cell, "<{}>"), _LATEX) for cell in _cells(table, row)]
        bold = [cell.replace("<", "\\textbf{").replace(">", "}") for cell in cells]
        lines.append(line([f"\\emph{{{label}}}" if row.baseline else label, *bold]))
    notes = [f"% {' '.join(note.split())}" for note in table.notes]
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", *notes]) + "\n"


def to_csv(table: ScoreTable) -> str:
    """Return the table as CSV: one column for values and one for standard errors, full precision, notes left out."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["model", "kind", *(name for heading in _headings(table) for name in (heading, f"{heading} stderr"))])
    for row in table.rows:
        figures = [(None, None) if cell is None else (cell.value, cell.stderr) for cell in _cells(table, row)]
        writer.writerow([row.label, "baseline" if row.baseline else "model", *(figure for pair in figures for figure in pair)])
    return out.getvalue()


def to_json(table: ScoreTable) -> str:
    """Return everything: headings, values as shown, and the whole record behind each of them."""
    def cell_of(cell: Cell | None) -> dict[str, Any] | None:
        if cell is None:
            return None
        shown = {"value": cell.value, "stderr": cell.stderr, "best": cell.best, "above_baselines": cell.above_baselines}
        return shown if cell.record is None else shown | {"record": cell.record.model_dump(mode="json")}

    columns = [{"heading": column.heading, "task": column.record.task, "metric": column.record.metric,
                "factor": column.factor, "lower_is_better": column.lower_is_better, "averaged": number in table.averaged}
               for number, column in enumerate(table.columns)]
    rows = [{"label": row.label, "baseline": row.baseline, "scores": [cell_of(cell) for cell in row.cells],
             "average": cell_of(row.average)} for row in table.rows]
    return json.dumps({"columns": columns, "rows": rows, "notes": table.notes}, ensure_ascii=False, allow_nan=False,
                      indent=2) + "\n"
