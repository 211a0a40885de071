"""Forecast a run from its settings: sizes, lengths, operations, hours. Reads small files only; no torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ttl.config.changes import Change
from megatron_ttl.config.checks import accumulation
from megatron_ttl.config.degrees import data_parallel_size_of
from megatron_ttl.config.engine import engine_words
from megatron_ttl.config.load import Settings, read_settings
from megatron_ttl.config.schema import EnergyConfig, RunFile
from megatron_ttl.console import print_result, print_table
from megatron_ttl.data.causal_lm_dataset import CausalLMDataset
from megatron_ttl.errors import ConfigError, collected, raise_faults
from megatron_ttl.files import human_bytes, require_free_space
from megatron_ttl.model.flops import (
    BYTES_PER_PARAMETER,
    count_parameters,
    embedding_parameters,
    flops_per_token,
)
from megatron_ttl.plan.layout_picture import describe_layout, print_layout
from megatron_ttl.plan.memory_report import describe_memory, print_memory
from megatron_ttl.train.changed_settings import CHANGE_HEADER, changes_for_a_dry_run
from megatron_ttl.train.device_peaks import peak_flops_per_s
from megatron_ttl.train.ledger import MAX_USEFUL_EPOCHS, planned_table
from megatron_ttl.train.open_data import open_data
from megatron_ttl.train.open_signals import open_signals
from megatron_ttl.train.schedule import Schedule

ASSUMED_MFU = 0.40
_NEEDED_TO_OPEN_DATA = ("data.sources", "data.stages", "data.packing", "data.document_mask", "train.sequence_length",
                        "model.vocab_size", "run.seed", "evaluation.prefixes", "evaluation.max_tokens")
_NEEDED_TO_OPEN_SIGNALS = ("model.max_position_embeddings", "evaluation.samples", "evaluation.sample_tokens",
                           "evaluation.tasks", "evaluation.task_items")

BOARD_POWER_W = {"A100": 400, "H100": 700, "H200": 700}
"""Largest power of the SXM board, without the host.

