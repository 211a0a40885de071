"""Write a checkpoint as a Hugging Face model folder, proven to be the same model; read such folders."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ttl.checkpoint.bounded_json import read_json_object
from megatron_ttl.checkpoint.hf_config import hf_config, read_hf_config
from megatron_ttl.checkpoint.hf_weights import build_from, find_weights, load_weights, write_weights
from megatron_ttl.checkpoint.names import hf_shapes
from megatron_ttl.checkpoint.store import Checkpoint
from megatron_ttl.checkpoint.stored_run import open_run, require_weights
from megatron_ttl.config.schema import ModelConfig
from megatron_ttl.console import progress
from megatron_ttl.errors import CheckpointError, ConfigError, DiskError, raise_faults
from megatron_ttl.files import atomic_directory, human_bytes, require_free_space
from megatron_ttl.runtime import environment_report
from megatron_ttl.tokenizer.folder import HF_FILES, copy_tokenizer
from megatron_ttl.tokenizer.tokenizer import Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LOGIT_TOLERANCE = 1e-4
"""Largest difference between our fp32 logits and transformers' that an export may show."""
PROVENANCE = "megatron_ttl.json"
_PROBE = "Era uma vez, em 1997, uma cafeteira que só falava português: «ção», naïve, 日本 🙂\n  fim."


def load_model_folder(path: str | os.PathLike[str], device: torch.device | str = "cpu",
                      dtype: torch.dtype = torch.float32) -> tuple[nn.Sequential, ModelConfig]:
    """Read a Llama-2 model folder: config.json and safetensors, nothing that could run code.

    Raises:
        CheckpointError: something is missing, damaged, or means another model than ours; with all faults.
    """
    folder = Path(path)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise CheckpointError(f"{folder}: {what}; it must be a model folder; make one with "
                              "tools/convert_to_hf.py")
    config = read_hf_config(folder / "config.json")
    return load_weights(find_weights(folder, config), config, device, dtype), config


def export_run(run: str | os.PathLike[str], output: str | os.PathLike[str], step: int | None = None,
               **options: Any) -> dict[str, Any]:
    """Export a checkpoint of a run folder, the newest valid one or that of a step; see `export_model_folder`.

    Raises:
        CheckpointError: it is no run folder, or has no such valid checkpoint.
    """
    opened = open_run(run)
    result = export_model_folder(opened.checkpoint(step), opened.config, opened.tokenizer_directory, output,
                                 run_name=opened.name, **options)
    return {"run": str(opened.directory), **result, "warnings": opened.store.warnings}


def export_model_folder(
    checkpoint: Checkpoint, config: ModelConfig, tokenizer_dir: str | os.PathLike[str],
    output: str | os.PathLike[str], dtype: str = "float32", *, run_name: str = "", verify: bool = True,
    overwrite: bool = False, max_shard_bytes: int = 5_000_000_000,
) -> dict[str, Any]:
    """Write a Hugging Face model folder; it gets its name when it is complete and proven.

    The vocabulary keeps all rows of the model, also those beyond the tokenizer's pieces.

    Args:
        checkpoint: of a training run; its group "weights" is exported.
        config: the model's shape.
        tokenizer_dir: the tokenizer that the data was made with; copied into the folder.
        output: the folder; must not exist or be empty, unless `overwrite`.
        dtype: "float32" is exact; "bfloat16" halves the files and rounds the weights.
        run_name: for the folder's own record of where it comes from.
        verify: load the folder with transformers and compare logits and tokens before it gets its name.
        overwrite: replace a model folder that is there.
        max_shard_bytes: weights larger than this become several files.

    Returns:
        What was written, flat.

    Raises:
        ConfigError: the output is there already, or the dtype is unknown.
        CheckpointError: weights, config and tokenizer do not fit together, or transformers disagrees.
        DiskError: the disk cannot take it.
    """
    output = Path(output)
    raise_faults(ConfigError, _option_faults(output, dtype, overwrite))
    require_weights(checkpoint, config)
    tokenizer = Tokenizer.load(tokenizer_dir)
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(f"{tokenizer_dir}: has {tokenizer.vocab_size} pieces, the model "
                              f"{config.vocab_size} rows; every piece must have a row; use the tokenizer of "
                              "the run")
    parameters = sum(math.prod(shape) for shape in hf_shapes(config).values())
    size = parameters * DTYPES[dtype].itemsize
    require_free_space(output, size + (1 << 20), "the model folder")
    weights = checkpoint.tensors("weights")
    try:
        with atomic_directory(output) as folder:
            with progress("writing weights", size, "B") as report:
                write_weights(folder, weights, config, DTYPES[dtype], max_shard_bytes, report)
            _write_json(folder / "config.json", hf_config(config, tokenizer, dtype))
            _write_json(folder / "generation_config.json", {
                "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id,
                "pad_token_id": tokenizer.pad_id})
            _copy_tokenizer(tokenizer.directory, folder, checkpoint.record.get("bos"))
            proof: dict[str, Any] = {"verified": "no: not asked"}
            if verify:
                proof = _verify(folder, weights, config, DTYPES[dtype], tokenizer)
            origin = _provenance(folder, checkpoint, run_name, dtype, tokenizer, proof)
            _write_json(folder / PROVENANCE, origin)
    except OSError as error:
        raise DiskError(f"{error.filename or output}: the model folder could not be written "
                        f"({error.strerror or error}); it needs {human_bytes(size)}; free some space or "
                        "choose another folder") from error
    return {"output": str(output), "step": checkpoint.step, "parameters": parameters, "dtype": dtype, **proof}


