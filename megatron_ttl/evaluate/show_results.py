"""Show what an evaluation found: tables for people, one JSON object for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_ttl.console import print_result, print_table
from megatron_ttl.evaluate.evaluate_tasks import Scores
from megatron_ttl.evaluate.packs import ListedTask
from megatron_ttl.evaluate.records import ScoreRecord


def show_scores(scores: Scores, as_json: bool) -> None:
    """Print scores in the order in which they were asked for, and where they are kept."""
    if as_json:
        print_result({"scores": str(scores.path), "known": scores.known, "faults": scores.faults,
                      "records": [record.model_dump(mode="json") for record in scores.records]}, as_json=True)
        return
    if scores.records:
        records = scores.records
        wanted = [("step", len({record.model.step for record in records}) > 1), ("task", True), ("version", True),
                  ("shots", True), ("metric", True), ("score", True), ("n", True), ("without a model", True),
                  ("truncated", any(record.truncated for record in records)),
                  ("contaminated", any(record.contaminated is not None for record in records)),
                  ("data", any(record.sample or record.limit for record in records))]
        columns = [name for name, shown in wanted if shown]
        rows = [[_cells(record)[name] for name in columns] for record in records]
        print_table(columns, rows, title=records[0].model.name)
    before = f"; {scores.known} of them were there before (--again scores them again)" if scores.known else ""
    print(f"{len(scores.records)} scores are in {scores.path}{before}")


def _cells(record: ScoreRecord) -> dict[str, Any]:
    error = "" if record.stderr is None else f" ± {_figure(record.stderr)}"
    data = [*(["sample"] if record.sample else []), *([f"first {record.limit}"] if record.limit else [])]
    return {"step": record.model.step, "task": record.task, "version": record.version, "shots": record.shots,
            "metric": record.metric, "score": f"{_figure(record.value)}{error}", "n": record.n,
            "without a model": ", ".join(f"{name} {value:.3f}" for name, value in record.baselines.items()) or "-",
            "truncated": record.truncated, "contaminated": record.contaminated, "data": ", ".join(data) or "all"}


def _figure(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.0f}"  # a perplexity


def show_listing(tasks: Sequence[ListedTask], data: Path, as_json: bool) -> None:
    """Print the tasks, their groups, and what their data lack."""
    if as_json:
        print_result({"data": str(data), "tasks": [asdict(task) for task in tasks]}, as_json=True)
        return
    rows = [[task.name, task.version, task.definition, task.language, task.shots, task.metric,
             "missing" if task.items is None else task.items, task.files + (" (sample)" if task.sample else "")]
            for task in tasks]
    print_table(("task", "version", "defined by", "language", "shots", "metric", "items", "data"), rows,
                title=f"tasks; data are looked for in {data}")
    groups = sorted({group for task in tasks for group in task.groups})
    for group in groups:
        print(f"group {group}: {', '.join(task.name for task in tasks if group in task.groups)}")
    lacking: dict[str, list[str]] = {}
    for task in tasks:
        lacking.setdefault(task.missing, []).append(task.name)
    for missing, names in lacking.items():
        if missing:
            print(f"missing for {', '.join(names)}: {missing}")


def show_perplexity(result: dict[str, Any], as_json: bool) -> None:
    """Print a report of `perplexity_report`."""
    if as_json:
        print_result(result, as_json=True)
        return
    columns = ("nats_per_token", "perplexity", "bits_per_byte", "tokens", "bytes", "windows", "complete")
    rows = result["prefixes"] + ([result["total"]] if len(result["prefixes"]) > 1 else [])
    header = ("dataset", *(column.replace("_", " ") for column in columns))
    cells = []
    for row in rows:
        cells.append([row["prefix"], *map(row.get, columns)])
        cells += [[f"  {source['source']}", *map(source.get, columns)] for source in row.get("sources", [])]
    print_table(header, cells, title=result["model"])
    print(f"windows of {result['context_tokens']} tokens, {result['windowing']}; {result['dtype']} on "
          f"{result['device']}, {result['tokens_per_s']:,.0f} tokens/s")
