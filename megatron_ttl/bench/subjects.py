"""From the arguments of `tools/bench.py` to what it prints."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_ttl.bench.figures import headings, shown_row
from megatron_ttl.console import print_result, print_table

_GRID_COLUMNS = ("row", "status", "tokens_per_s", "training_speed_up", "evaluation_speed_up", "mfu", "peak_memory_bytes",
                 "loss_difference", "reason")


def measure_and_print(arguments: argparse.Namespace) -> None:
    """Measure the subject that the command line names, and print its result.

    Raises:
        UserError: what the subject is given is wrong.
    """
    result = {"step": _step, "kernels": _kernels, "generate": _generate, "grid": _grid, "preprocess": _preprocess,
              "data": _data, "loader": _data, "evaluate": _evaluate, "report": _report}[arguments.subject](arguments)
    rows = result.get("rows")
    if arguments.json or rows is None:
        print_result(result, arguments.json)
        return
    print_result({key: value for key, value in result.items() if key != "rows"}, False)
    _print_rows(_grid_rows(rows) if arguments.subject == "grid" else rows)


def _print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    print_table(headings(rows[0]), [shown_row(row, list(rows[0])) for row in rows])


def _grid_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    from megatron_ttl.bench.grid_cells import Cell, cell_of

    plain = Cell()
    return [{name: cell_of(row["cell"]).difference(plain) if name == "row" else row.get(name) for name in _GRID_COLUMNS}
            for row in rows]


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"config": arguments.config, "deepspeed_config": arguments.deepspeed_config, "overrides": arguments.overrides,
            "micro_batch": arguments.micro_batch, "data": arguments.data}


def _step(arguments: argparse.Namespace) -> dict[str, Any]:
    from megatron_ttl.bench.step import bench_step

    return bench_step(**_run(arguments), peers=arguments.peer, steps=arguments.steps, rounds=arguments.rounds,
                      warm_up=arguments.warm_up)


def _kernels(arguments: argparse.Namespace) -> dict[str, Any]:
    from megatron_ttl.bench.kernels import bench_kernels

    return bench_kernels(arguments.op, arguments.tokens, arguments.widths, arguments.path, arguments.repeats)


def _generate(arguments: argparse.Namespace) -> dict[str, Any]:
    from megatron_ttl.bench.generate import bench_generate

    return bench_generate(arguments.model, arguments.batch, arguments.new_tokens, arguments.repeats)


def _grid(arguments: argparse.Namespace) -> dict[str, Any]:
    from megatron_ttl.bench.grid import explore

    return explore(arguments.output, **_run(arguments), axes=arguments.axes, steps=arguments.steps,
                   warm_up=arguments.warm_up, tolerance=arguments.tolerance)


def _preprocess(arguments: argparse.Namespace) -> dict[str, Any]:
    from megatron_ttl.data.bench_preprocess import bench_preprocess

    return bench_preprocess(arguments.input, arguments.tokenizer, arguments.text_key, arguments.workers, arguments.max_mb,
                            arguments.repeats)


def _data(arguments: argparse.Namespace) -> dict[str, Any]:
    from megatron_ttl.data.bench_loader import measure_loader

    return measure_loader(arguments.prefix, arguments.sequence_length, arguments.samples_per_step, arguments.tokens_per_s,
                          arguments.steps, arguments.preload)


def _evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    from megatron_ttl.evaluate.bench_scoring import bench_scoring

    return bench_scoring(arguments.model, arguments.questions, arguments.batch, arguments.repeats)


def _report(arguments: argparse.Namespace) -> dict[str, Any]:
    from megatron_ttl.bench.report import collect

    return collect(arguments.folder)
