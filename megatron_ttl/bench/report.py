"""Many results, kept with `--json`, as one document."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from megatron_ttl.bench.figures import headings, markdown_line, shown_row
from megatron_ttl.errors import UserError
from megatron_ttl.files import write_text

REPORT = "report.md"


def collect(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Write `report.md` from all `NAME.json` of a folder; of a `NAME.log` without a result, its last line.

    Returns:
        The file, how many results are in it, and which are missing.

    Raises:
        UserError: there is nothing to report.
    """
    place = Path(folder)
    names = sorted({path.stem for path in (*place.glob("*.json"), *place.glob("*.log"))})
    if not names:
        raise UserError(f"{place}: has neither .json nor .log; it must hold what bench.py printed with --json; keep results "
                        "there first")
    sections, missing = [], []
    for name in names:
        result = _read(place / f"{name}.json")
        if result is None:
            missing.append(name)
            sections += [f"## {name}", "", f"No result: {_last_line(place / f'{name}.log')}", ""]
        else:
            sections += [f"## {name}", "", *_section(result), ""]
    write_text(place / REPORT, "\n".join(["# Measurements", "", *sections]))
    return {"report": str(place / REPORT), "results": len(names) - len(missing), "missing": ", ".join(missing) or "none"}


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _section(result: dict[str, Any]) -> list[str]:
    facts = {key: value for key, value in result.items() if not isinstance(value, list | dict)}
    rows = [row for row in result.get("rows") or () if isinstance(row, dict)]
    lines = ["; ".join(f"{key.replace('_', ' ')} {value}" for key, value in facts.items())]
    if rows:
        columns = [name for name in rows[0] if not isinstance(rows[0][name], dict)]
        lines += ["", markdown_line(headings(columns)), markdown_line(["---"] * len(columns)),
                  *(markdown_line(shown_row(row, columns)) for row in rows)]
    return lines


def _last_line(path: Path) -> str:
    try:
        lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    except OSError:
        return "and no log"
    return lines[-1].strip()[:300] if lines else "and an empty log"
