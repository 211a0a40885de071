"""What a checkpoint folder holds, in its manifest.json, and whether it still does."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_ttl.checkpoint.bounded_json import MAX_JSON_BYTES, parse_json_object, read_json_object, read_regular_file
from megatron_ttl.checkpoint.tensor_file import dtype_name, encoded_bytes
from megatron_ttl.errors import CheckpointError, raise_faults
from megatron_ttl.files import checksum, checksum_bytes

MANIFEST = "manifest.json"
RECORD = "record.json"
_CURE = "use another checkpoint"
_GROUP = re.compile(r"[a-z][a-z0-9_]{0,63}")
_TEMPLATE = "xxh3:" + "0" * 32


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class FileEntry(_Strict):
    """One file of the folder."""

    bytes: int = Field(ge=0)
    checksum: str = Field(pattern="^xxh3:[0-9a-f]{32}$")


class TensorEntry(_Strict):
    """One tensor, in the words of safetensors."""

    dtype: str
    shape: list[int]


class Manifest(_Strict):
    """Everything in the folder by name; a file that is not named here is never read."""

    format: Literal["megatron_ttl checkpoint"] = "megatron_ttl checkpoint"
    version: Literal[1] = 1
    step: int = Field(ge=0)
    files: dict[str, FileEntry]
    groups: dict[str, dict[str, TensorEntry]]

    def encode(self) -> bytes:
        """Return the file's bytes. They hold their own checksum: a flipped bit in them shows as well."""
        body = self.model_dump()
        sealed = {"checksum": checksum_bytes(_canonical(body)), **body}
        return _canonical(sealed) + b"\n"


def file_name(group: str) -> str:
    """Return the file that holds a group of tensors."""
    return f"{group}.safetensors"


def plan_manifest(step: int, groups: Mapping[str, Mapping[str, Tensor]], record: bytes) -> Manifest:
    """Describe a checkpoint that is about to be written: sizes are final, checksums are still blank."""
    wrong = [group for group in groups if not _GROUP.fullmatch(group)]
    assert not wrong, f"group names are file names: {wrong}"
    files = {file_name(group): encoded_bytes(tensors) for group, tensors in groups.items()}
    files[RECORD] = len(record)
    manifest = Manifest(
        step=step, files={name: FileEntry(bytes=size, checksum=_TEMPLATE) for name, size in files.items()},
        groups={group: {name: TensorEntry(dtype=dtype_name(tensor.dtype), shape=list(tensor.shape))
                        for name, tensor in tensors.items()} for group, tensors in groups.items()})
    assert len(manifest.encode()) <= MAX_JSON_BYTES, "a checkpoint that could not be read must not be written"
    return manifest


def encode_record(record: Mapping[str, Any]) -> bytes:
    """Return the bytes of a record.

    Raises:
        CheckpointError: it holds something that is not JSON, such as NaN.
    """
    try:
        payload = json.dumps(dict(record), indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        if len(payload) <= MAX_JSON_BYTES:
            return payload
        raise ValueError(f"{len(payload):,} bytes, more than {MAX_JSON_BYTES:,}")
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{RECORD}: cannot be written ({error}); it must be plain and small JSON "
                              "without NaN and infinity; leave the value out") from None


