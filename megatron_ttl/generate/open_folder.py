"""Open a model folder for use: weights on a device, and the tokenizer that belongs to them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from megatron_ttl.checkpoint.bounded_json import read_json_object
from megatron_ttl.checkpoint.hf import DTYPES, load_model_folder
from megatron_ttl.config.schema import ModelConfig
from megatron_ttl.errors import CheckpointError, UserError
from megatron_ttl.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class OpenModel:
    """A model ready to be asked."""

    directory: Path
    model: nn.Sequential
    config: ModelConfig
    tokenizer: Tokenizer
    add_bos: bool
    """Whether a prompt begins with BOS, as the folder's tokenizer_config.json says."""
    device: torch.device
    dtype: str


def choose_device(name: str = "auto") -> torch.device:
    """Return the device for a name of torch's; `auto` is cuda where there is one, cpu otherwise.

    Raises:
        UserError: no such device here.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if gpus else "cpu")
    here = ["cpu", *(["cuda"] if gpus else []), *(f"cuda:{number}" for number in range(gpus))]
    if name not in here:
        raise UserError(f"device: {name!r}; this machine has: {', '.join(here)}; choose one of them, or auto")
    return torch.device(name)


def choose_dtype(name: str) -> torch.dtype:
    """Return the dtype that a model is opened in.

    Raises:
        UserError: no such dtype.
    """
    if name not in DTYPES:
        raise UserError(f"dtype: {name!r}; it must be one of {', '.join(DTYPES)}; take float32 for exact "
                        "figures, bfloat16 for half the memory")
    return DTYPES[name]


def open_model_folder(path: str | os.PathLike[str], device: str = "auto",
                      dtype: str = "float32") -> OpenModel:
    """Load a model folder and its tokenizer, and check that they fit together.

    Args:
        path: folder with config.json, weights and tokenizer, as `tools/convert_to_hf.py` writes it.
        device: `auto`, `cpu`, `cuda`, `cuda:1` ...
        dtype: `float32` or `bfloat16`.

    Raises:
        UserError: the device, the folder or a file in it is missing or wrong.
    """
    directory, where, torch_dtype = Path(path), choose_device(device), choose_dtype(dtype)
    model, config = load_model_folder(directory, where, torch_dtype)
    tokenizer = load_tokenizer(directory, config)
    return OpenModel(directory, model.eval(), config, tokenizer, adds_bos(directory), where, dtype)


def load_tokenizer(directory: Path, config: ModelConfig) -> Tokenizer:
    """Load the tokenizer of a folder, and check that the model has a row for every piece.

    Raises:
        UserError: the folder or a file in it is missing or wrong, or the model is too small for it.
    """
    tokenizer = Tokenizer.load(directory)
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(f"{directory}: the tokenizer has {tokenizer.vocab_size} pieces, the model "
                              f"{config.vocab_size} rows; the model must have a row for every piece; put the "
                              "tokenizer of this model beside it")
    return tokenizer


def adds_bos(directory: Path) -> bool:
    """Read `add_bos_token` of tokenizer_config.json; left out, it is true, as in Hugging Face's Llama.

    Raises:
        CheckpointError: it is neither true nor false.
    """
    path = directory / "tokenizer_config.json"
    policy = read_json_object(path, follow_links=True).get("add_bos_token", True)
    if not isinstance(policy, bool):
        raise CheckpointError(f"{path}: add_bos_token: {policy!r}; it must be true or false; convert the "
                              "checkpoint again with tools/convert_to_hf.py")
    return policy
