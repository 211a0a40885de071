"""The story of a report: read runs and scores, make figures and tables, write them."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from megatron_ttl import console
from megatron_ttl.errors import ConfigError, raise_faults
from megatron_ttl.evaluate.records import ScoreRecord, read_records
from megatron_ttl.files import atomic_write, or_disk_error, write_text
from megatron_ttl.plan.scaling_laws import choose_laws
from megatron_ttl.report import html, plots
from megatron_ttl.report.curves import run_figures, score_figures
from megatron_ttl.report.figure import TABLE_HEADER, Figure, thinned
from megatron_ttl.report.runs import Run, read_runs
from megatron_ttl.report.saturation import ENERGY_HEADER, Point, energy_table, points_of, saturation, sentences

FORMATS = ("html", "png", "svg", "csv")
SCORES = "scores.jsonl"
MOST_ROWS = 40
"""Of a table of energy on screen and page; gains are since the row above. energy.csv has all."""


def write_report(folders: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str] | None = None,
                 formats: Sequence[str] = FORMATS, constants: Sequence[str] = (),
                 scores: Iterable[str | os.PathLike[str]] = (), window: float | None = None) -> None:
    """Print what runs have learnt and what it cost, and write their figures.

    Args:
        folders: of runs; each one's scores are read with it.
        output: folder for `report.html`, and a .png, .svg and .csv file per figure; None: nothing is written.
        formats: which of these.
        constants: names of scaling laws to draw beside held-out losses.
        scores: more files of scores.
        window: tokens over which losses of training are averaged; None: a fiftieth of the longest run.

    Raises:
        UserError: a run has nothing to show, a name is not known, a library is missing.
        DiskError: the figures cannot be written.
    """
    raise_faults(ConfigError, _argument_faults(formats, window))
    laws = choose_laws(constants)
    runs = read_runs(folders)
    warnings = [warning for run in runs for warning in run.warnings]
    figures = run_figures(runs, laws, window)
    records = list(_records(runs, scores))
    of_scores, unplaced = score_figures(records)
    figures += of_scores
    if unplaced:
        warnings.append(f"{unplaced:,} scores do not say how many tokens their model had seen; they are in no figure")
    said, energy = _energy(runs)
    tables = [(caption, ENERGY_HEADER, list(energy_table([points[place] for place in thinned(len(points), MOST_ROWS)])))
              for caption, points in energy]
    for warning in warnings:
        console.print_warning(warning)
    for caption, header, rows in tables:
        console.print_table(header, rows, title=caption)
    for sentence in said:
        print(sentence)
    if output is not None:
        with or_disk_error(Path(output)):
            _write(Path(output), figures, formats, [_title(runs), [*said, *warnings], tables])
            if "csv" in formats and energy:
                with atomic_write(Path(output) / "energy.csv", "w") as handle:
                    write_rows(handle, ("run", *ENERGY_HEADER), ((caption, *row) for caption, points in energy
                                                                 for row in energy_table(points)))
        print(f"{len(figures)} figures: {output}")


def _argument_faults(formats: Sequence[str], window: float | None) -> Iterator[str]:
    yield from (f"--format: {name!r} is not known; it must be one of {', '.join(FORMATS)}; correct it"
                for name in formats if name not in FORMATS)
    if window is not None and not window > 0:
        yield f"--window: {window}; it must be a number of tokens above 0; leave it out for a fiftieth of the run"


def _title(runs: Sequence[Run]) -> str:
    return f"Training report: {', '.join(run.name for run in runs)}"


def _records(runs: Sequence[Run], files: Iterable[str | os.PathLike[str]]) -> Iterator[ScoreRecord]:
    """Read the scores of all runs that have some, and those of the files that were named."""
    own = [run.folder / SCORES for run in runs if (run.folder / SCORES).is_file()]
    for path in dict.fromkeys([*own, *map(Path, files)]):
        yield from read_records(path)


def _energy(runs: Sequence[Run]) -> tuple[list[str], list[tuple[str, list[Point]]]]:
    """Return what is to be said of each held-out loss, and its points: the paper's Table 6 for this run."""
    said, energy = [], []
    for run in runs:
        for prefix in run.measured("loss"):
            points = points_of(run, prefix)
            if not points:
                continue
            said += [f"{run.name}, {prefix}: {sentence}" for sentence in sentences(saturation(points))]
            source = f" (energy: {run.energy_source})" if run.energy_source else ""
            energy.append((f"{run.name}, {prefix}{source}", points))
    return said, energy


def _write(folder: Path, figures: Sequence[Figure], formats: Sequence[str], page: list[Any]) -> None:
    title, paragraphs, tables = page
    drawn = {figure.name: plots.svg(figure) for figure in figures} if {"html", "svg"} & set(formats) else {}
    with console.progress("drawing", len(figures), "figures") as report:
        for number, figure in enumerate(figures, 1):
            if "csv" in formats:
                with atomic_write(folder / f"{figure.name}.csv", "w") as handle:
                    write_rows(handle, TABLE_HEADER, figure.table())
            for form, content in (("png", plots.png), ("svg", lambda figure: drawn[figure.name])):
                if form in formats:
                    with atomic_write(folder / f"{figure.name}.{form}") as handle:
                        handle.write(content(figure))
            report(number)
    if "html" in formats:
        write_text(folder / "report.html", html.page(title, paragraphs, tables, [(one, drawn[one.name]) for one in figures]))


def write_rows(handle: IO[str], header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write rows as CSV: floats with all their digits, nothing as an empty cell."""
    writer = csv.writer(handle, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
