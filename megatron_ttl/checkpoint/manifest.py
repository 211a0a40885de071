"""What a checkpoint folder holds, in its manifest.json, and whether it still does."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError

from megatron_ttl.checkpoint.bounded_json import MAX_JSON_BYTES, parse_json_object, read_json_object, read_regular_file
from megatron_ttl.checkpoint.peers import ALONE, Peers
from megatron_ttl.checkpoint.pieces import Piece, cover_fault
from megatron_ttl.checkpoint.tensor_file import MAX_HEADER_BYTES, TORCH_DTYPES, dtype_name, encoded_bytes, open_tensors
from megatron_ttl.errors import CheckpointError, raise_faults
from megatron_ttl.files import checksum, checksum_bytes

MANIFEST = "manifest.json"
RECORD = "record.json"
_MOST_FAULTS = 100  # a hostile manifest can have a million, a kilobyte each
_CURE = "use another checkpoint"
_GROUP = re.compile(r"[a-z][a-z0-9_]{0,63}")
_RANKED = r"-[0-9]{5}\.safetensors"
_TEMPLATE = "xxh3:" + "0" * 32


Extent = Annotated[list[Annotated[int, Field(ge=0, lt=2**96)]], Field(max_length=8)]
"""A number for every dimension."""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class FileEntry(_Strict):
    """One file of the folder."""

    bytes: int = Field(ge=0)
    checksum: str = Field(pattern="^xxh3:[0-9a-f]{32}$")


class PieceEntry(_Strict):
    """A part of a tensor in one of the files, under the tensor's name."""

    file: str
    offset: Extent
    shape: Extent


class TensorEntry(_Strict):
    """One tensor, in the words of safetensors; without pieces it lies whole in its group's only file."""

    dtype: str
    shape: Extent
    pieces: list[PieceEntry] | None = Field(default=None, fail_fast=True)

    def whole(self, file: str) -> PieceEntry:
        """Return the only piece of a tensor that is in one."""
        return PieceEntry(file=file, offset=[0] * len(self.shape), shape=self.shape)


class Manifest(_Strict):
    """Everything in the folder by name; a file that is not named here is never read."""

    format: Literal["megatron_ttl checkpoint"] = "megatron_ttl checkpoint"
    version: Literal[1, 2] = 1
    """2: several processes wrote, and tensors have pieces."""
    step: int = Field(ge=0)
    files: dict[str, FileEntry]
    groups: dict[str, dict[str, TensorEntry]]

    def encode(self) -> bytes:
        """Return the file's bytes. They hold their own checksum: a flipped bit in them shows as well."""
        body = self.model_dump(exclude_none=True)
        sealed = {"checksum": checksum_bytes(_canonical(body)), **body}
        return _canonical(sealed) + b"\n"

    def contents(self) -> dict[str, dict[str, TensorEntry]]:
        """Return what each file of tensors must hold."""
        found: dict[str, dict[str, TensorEntry]] = {}
        if self.version == 1:
            found = {file_name(group): {} for group in self.groups}
        for group, entries in self.groups.items():
            for name, entry in entries.items():
                for piece in [entry.whole(file_name(group))] if entry.pieces is None else entry.pieces:
                    found.setdefault(piece.file, {})[name] = TensorEntry(dtype=entry.dtype, shape=piece.shape)
        return found


def file_name(group: str, rank: int | None = None) -> str:
    """Return the file that holds a group of tensors, or one process's pieces of it."""
    return f"{group}.safetensors" if rank is None else f"{group}-{rank:05d}.safetensors"


def describe_pieces(pieces: Mapping[str, Mapping[str, Piece]], rank: int | None) -> dict[str, Any]:
    """Say in JSON's words what one process is about to write: `files` with their bytes, `groups` with their pieces."""
    wrong = [group for group in pieces if not _GROUP.fullmatch(group)]
    assert not wrong, f"group names are file names: {wrong}"
    files = {file_name(group, rank): encoded_bytes({name: piece.tensor for name, piece in found.items()})
             for group, found in pieces.items() if found or rank is None}
    groups = {group: {name: {"dtype": dtype_name(piece.tensor.dtype), "shape": list(piece.shape),
                             "offset": list(piece.offset), "extent": list(piece.tensor.shape)}
                      for name, piece in found.items()} for group, found in pieces.items()}
    return {"files": files, "groups": groups}


