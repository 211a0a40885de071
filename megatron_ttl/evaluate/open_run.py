"""Open any checkpoint of a run as a model that can be asked, without an export; and say which weights these are."""

from __future__ import annotations

import os
from dataclasses import dataclass

from megatron_ttl.checkpoint.hf_weights import build_from
from megatron_ttl.checkpoint.stored_run import open_run, require_weights
from megatron_ttl.console import print_warning
from megatron_ttl.evaluate.records import ScoredModel
from megatron_ttl.evaluate.scored_model import describe_checkpoint, describe_folder
from megatron_ttl.generate.open_folder import (
    OpenModel,
    adds_bos,
    choose_device,
    choose_dtype,
    load_tokenizer,
    open_model_folder,
)


@dataclass(frozen=True)
class ModelToScore:
    """A model, and what its scores say of it."""

    opened: OpenModel
    scored: ScoredModel


def checkpoint_steps(run: str | os.PathLike[str]) -> list[int]:
    """Return the steps that have a checkpoint, ascending; whether they are whole shows when they are opened.

    Raises:
        CheckpointError: it is no run folder.
    """
    return open_run(run).store.steps()


def open_checkpoint_model(run: str | os.PathLike[str], step: int | None = None, device: str = "auto",
                          dtype: str = "float32") -> OpenModel:
    """Open a checkpoint of a run; see `open_checkpoint`."""
    return open_checkpoint(run, step, device, dtype).opened


def open_checkpoint(run: str | os.PathLike[str], step: int | None = None, device: str = "auto",
                    dtype: str = "float32") -> ModelToScore:
    """Open a checkpoint of a run, whatever layout wrote it: the model is the one that an export would give.

    Args:
        run: the run folder.
        step: which checkpoint; None: the newest one that is whole.
        device: `auto`, `cpu`, `cuda`, `cuda:1` ...
        dtype: `float32` or `bfloat16`.

    Raises:
        CheckpointError: it is no run folder, or the checkpoint is missing, damaged or of another model.
        UserError: the device, the dtype or the tokenizer is missing or wrong.
    """
    torch_dtype, where = choose_dtype(dtype), choose_device(device)
    stored = open_run(run)
    tokenizer = load_tokenizer(stored.tokenizer_directory, stored.config)
    checkpoint = stored.checkpoint(step)
    for warning in stored.store.warnings:
        print_warning(warning)
    require_weights(checkpoint, stored.config)
    bos = checkpoint.record.get("bos")
    add_bos = adds_bos(stored.tokenizer_directory) if bos is None else bool(bos)
    weights = checkpoint.tensors("weights")
    model = build_from(lambda name: weights[name], stored.config, where, torch_dtype).eval()
    opened = OpenModel(stored.directory, model, stored.config, tokenizer, add_bos, where, dtype)
    return ModelToScore(opened, describe_checkpoint(stored, checkpoint, weights))


def open_folder(path: str | os.PathLike[str], device: str = "auto", dtype: str = "float32") -> ModelToScore:
    """Open a model folder; arguments and errors as for `open_model_folder`."""
    opened = open_model_folder(path, device, dtype)
    return ModelToScore(opened, describe_folder(opened.directory, opened.config))