def _option_faults(output: Path, dtype: str, overwrite: bool) -> list[str]:
    faults = []
    if dtype not in DTYPES:
        faults.append(f"--dtype: {dtype!r}; it must be one of {', '.join(DTYPES)}; float32 is exact")
    if output.exists() and not output.is_dir():
        faults.append(f"{output}: is a file; the output must be a folder; choose another name")
    elif output.is_dir() and any(output.iterdir()):
        if not overwrite:
            faults.append(f"{output}: exists and is not empty; a model is not overwritten unasked; choose "
                          "another name, or give --overwrite")
        elif not (output / "config.json").exists():
            faults.append(f"{output}: is not empty and no model folder (it has no config.json); only a model "
                          "folder is overwritten; choose another name")
    return faults


def _copy_tokenizer(source: Path, folder: Path, bos: bool | None) -> None:
    """Copy Hugging Face's files; whether a prompt begins with BOS follows from the training data."""
    copy_tokenizer(source, folder, HF_FILES, HF_FILES)
    settings = read_json_object(folder / "tokenizer_config.json")
    if bos is not None:
        _write_json(folder / "tokenizer_config.json", {**settings, "add_bos_token": bos})


def _provenance(folder: Path, checkpoint: Checkpoint, run_name: str, dtype: str, tokenizer: Tokenizer,
                proof: Mapping[str, Any]) -> dict[str, Any]:
    """Return where the folder comes from, and sha256 of its files: it will travel."""
    files = {}
    for path in sorted(folder.iterdir()):
        with open(path, "rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
        files[path.name] = {"bytes": path.stat().st_size, "sha256": digest}
    record = checkpoint.record
    return {"format": "megatron_ttl model", "version": 1, "run": run_name, "step": checkpoint.step,
            "consumed_tokens": record.get("consumed_tokens"), "energy": record.get("energy"), "dtype": dtype,
            "tokenizer_checksum": tokenizer.checksum, "verification": dict(proof), "files": files,
            "trained_with": record.get("versions"), "converted_with": environment_report()}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def _verify(folder: Path, weights: Mapping[str, Tensor], config: ModelConfig, dtype: torch.dtype,
            tokenizer: Tokenizer) -> dict[str, Any]:
    """Load the folder as its users will, and compare it in fp32 with our model of the checkpoint's weights.

    Raises:
        CheckpointError: logits or tokens differ.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        return {"verified": f"no: transformers cannot be imported ({error})"}
    showed_progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True,
                                                      local_files_only=True).eval()
        their_tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    finally:
        if showed_progress:
            logging.enable_progress_bar()
    ours = build_from(lambda name: weights[name].to(dtype), config).eval()
    ids = torch.randint(config.vocab_size, (2, min(64, config.max_position_embeddings)),
                        generator=torch.Generator().manual_seed(0))  # [b, s]
    with torch.no_grad():
        difference = (ours(ids) - theirs(ids).logits).abs().max().item()
    cure = "do not use this model; the versions of torch and transformers must be those of constraints.txt"
    if not difference <= LOGIT_TOLERANCE:
        raise CheckpointError(f"{folder.name}: transformers computes other logits, by up to "
                              f"{difference:.3g}; the difference must be at most {LOGIT_TOLERANCE:g}; {cure}")
    if their_tokenizer.encode(_PROBE, add_special_tokens=False) != tokenizer.encode(_PROBE):
        raise CheckpointError(f"{folder.name}: transformers reads other tokens than sentencepiece; they must "
                              f"be the same; {cure}")
    return {"verified": "yes", "largest_logit_difference": difference}