def plan_manifest(step: int, parts: list[dict[str, Any]]) -> Manifest:
    """Describe a checkpoint that is about to be written: sizes are final, checksums are still blank.

    Args:
        step: optimizer steps taken.
        parts: from `describe_pieces`, by rank, with the bytes of the record as `record_bytes`.
    """
    alone = len(parts) == 1
    files: dict[str, int] = {}
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for rank, part in enumerate(parts):
        files |= part["files"]
        for group, pieces in part["groups"].items():
            found = groups.setdefault(group, {})
            for name, piece in pieces.items():
                assert not alone or piece["extent"] == piece["shape"], name
                entry = found.setdefault(name, {"dtype": piece["dtype"], "shape": piece["shape"], "pieces": []})
                assert (entry["dtype"], entry["shape"]) == (piece["dtype"], piece["shape"]), name
                entry["pieces"].append({"file": file_name(group, rank), "offset": piece["offset"],
                                        "shape": piece["extent"]})
    files[RECORD] = parts[0]["record_bytes"]
    manifest = Manifest(
        step=step, version=1 if alone else 2,
        files={name: FileEntry(bytes=size, checksum=_TEMPLATE) for name, size in files.items()},
        groups={group: {name: TensorEntry.model_validate({**entry, "pieces": None} if alone else entry)
                        for name, entry in entries.items()} for group, entries in groups.items()})
    uncovered = _piece_faults(Path(MANIFEST), manifest)
    assert not uncovered, uncovered
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
    what = _no_folder(folder)
    if what:
        raise CheckpointError(f"{folder}: {what}; it must be a checkpoint folder; {_CURE}")
    payload = read_regular_file(path, MAX_JSON_BYTES)
    content = parse_json_object(payload, path)
    if content.get("format") != "megatron_ttl checkpoint" or content.get("version") not in (1, 2):
        raise CheckpointError(f"{path}: format {content.get('format')!r}, version "
                              f"{content.get('version')!r}; this release reads 'megatron_ttl checkpoint', "
                              f"versions 1 and 2; {_CURE}, or another release")
    content.pop("checksum", None)
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        if error.error_count() > _MOST_FAULTS:
            raise CheckpointError(f"{path}: {error.error_count():,} of its values are wrong; it must be as it was "
                                  f"written; {_CURE}") from None
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
    raise_faults(CheckpointError, _name_faults(path, manifest) or _size_faults(folder, manifest)
                 or _piece_faults(path, manifest) or _account_faults(path, manifest))
    return manifest


def verify(folder: Path, step: int | None = None, peers: Peers = ALONE) -> tuple[Manifest, dict[str, Any]]:
    """Read every byte of a checkpoint folder and compare it with the manifest; return manifest and record.

    Args:
        folder: the checkpoint.
        step: the step that it must be of; None for any.
        peers: they share the work, and all come to the same result.

    Raises:
        CheckpointError: with all faults, each naming its file.
    """
    manifest: Manifest | None = None
    record: dict[str, Any] = {}
    seen, faults = "", []
    try:
        manifest = read_manifest(folder, step)
        seen = checksum_bytes(manifest.encode())
        share = list(manifest.files)[peers.rank :: peers.world_size]
        faults = _file_faults(folder, manifest, list(dict.fromkeys([*share, RECORD])))
        # Before all agree: a process that alone cannot read it must not go its own way.
        record = {} if faults else read_json_object(folder / RECORD)
    except CheckpointError as error:
        faults = error.faults
    answers = [json.loads(text) for text in peers.gather_text(json.dumps({"manifest": seen, "faults": faults}))]
    raise_faults(CheckpointError, dict.fromkeys(fault for answer in answers for fault in answer["faults"]))
    if len({answer["manifest"] for answer in answers}) > 1:
        raise CheckpointError(f"{folder}: the processes see different checkpoints there; it must be one, on a file "
                              "system that all machines share; move the run folder there")
    assert manifest is not None
    return manifest, record


def foreign_files(folder: Path, manifest: Manifest) -> list[str]:
    """Name what lies in the folder of a verified checkpoint and is no part of it, such as pieces of another run.

    No reason to refuse it: it is never read, and a file system may put files of its own there.
    """
    try:
        names = sorted(entry.name for entry in os.scandir(folder))
    except OSError:
        return []
    return [f"{folder / name}: is not in the manifest; a checkpoint holds nothing else, so it is not read; move it away"
            for name in names if name not in manifest.files and name != MANIFEST]


