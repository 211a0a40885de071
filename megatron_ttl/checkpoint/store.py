"""Keep the run: a folder per checkpoint, written so that no kill, full disk or power cut costs the last.

    step-00000040.tmp-<pid>/   every file written and fsynced; the manifest with sizes and checksums last
    step-00000040/             the same folder, renamed: a name of this form was complete once

Several processes write one checkpoint together, each its own pieces into its own files; the first one makes the
folder, gathers their checksums, and renames. The folder must be on a file system that all of them see.

The newest checkpoint is found by looking: no file says which one it is. A folder is trusted after every byte
of it matched its manifest. Reading changes nothing on the disk. One run at a time may save: its lock sees to it.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_ttl.checkpoint.manifest import (
    MANIFEST,
    RECORD,
    FileEntry,
    Manifest,
    describe_pieces,
    encode_record,
    file_name,
    foreign_files,
    plan_manifest,
    read_manifest,
    verify,
)
from megatron_ttl.checkpoint.peers import ALONE, Peers, together
from megatron_ttl.checkpoint.pieces import Piece, whole
from megatron_ttl.checkpoint.reading import Checkpoint
from megatron_ttl.checkpoint.tensor_file import write_tensors
from megatron_ttl.errors import CheckpointError, DiskError
from megatron_ttl.files import checksum_bytes, fsync_directory, human_bytes, make_directory, require_free_space

__all__ = ["Checkpoint", "CheckpointStore", "Saved"]

_STEP = re.compile(r"step-([0-9]{8,18})")
_TEMPORARY = re.compile(r"step-[0-9]{8,18}\.(?:tmp|old)-([0-9]{1,10})")


@dataclass(frozen=True)
class Saved:
    """What a save did."""

    directory: Path
    written: bool
    """False: a valid checkpoint of this step was there already, and stays."""
    bytes: int


class CheckpointStore:
    """The checkpoints of one run.

    Attributes:
        directory: the folder of the step folders; made by the first save.
        warnings: what the last `latest_valid` passed over or did not know, and what the last `save` could not delete.
    """

    def __init__(self, directory: str | os.PathLike[str], keep_last: int = 2,
                 keep_every_steps: int | None = None) -> None:
        assert keep_last >= 1 and (keep_every_steps is None or keep_every_steps >= 1)
        self.directory = Path(directory)
        self.keep_last = keep_last
        self.keep_every_steps = keep_every_steps
        self.warnings: list[str] = []

    def steps(self) -> list[int]:
        """Return the steps that have a folder, ascending; whether they are valid is not looked at."""
        try:
            names = [entry.name for entry in os.scandir(self.directory)]
        except OSError as error:
            # A link to a disk that is not mounted hides checkpoints; without even a link, none was ever written.
            if isinstance(error, FileNotFoundError) and not os.path.lexists(self.directory):
                return []
            raise CheckpointError(f"{self.directory}: cannot be read ({error.strerror}); it must be the "
                                  "folder of the run's checkpoints; check the path and its "
                                  "permissions") from None
        found = [int(match[1]) for match in map(_STEP.fullmatch, names) if match]
        return sorted(step for step in found if self._folder(step).name in names)

    def open(self, which: int | str | os.PathLike[str], peers: Peers = ALONE) -> Checkpoint:
        """Verify and open the checkpoint of a step of this run, or any checkpoint folder; peers share the work.

        Raises:
            CheckpointError: it is missing or damaged; with all faults, each naming its file.
        """
        folder = self._folder(which) if isinstance(which, int) else Path(which)
        if isinstance(which, int) and peers.world_size == 1 and not folder.exists():
            known = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(f"{folder}: does not exist; step must be one of those kept ({known}); "
                                  "choose one")
        named = _STEP.fullmatch(folder.name)
        manifest, record = verify(folder, int(named[1]) if named else None, peers)
        return Checkpoint(folder, manifest.step, record, manifest)

    def latest_valid(self, peers: Peers = ALONE, unfit: Callable[[Checkpoint], str] = lambda _: "") -> Checkpoint | None:
        """Open the newest checkpoint that is whole; what is passed over, and what is no part of it, is in
        `warnings`.

        Args:
            peers: they share the work, and all come to the same result: the first one's folder listing counts.
            unfit: says what keeps a whole checkpoint from being used, or nothing; alike on all peers.

        Returns:
            None only where no checkpoint was ever completed.

        Raises:
            CheckpointError: there are checkpoints, and none is whole and fit.
        """
        self.warnings = []
        faults: list[str] = []
        steps = together(peers, lambda: self.steps() if peers.rank == 0 else [])[0]
        for step in reversed(steps):
            try:
                checkpoint = self.open(step, peers)
            except CheckpointError as error:
                found = error.faults
            else:
                found = [fault] if (fault := unfit(checkpoint)) else []
                if not found:
                    self.warnings += foreign_files(checkpoint.directory, checkpoint.manifest)
                    return checkpoint
            faults += found
            self.warnings += [f"checkpoint of step {step} passed over: {fault}" for fault in found]
        if faults:
            raise CheckpointError(f"{self.directory}: no checkpoint is whole and fits; one must, to go on; restore "
                                  "one from a copy, or start anew in another folder", *faults)
        return None

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor | Piece]], record: Mapping[str, Any],
             peers: Peers = ALONE) -> Saved:
        """Write the checkpoint of a step, then remove those that need not stay.

        Saving a step again is safe: a valid checkpoint of it stays as it is, a damaged one is replaced.

        Args:
            step: optimizer steps taken.
            tensors: group -> name -> this process's tensor or piece; a group becomes one safetensors file a process.
            record: anything that JSON can say, without NaN; the first process's counts.
            peers: who writes together. All call, and all return or raise the same.

        Raises:
            CheckpointError: the record is not JSON.
            DiskError: the disk cannot take it. Nothing of it is left, the former ones are untouched.
        """
        first = peers.rank == 0
        rank = None if peers.world_size == 1 else peers.rank
        pieces = _as_pieces(tensors)
        self.warnings = []
        plan, payload = _plan(step, pieces, record, peers)
        needed = _planned_bytes(plan)
        target = self._folder(step)
        name = f"{target.name}.tmp-{os.getpid()}"

        def on_disk(action: Callable[[], Any]) -> list[Any]:
            return together(peers, lambda: self._telling(action, temporary if first else None, step, needed))

        temporary = target.with_name(name)
        try:
            begun = on_disk(lambda: self._begin(temporary, target, step, needed) if first else None)[0]
            if not begun:
                self.warnings.append(f"step {step}: a valid checkpoint is there already; it stays as it is")
                return Saved(target, False, 0)
            temporary = target.with_name(begun)
            sums = on_disk(lambda: _write_pieces(temporary, pieces, rank))
            on_disk(lambda: self._commit(temporary, target, plan, {k: v for part in sums for k, v in part.items()},
                                         payload) if first else None)
        finally:
            if first:
                shutil.rmtree(temporary, ignore_errors=True)
        if first:
            self._remove_old(step)
        return Saved(target, True, needed)

    def bytes_needed(self, tensors: Mapping[str, Mapping[str, Tensor | Piece]], record: Mapping[str, Any],
                     peers: Peers = ALONE) -> int:
        """Return how large a checkpoint of this would be, over all processes; tensors may be without memory.

        Raises:
            CheckpointError: the record is not JSON.
        """
        return _planned_bytes(_plan(0, _as_pieces(tensors), record, peers)[0])

    def _telling(self, action: Callable[[], Any], temporary: Path | None, step: int, needed: int) -> Any:
        """Do something; when the disk cannot, say what it would have needed."""
        try:
            return action()
        except OSError as error:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)  # before the free bytes are counted
            raise self._disk_error(step, needed, error) from error

    def _begin(self, temporary: Path, target: Path, step: int, needed: int) -> str:
        """Make room and the folder; return its name, or nothing where a valid checkpoint is there already."""
        self._remove_leftovers()
        if self._is_valid(target):
            fsync_directory(self.directory)  # it may be the save that failed at this very call
            return ""
        require_free_space(self.directory, needed, f"the checkpoint of step {step}")
        make_directory(self.directory)
        temporary.mkdir()
        return temporary.name

    def _commit(self, temporary: Path, target: Path, plan: Manifest, sums: Mapping[str, str], record: bytes) -> None:
        """Write the manifest with the checksums of what was written, and give the folder its name."""
        _write_bytes(temporary / RECORD, record)
        sums = {**sums, RECORD: checksum_bytes(record)}
        files = {name: FileEntry(bytes=plan.files[name].bytes, checksum=sums[name]) for name in plan.files}
        _write_bytes(temporary / MANIFEST, plan.model_copy(update={"files": files}).encode())
        fsync_directory(temporary)
        self._move_aside(target)
        os.rename(temporary, target)
        fsync_directory(self.directory)

    def set_aside(self, steps: Iterable[int]) -> None:
        """Rename checkpoints to `step-00000820.set-aside`, so that a run can go that way again."""
        moved = sorted(steps, reverse=True)
        for step in moved:
            target, number = self._folder(step).with_suffix(".set-aside"), 1
            while os.path.lexists(target):
                number += 1
                target = target.with_suffix(f".set-aside-{number}")
            os.rename(self._folder(step), target)
        if moved:
            fsync_directory(self.directory)

    def _folder(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}"

    def _is_valid(self, folder: Path) -> bool:
        if not os.path.lexists(folder):
            return False
        try:
            self.open(folder)
        except CheckpointError:
            return False
        return True

    def _move_aside(self, folder: Path) -> None:
        """Take the name of a step away from a folder, at once, and then delete it bit by bit."""
        if not os.path.lexists(folder):
            return
        aside = folder.with_name(f"{folder.name}.old-{os.getpid()}")
        os.rename(folder, aside)
        fsync_directory(self.directory)
        _delete(aside)

    def _remove_leftovers(self) -> None:
        """Delete what killed saves and deletions left behind; a process that lives may still be at work."""
        if not self.directory.is_dir():
            return
        for entry in list(os.scandir(self.directory)):
            match = _TEMPORARY.fullmatch(entry.name)
            if match and (int(match[1]) == os.getpid() or not _is_alive(int(match[1]))):
                _delete(Path(entry.path))

    def _remove_old(self, newest: int) -> None:
        """Delete the checkpoints that need not stay. Trouble here is a warning: the save has succeeded.

        Only folders that look whole (manifest and sizes) count among the last ones to keep: damaged ones must
        never push out the last one that can be read.
        """
        try:
            steps = self.steps()
        except CheckpointError as error:
            self.warnings += error.faults
            return
        whole = [step for step in steps if step == newest or self._looks_whole(step)]
        stay = {newest, *whole[-self.keep_last :]}
        for step in steps:
            forever = self.keep_every_steps is not None and step % self.keep_every_steps == 0
            if step in stay or forever or step > min(stay):
                continue
            try:
                self._move_aside(self._folder(step))
            except OSError as error:
                self.warnings.append(f"{self._folder(step)}: could not be deleted ({error.strerror}); it "
                                     "should be, to free the disk; delete it by hand")

    def _looks_whole(self, step: int) -> bool:
        try:
            read_manifest(self._folder(step), step)
        except CheckpointError:
            return False
        return True

    def _disk_error(self, step: int, needed: int, error: OSError) -> DiskError:
        place = self.directory
        try:
            while not place.exists():
                place = place.parent
            free = human_bytes(shutil.disk_usage(place).free)
        except OSError:  # a disk that fails may not answer this either
            free = "an unknown number of bytes"
        return DiskError(f"{error.filename or self.directory}: the checkpoint of step {step} could not be "
                         f"written ({error.strerror or error}); it needs {human_bytes(needed)}, {free} are "
                         "free; free some space or repair the disk")


def _as_pieces(tensors: Mapping[str, Mapping[str, Tensor | Piece]]) -> dict[str, dict[str, Piece]]:
    return {group: {key: tensor if isinstance(tensor, Piece) else whole(tensor) for key, tensor in found.items()}
            for group, found in tensors.items()}


def _plan(step: int, pieces: Mapping[str, Mapping[str, Piece]], record: Mapping[str, Any], peers: Peers
          ) -> tuple[Manifest, bytes]:
    """Agree on what will be written; return the manifest without checksums, and the first process's record."""
    rank = None if peers.world_size == 1 else peers.rank
    payload = b""

    def describe() -> dict[str, Any]:
        nonlocal payload
        payload = encode_record(record) if peers.rank == 0 else b""
        return {**describe_pieces(pieces, rank), "record_bytes": len(payload)}

    return plan_manifest(step, together(peers, describe)), payload


def _planned_bytes(plan: Manifest) -> int:
    return sum(entry.bytes for entry in plan.files.values()) + len(plan.encode())


def _write_pieces(folder: Path, pieces: Mapping[str, Mapping[str, Piece]], rank: int | None) -> dict[str, str]:
    """Write one process's files of a checkpoint; return their checksums."""
    if not folder.is_dir():
        raise DiskError(f"{folder}: the first process made it, and it is not here; the run folder must be on a file "
                        "system that all machines share; move run.dir there")
    sums = {}
    for group, found in pieces.items():
        if found or rank is None:
            name = file_name(group, rank)
            sums[name] = write_tensors(folder / name, {key: piece.tensor for key, piece in found.items()})
    if rank:
        fsync_directory(folder)  # the first process does it for its own at the end
    return sums


def _write_bytes(path: Path, payload: bytes) -> None:
    with open(path, "xb") as handle:
        handle.write(payload)
        handle.flush()
        os.fsync(handle.fileno())


def _delete(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
