"""The `<prefix>.json` beside `<prefix>.bin` and `<prefix>.idx`: what the tokens are and how they came to be.

Megatron's format has no place for the tokenizer, the EOS policy or a checksum; this file is that place.
Megatron does not read it, and a dataset without it (written by another program) opens as foreign data.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_ttl.errors import DataError, closest, raise_faults
from megatron_ttl.files import read_regular

VERSION = 1
_LARGEST_BYTES = 4 << 20  # a manifest is some KB, 100 bytes per input file
_MOST_FAULTS = 100  # a hostile manifest can have a million, a kilobyte each


class DatasetPaths(NamedTuple):
    """Files that belong to one prefix."""

    bin: Path
    idx: Path
    manifest: Path
    tokenizer: Path


def dataset_paths(prefix: str | os.PathLike[str]) -> DatasetPaths:
    """Return the files of `prefix`; a dot inside the prefix is part of its name."""
    suffixes = (".bin", ".idx", ".json", ".tokenizer")
    return DatasetPaths(*(Path(os.fspath(prefix) + suffix) for suffix in suffixes))


def require_files(prefix: str | os.PathLike[str]) -> None:
    """Refuse a prefix without both of its files, and say what was probably meant.

    Raises:
        DataError: `.bin` or `.idx` is not there, or is no file.
    """
    prefix, paths = os.fspath(prefix), dataset_paths(prefix)
    missing = [path for path in (paths.bin, paths.idx) if not path.is_file()]
    if not missing:
        return
    if strange := [path for path in missing if path.exists() or path.is_symlink()]:
        raise DataError(*(f"{path}: is {'a folder' if path.is_dir() else 'no regular file, or a link to none'}; a dataset "
                          "has two files, .bin and .idx; put the file in its place" for path in strange))
    stem, _, suffix = prefix.rpartition(".")
    if suffix in ("bin", "idx", "json") and dataset_paths(stem).bin.is_file():
        raise DataError(f"{prefix}: is one file of a dataset; a prefix has no suffix; write {stem}")
    folder = paths.bin.parent
    known = [path.name.removesuffix(".idx") for path in folder.glob("*.idx")] if folder.is_dir() else []
    hint = closest(paths.idx.name.removesuffix(".idx"), known)
    cure = "correct the prefix, or write the dataset with tools/preprocess_data.py"
    cure = f"{cure}; {hint}" if hint else cure
    raise DataError(*(f"{path}: does not exist; a dataset has .bin and .idx; {cure}" for path in missing))


class Part(BaseModel):
    """One object of the manifest."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", use_attribute_docstrings=True,
                              allow_inf_nan=False)


class TokenizerRecord(Part):
    """The tokenizer that made the ids."""

    directory: str = Field(max_length=255, pattern=r"^[^/\\\x00-\x1f]*[^/\\\x00-\x1f.][^/\\\x00-\x1f]*$")
    """Name of a copy of the tokenizer folder, beside the manifest and nowhere else."""
    checksum: str = Field(min_length=1)
    """Checksum of the tokenizer, as `Tokenizer.checksum` gives it."""
    vocab_size: int = Field(gt=0, lt=2**31)
    """Every id is below it."""
    eos_id: int = Field(ge=0)
    """The id that ends a document."""
    bos_id: int = Field(ge=0)
    """The id that may begin one."""


class FileRecord(Part):
    """Size and checksum of one file."""

    bytes: int = Field(ge=0)
    """Its length."""
    checksum: str = Field(pattern="^xxh3:[0-9a-f]{32}$")
    """xxh3-128 of its content."""


class SourceRecord(Part):
    """One file of documents."""

    file: str
    """Name of the file."""
    documents: int = Field(ge=0)
    """Documents of it that are in this dataset."""


class HeldOutRecord(Part):
    """How documents were kept apart for evaluation."""

    fraction: float = Field(ge=0, le=1)
    """Share of the documents that was held out; 0: none."""
    seed: int = Field(ge=0)
    """Seed of the choice."""
    role: Literal["train", "held_out"]
    """On which side of the split this dataset lies."""