def read_manifest(folder: Path, step: int | None = None) -> Manifest:
    """Read and check the manifest of a folder, and that every file has the right size; reads no tensor.

    Args:
        folder: the checkpoint.
        step: the step that it must be of; None for any.

    Raises:
        CheckpointError: with all faults, each naming its file.
    """
    path = folder / MANIFEST
    if folder.is_symlink() or not folder.is_dir():
        what = "is no folder" if folder.is_symlink() or folder.exists() else "does not exist"
        raise CheckpointError(f"{folder}: {what}; it must be a checkpoint folder; {_CURE}")
    payload = read_regular_file(path, MAX_JSON_BYTES)
    content = parse_json_object(payload, path)
    if content.get("format") != "megatron_ttl checkpoint" or content.get("version") != 1:
        raise CheckpointError(f"{path}: format {content.get('format')!r}, version "
                              f"{content.get('version')!r}; this release reads 'megatron_ttl checkpoint', "
                              f"version 1; {_CURE}, or another release")
    content.pop("checksum", None)
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{path}: {where}: {first['msg']}; it must be as it was written; "
                              f"{_CURE}") from None
    if manifest.encode() != payload:
        raise CheckpointError(f"{path}: its own checksum does not match, it was changed; it must be as it "
                              f"was written; {_CURE}")
    if step is not None and manifest.step != step:
        raise CheckpointError(f"{path}: is of step {manifest.step}; the folder's name must say the same; "
                              f"{_CURE}")
    raise_faults(CheckpointError, _name_faults(path, manifest) or _size_faults(folder, manifest))
    return manifest


def verify(folder: Path, step: int | None = None) -> tuple[Manifest, dict[str, Any]]:
    """Read every byte of a checkpoint folder and compare it with the manifest; return manifest and record.

    Takes what `read_manifest` takes.

    Raises:
        CheckpointError: with all faults, each naming its file.
    """
    manifest = read_manifest(folder, step)
    with ThreadPoolExecutor(4) as pool:  # hashing and reading release the GIL
        faults = list(pool.map(lambda item: _content_fault(folder / item[0], item[1]), manifest.files.items()))
    raise_faults(CheckpointError, filter(None, faults))
    for group in manifest.groups:
        _check_header(folder / file_name(group), manifest.groups[group])
    return manifest, read_json_object(folder / RECORD)


def _canonical(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def _name_faults(path: Path, manifest: Manifest) -> list[str]:
    """The names in a manifest become paths: they must be exactly those that its groups have."""
    faults = [f"{path}: group {group!r}; its name must be lower-case letters, digits and underscores; {_CURE}"
              for group in manifest.groups if not _GROUP.fullmatch(group)]
    expected = {file_name(group) for group in manifest.groups} | {RECORD}
    return faults + [f"{path}: file {name!r}; the files must be those of the groups and {RECORD}; {_CURE}"
                     for name in sorted(expected ^ set(manifest.files))]


def _size_faults(folder: Path, manifest: Manifest) -> list[str]:
    faults = []
    for name, entry in manifest.files.items():
        path = folder / name
        try:
            status = path.lstat()
        except OSError as error:
            faults.append(f"{path}: cannot be read ({error.strerror}); the manifest names it; {_CURE}")
            continue
        if not stat.S_ISREG(status.st_mode):
            faults.append(f"{path}: is no regular file; it must be one; {_CURE}")
        elif status.st_size != entry.bytes:
            faults.append(f"{path}: has {status.st_size:,} bytes; the manifest says {entry.bytes:,}; {_CURE}")
    return faults


def _content_fault(path: Path, entry: FileEntry) -> str | None:
    try:
        found = checksum(path)
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror}); it must be readable; {_CURE}"
    if found != entry.checksum:
        return f"{path}: damaged, its checksum is {found}; the manifest says {entry.checksum}; {_CURE}"
    return None


def _check_header(path: Path, expected: Mapping[str, TensorEntry]) -> None:
    """Compare a file's own table of tensors with the manifest's."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            found = {}
            for name in file.keys():
                piece = file.get_slice(name)
                found[name] = TensorEntry(dtype=piece.get_dtype(), shape=list(piece.get_shape()))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: is no safetensors file ({error}); it must be one; {_CURE}") from None
    if found != dict(expected):
        names = found.keys() | expected.keys()
        differing = sorted(name for name in names if found.get(name) != expected.get(name))
        raise CheckpointError(f"{path}: holds other tensors than the manifest says "
                              f"({', '.join(differing[:5])}); they must be the same; {_CURE}")