def _file_faults(folder: Path, manifest: Manifest, names: list[str]) -> list[str]:
    """Compare some of the files with the manifest, bytes first, then their own tables of tensors."""
    with ThreadPoolExecutor(4) as pool:  # hashing and reading release the GIL
        faults = list(filter(None, pool.map(lambda name: _content_fault(folder / name, manifest.files[name]), names)))
    if faults:
        return faults
    contents = manifest.contents()
    return [fault for name in names if name in contents for fault in _header_faults(folder / name, contents[name])]


def _no_folder(folder: Path) -> str:
    """Say why a path is no folder of ours; nothing when it is one."""
    try:
        if folder.is_symlink() or not folder.is_dir():
            return "is no folder" if folder.is_symlink() or folder.exists() else "does not exist"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return ""


def _canonical(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def _name_faults(path: Path, manifest: Manifest) -> list[str]:
    """The names in a manifest become paths: they must be exactly those that its groups have."""
    faults = [f"{path}: group {group!r}; its name must be lower-case letters, digits and underscores; {_CURE}"
              for group in manifest.groups if not _GROUP.fullmatch(group)]
    expected = {file_name(group) for group in manifest.groups}
    if manifest.version == 2:
        pieces = {(group, piece.file) for group, entries in manifest.groups.items()
                  for entry in entries.values() for piece in entry.pieces or ()}
        expected = {file for group, file in pieces if re.fullmatch(re.escape(group) + _RANKED, file)}
    return faults + [f"{path}: file {name!r}; the files must be those of the groups and {RECORD}; {_CURE}"
                     for name in sorted((expected | {RECORD}) ^ set(manifest.files))]


def _piece_faults(path: Path, manifest: Manifest) -> list[str]:
    """Pieces must cover every tensor exactly once, or memory would be handed out as weights."""
    faults = []
    for group, entries in manifest.groups.items():
        for name, entry in entries.items():
            if entry.dtype not in TORCH_DTYPES:
                faults.append(f"{path}: {group} {name}: dtype {entry.dtype!r}; it must be one of "
                              f"{', '.join(TORCH_DTYPES)}; {_CURE}")
            if (entry.pieces is None) != (manifest.version == 1):
                faults.append(f"{path}: {group} {name}: pieces belong to version 2, which has nothing else; they must "
                              f"be as they were written; {_CURE}")
            elif entry.pieces is not None:
                fault = cover_fault(tuple(entry.shape), [(tuple(p.offset), tuple(p.shape)) for p in entry.pieces])
                twice = len({piece.file for piece in entry.pieces}) < len(entry.pieces)
                elsewhere = [piece.file for piece in entry.pieces
                             if not re.fullmatch(re.escape(group) + _RANKED, piece.file)]
                if elsewhere:
                    fault = f"has a piece in {elsewhere[0]!r}, which is no file of {group}"
                if fault or twice:
                    faults.append(f"{path}: {group} {name}: {fault or 'has two pieces in one file'}; every element "
                                  f"must be there once; {_CURE}")
    return faults


def _account_faults(path: Path, manifest: Manifest) -> list[str]:
    """What is in no tensor would be read for nothing: of a sparse file, terabytes."""
    most = {name: sum(prod(entry.shape) * TORCH_DTYPES[entry.dtype].itemsize for entry in entries.values())
            + 8 + MAX_HEADER_BYTES for name, entries in manifest.contents().items()} | {RECORD: MAX_JSON_BYTES}
    return [f"{path}: file {name!r} of {manifest.files[name].bytes:,} bytes; with what it holds it has at most "
            f"{largest:,}; {_CURE}" for name, largest in most.items() if manifest.files[name].bytes > largest]


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


def _header_faults(path: Path, expected: Mapping[str, TensorEntry]) -> list[str]:
    """Compare a file's own table of tensors with the manifest's."""
    try:
        with open_tensors(path) as file:
            found = {}
            for name in file.keys():
                piece = file.get_slice(name)
                found[name] = TensorEntry(dtype=piece.get_dtype(), shape=list(piece.get_shape()))
    except (SafetensorError, OSError) as error:
        return [f"{path}: is no safetensors file ({error}); it must be one; {_CURE}"]
    if found == dict(expected):
        return []
    names = found.keys() | expected.keys()
    differing = sorted(name for name in names if found.get(name) != expected.get(name))
    return [f"{path}: holds other tensors than the manifest says ({', '.join(differing[:5])}); they must be the same; "
            f"{_CURE}"]