class Description(Part):
    """What the one who wrote the documents knows, and the files alone do not tell."""

    text_bytes: int = Field(ge=0)
    """UTF-8 bytes of the text before it was tokenised: for bytes per token and bits per byte."""
    bos: bool = False
    """Whether every document begins with `bos_id`."""
    tokenizer: TokenizerRecord
    sources: tuple[SourceRecord, ...] = Field(default=(), fail_fast=True)
    """Where the documents came from."""
    held_out: HeldOutRecord | None = None
    """The split this dataset belongs to; absent: it was not declared."""
    rejected: dict[str, int] = Field(default_factory=dict)
    """Lines of the input that became no document, by reason."""


class DatasetManifest(Description):
    """The whole manifest."""

    format: Literal["megatron_ttl dataset"] = "megatron_ttl dataset"
    version: Literal[1] = VERSION
    dtype: Literal["uint16", "int32"]
    """Type of an id in the `.bin`, little-endian."""
    documents: int = Field(ge=0)
    """Documents; each is one sequence of the `.idx`."""
    tokens: int = Field(ge=0)
    """Ids in the `.bin`, the EOS of every document included."""
    eos: Literal["one_per_document_last"] = "one_per_document_last"
    """Every document ends with `eos_id`, which appears nowhere else."""
    bin: FileRecord
    idx: FileRecord


def dump_manifest(manifest: DatasetManifest) -> str:
    """Return the text of the manifest's file."""
    return json.dumps(manifest.model_dump(mode="json"), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_manifest(path: Path) -> DatasetManifest:
    """Read and validate a manifest.

    Raises:
        DataError: it cannot be read, is no JSON, is of another version, or a field is wrong.
    """
    cure = "write the dataset again with tools/preprocess_data.py"
    try:
        payload = read_regular(path, _LARGEST_BYTES)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); it must be a manifest of some KB; "
                        f"{cure}") from None
    try:
        value = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not JSON ({error}); it must be a dataset's manifest; {cure}") from None
    if not isinstance(value, dict) or value.get("format") != "megatron_ttl dataset":
        raise DataError(f"{path}: is no manifest; its 'format' must be 'megatron_ttl dataset'; {cure}")
    if value.get("version") != VERSION:
        raise DataError(
            f"{path}: has version {value.get('version')!r}; this program reads version {VERSION}; "
            f"use the program that wrote it, or {cure}"
        )
    try:
        sources = value.get("sources")  # JSON has no tuples; and pydantic's own reader takes 250 bytes for every "[]"
        return DatasetManifest.model_validate(value | {"sources": tuple(sources)} if isinstance(sources, list) else value)
    except ValidationError as error:
        if error.error_count() > _MOST_FAULTS:
            raise DataError(f"{path}: {error.error_count():,} of its values are wrong; it must be a dataset's manifest; "
                            f"{cure}") from None
        faults = [
            f"{path}: {'.'.join(map(str, fault['loc'])) or 'the manifest'}: {fault['msg']}; "
            f"it must be as the dataset's writer left it; {cure}"
            for fault in error.errors(include_url=False, include_context=False, include_input=False)
        ]
        raise DataError(*faults) from None


def require_same_tokens(manifests: dict[str, DatasetManifest], task: str) -> None:
    """Refuse datasets whose ids do not mean the same: tokenizer, EOS id and BOS policy must be equal.

    Args:
        manifests: manifest by prefix; the first one is what the others are compared with.
        task: what they are wanted for, a phrase of the message ("training").

    Raises:
        DataError: one fault for every property that differs.
    """
    faults = []
    items = list(manifests.items())
    for prefix, manifest in items[1:]:
        first_prefix, first = items[0]
        pairs = [
            ("tokenizer checksum", manifest.tokenizer.checksum, first.tokenizer.checksum),
            ("EOS id", manifest.tokenizer.eos_id, first.tokenizer.eos_id),
            ("BOS policy", _bos_policy(manifest), _bos_policy(first)),
        ]
        for name, value, wanted in pairs:
            if value != wanted:
                faults.append(
                    f"{prefix}: {name} is {value}, that of {first_prefix} is {wanted}; they must be equal "
                    f"for {task}; tokenise both with the same tokenizer and options"
                )
    raise_faults(DataError, faults)


def _bos_policy(manifest: DatasetManifest) -> str:
    return f"one BOS ({manifest.tokenizer.bos_id}) per document" if manifest.bos else "no BOS"
