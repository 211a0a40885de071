"""Copy a tokenizer folder: the files that belong to one, each looked into, and nothing else.

A folder may come from a stranger, and its copy travels: into data, runs and exports. A link in it could bring a
private file along, and a setting could name code that Hugging Face's loader would run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_ttl.errors import DataError, collected, raise_faults
from megatron_ttl.files import read_regular

MODEL = "tokenizer.model"
MAX_MODEL_BYTES = 16 << 20
"""Of a tokenizer.model; 256,000 pieces have 4 MB."""
HF_SPECIALS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
HF_FILES = (MODEL, "tokenizer_config.json", "special_tokens_map.json")
_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")
# What may stand in tokenizer_config.json: plain values that name nothing to load.
_SETTINGS = {*HF_SPECIALS, "tokenizer_class", "legacy", "add_prefix_space", "add_bos_token", "add_eos_token",
             "padding_side", "clean_up_tokenization_spaces", "model_max_length", "use_default_system_prompt",
             "spaces_between_special_tokens"}
_MAX_JSON_BYTES = 1 << 20
_CURE = "use a folder that tools/train_tokenizer.py wrote"


def copy_tokenizer(source: str | os.PathLike[str], target: Path, needed: Iterable[str] = (MODEL,),
                   names: Iterable[str] = (*HF_FILES, "training.json")) -> None:
    """Copy the files of a tokenizer folder into the folder `target`, which is there.

    Args:
        source: the folder; its files may be links, as in Hugging Face's cache, for what they hold is looked into.
        target: where the copies go; they are plain files.
        needed: files that must be there.
        names: files that are copied where they are there; others are left behind.

    Raises:
        DataError: a file is missing, cannot be read, or is not what its name says; with all faults.
        OSError: the copy cannot be written.
    """
    contents, faults = {}, []
    for name in names:
        path = Path(source, name)
        if name in needed or os.path.lexists(path):
            with collected(faults, DataError):
                contents[name] = _checked(path)
    raise_faults(DataError, faults)
    for name, payload in contents.items():
        (target / name).write_bytes(payload)


def read_model(path: Path) -> bytes:
    """Return the bytes of a tokenizer.model, bounded.

    Raises:
        DataError: it cannot be read.
    """
    return _read(path, MAX_MODEL_BYTES)


def _read(path: Path, limit_bytes: int) -> bytes:
    try:
        return read_regular(path, limit_bytes)
    except FileNotFoundError:
        raise DataError(f"{path}: is missing; a tokenizer folder has it, for Hugging Face; {_CURE}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); it must be readable; {_CURE}") from None


def _checked(path: Path) -> bytes:
    if path.name == MODEL:
        return read_model(path)  # SentencePiece has read it, or will
    payload = _read(path, _MAX_JSON_BYTES)
    try:
        value = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not JSON ({error}); it must be a JSON object; {_CURE}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: holds {type(value).__name__}; it must be a JSON object; {_CURE}")
    faults = {"tokenizer_config.json": _setting_faults, "special_tokens_map.json": _special_faults,
              "training.json": _record_faults}[path.name](value)
    raise_faults(DataError, (f"{path}: {fault}; {_CURE}, or remove it" for fault in faults))
    return payload


def _setting_faults(value: dict[str, Any]) -> Iterator[str]:
    if "auto_map" in value:
        yield "'auto_map' names code to load; a tokenizer must need none"
    for key in sorted(value.keys() - _SETTINGS - {"auto_map"}):
        yield f"{key[:80]!r} is no setting that we know; every one must be known, for it could name something to load"
    for key in sorted(value.keys() & _SETTINGS):
        if not isinstance(value[key], str | int | float | None):
            yield f"{key}: {type(value[key]).__name__}; it must be a plain value"
    if value.get("tokenizer_class", _CLASSES[0]) not in _CLASSES:
        yield f"tokenizer_class: {str(value['tokenizer_class'])[:80]!r}; it must be {' or '.join(_CLASSES)}"


def _special_faults(value: dict[str, Any]) -> Iterator[str]:
    if any(key not in HF_SPECIALS or not isinstance(text, str) for key, text in value.items()):
        yield f"must name {', '.join(HF_SPECIALS)}, each with its text, and nothing else"


def _record_faults(value: dict[str, Any]) -> Iterator[str]:
    if value.get("format") != "megatron_ttl tokenizer":
        yield "is no record of a training; its 'format' must be 'megatron_ttl tokenizer'"