Source: NVIDIA data sheets.
"""


def forecast(settings: Settings, world_size: int, dataset: CausalLMDataset | None = None) -> dict[str, Any]:
    """Return what the run will take on so many processes.

    Args:
        settings: from `load_settings`.
        world_size: number of processes.
        dataset: the run's; without it nobody knows how often its sources will be read.

    Raises:
        ConfigError: the degrees do not divide the processes, or micro batches the step.
    """
    run, model = settings.run, settings.run.model
    data_parallel_size = data_parallel_size_of(settings, world_size)
    schedule = Schedule.of(run)
    sequence, tokens = run.train.sequence_length, run.total_steps * run.train.tokens_per_step
    parameters = count_parameters(model)
    result: dict[str, Any] = {
        "parameters": parameters,
        "non_embedding_parameters": parameters - 2 * embedding_parameters(model),
        "precision": settings.profile.precision,
        "engine": engine_words(settings.profile, world_size, True if settings.device else None),
        "zero_stage": settings.profile.zero_optimization.stage,
        "data_parallel_size": data_parallel_size,
        "micro_batch_samples": settings.profile.train_micro_batch_size_per_gpu,
        "accumulation": accumulation(settings, data_parallel_size),
        "samples_per_step": run.samples_per_step,
        "tokens_per_step": run.train.tokens_per_step,
        "steps": run.total_steps,
        "warmup_steps": run.warmup_steps,
        "decay_steps": run.decay_steps,
        "samples": run.total_steps * run.samples_per_step,
        "tokens": tokens,
        "tokens_per_parameter": tokens / parameters,
        "lr_first": schedule.at(1),
        "lr_peak": run.optimizer.lr,
        "lr_last": schedule.at(run.total_steps),
        "flops_per_token_c": flops_per_token(model, sequence, "C"),
        "flops_per_token_nc": flops_per_token(model, sequence, "NC"),
        "flops": tokens * flops_per_token(model, sequence, "C"),
        "checkpoint_bytes": BYTES_PER_PARAMETER * parameters,
        "checkpoints_at_once_bytes": _checkpoints_at_once(run) * BYTES_PER_PARAMETER * parameters,
    }
    result |= _duration(settings.device, result["flops"], world_size)
    result["mixture"] = planned_table(run, dataset.samples_per_epoch if dataset else None)
    result["epochs"] = {prefix: row["epochs"] for prefix, row in result["mixture"]["sources"].items()
                        if row["epochs"] is not None}
    result["peak_memory"] = describe_memory(settings, world_size)
    result["layout"] = describe_layout(settings, world_size)
    return result


def _checkpoints_at_once(run: RunFile) -> int:
    """Count the checkpoints that lie on the disk at the end, and the one being written."""
    keep, total = run.checkpoint, run.total_steps
    for_good = total // keep.keep_every_steps if keep.keep_every_steps else 0
    return min(total // keep.every_steps + 1, for_good + keep.keep_last) + 1


def _duration(device: str | None, flops: float, world_size: int) -> dict[str, Any]:
    peak = peak_flops_per_s(device) if device is not None else None
    if device is None or peak is None:
        return {}
    hours = flops / (peak * ASSUMED_MFU * world_size) / 3600
    result: dict[str, Any] = {"device": device, "hours_at_40_percent_mfu": hours}
    power = next((watts for name, watts in BOARD_POWER_W.items() if name in device), None)
    if power is not None:
        result["kwh_of_the_boards"] = hours * world_size * power / 1000
    return result


def dry_run(deepspeed_config: str | os.PathLike[str], run_config: str | os.PathLike[str],
            overrides: Sequence[str], world_size: int, allow_changes: Sequence[str] = (),
            skip_steps: Sequence[str] = ()) -> dict[str, Any]:
    """Check everything that can be checked without a device, and return the forecast.

    Raises:
        ConfigError: with every fault of both files, the overrides, the data, the disk and of what a run that is
            there already would have to change.
    """
    reading = read_settings(deepspeed_config, run_config, overrides, world_size, allow_changes, skip_steps)
    faults = list(reading.faults)
    run = reading.settings.run
    if any(": energy" in fault for fault in faults):
        # Said already; it must neither be said again nor hide what is wrong with the data.
        run = run.model_copy(update={"energy": EnergyConfig(enabled=False)})
    dataset: CausalLMDataset | None = None
    if reading.wrong.isdisjoint(_NEEDED_TO_OPEN_DATA):
        with collected(faults):
            dataset, _ = open_data(run)
            if reading.wrong.isdisjoint(_NEEDED_TO_OPEN_SIGNALS):
                open_signals(run, dataset)
    changes: list[Change] = []
    if not reading.faults:
        changes, more = changes_for_a_dry_run(reading.settings)
        faults += more
    raise_faults(ConfigError, faults)
    result = forecast(reading.settings, world_size, dataset)
    if dataset is not None:
        result |= dataset.packing_report()
    if changes:
        result["changes"] = [dict(zip(CHANGE_HEADER, change.row, strict=True)) for change in changes]
    require_free_space(Path(run.run.dir), result["checkpoints_at_once_bytes"], "all checkpoints of the run")
    return result


def print_forecast(result: dict[str, Any], as_json: bool) -> None:
    """Print a forecast for people or for programs."""
    if not as_json:
        result = dict(result)
        picture, mixture, memory = (result.pop(key) for key in ("layout", "mixture", "peak_memory"))
        result["peak_memory"] = human_bytes(memory["bytes"])
        if changes := result.pop("changes", None):
            print_table(CHANGE_HEADER, [row.values() for row in changes],
                        title="changed since the run was last started")
        for key in ("checkpoint_bytes", "checkpoints_at_once_bytes"):
            result[key.replace("_bytes", "")] = human_bytes(result.pop(key))
        for key in ("lr_first", "lr_peak", "lr_last", "flops", "flops_per_token_c", "flops_per_token_nc"):
            result[key] = f"{result[key]:.3e}"
        for prefix, epochs in result.pop("epochs").items():
            warning = f", more than {MAX_USEFUL_EPOCHS} repeat the data too often"
            result[f"epochs of {prefix}"] = f"{epochs:.2f}{warning if epochs > MAX_USEFUL_EPOCHS else ''}"
    print_result(result, as_json, title="what this run will take")
    if not as_json:
        _print_mixture(mixture)
        print_layout(picture)
        print_memory(memory)


def _print_mixture(mixture: dict[str, Any]) -> None:
    """Print stages and sources, where there is more than one of either."""
    rows = [(number, f"{stage['from_token']:,}", prefix, f"{row['asked_share']:.2%}", f"{row['tokens']:,}",
             "-" if row["epochs"] is None else f"{row['epochs']:.2f}",
             f"{stage['within_a_thousandth_after_tokens']:,}" if len(stage["sources"]) > 1 else "0")
            for number, stage in enumerate(mixture["stages"], 1) for prefix, row in stage["sources"].items()]
    if len(rows) > 1:
        print_table(("stage", "from token", "source", "share", "tokens", "epochs", "within 0.1 % after tokens"), rows,
                    title="what it will draw")
