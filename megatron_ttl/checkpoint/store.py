"""Keep the run: a folder per checkpoint, written so that no kill, full disk or power cut costs the last.

    step-00000040.tmp-<pid>/   every file written and fsynced; the manifest with sizes and checksums last
    step-00000040/             the same folder, renamed: a name of this form was complete once

The newest checkpoint is found by looking: no file says which one it is. A folder is trusted after every byte
of it matched its manifest. Reading changes nothing on the disk. One process at a time may save: the run's
lock sees to it.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from megatron_ttl.checkpoint.manifest import (
    MANIFEST,
    RECORD,
    FileEntry,
    Manifest,
    encode_record,
    file_name,
    plan_manifest,
    read_manifest,
    verify,
)
from megatron_ttl.checkpoint.tensor_file import write_tensors
from megatron_ttl.errors import CheckpointError, DiskError
from megatron_ttl.files import checksum_bytes, fsync_directory, human_bytes, require_free_space

_STEP = re.compile(r"step-(\d{8,18})")
_TEMPORARY = re.compile(r"step-\d{8,18}\.(?:tmp|old)-(\d{1,10})")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint folder."""

    directory: Path
    step: int
    record: dict[str, Any]
    manifest: Manifest

    @property
    def groups(self) -> list[str]:
        """Names of the groups of tensors."""
        return list(self.manifest.groups)

    def tensors(self, group: str) -> dict[str, Tensor]:
        """Load one group on the CPU, shapes as saved; memory is the file's own pages until written to.

        Raises:
            CheckpointError: there is no such group.
        """
        if group not in self.manifest.groups:
            raise CheckpointError(f"{self.directory}: has no group {group!r}; it has "
                                  f"{', '.join(self.groups)}; use a checkpoint of a training run")
        with safe_open(self.directory / file_name(group), framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in self.manifest.groups[group]}


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
        warnings: what the last `latest_valid` passed over and the last `save` could not delete, for people.
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
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointError(f"{self.directory}: cannot be read ({error.strerror}); it must be the "
                                  "folder of the run's checkpoints; check the path and its "
                                  "permissions") from None
        found = [int(match[1]) for match in map(_STEP.fullmatch, names) if match]
        return sorted(step for step in found if self._folder(step).name in names)

    def open(self, which: int | str | os.PathLike[str]) -> Checkpoint:
        """Verify and open the checkpoint of a step of this run, or any checkpoint folder.

        Raises:
            CheckpointError: it is missing or damaged; with all faults, each naming its file.
        """
        folder = self._folder(which) if isinstance(which, int) else Path(which)
        if isinstance(which, int) and not folder.exists():
            known = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(f"{folder}: does not exist; step must be one of those kept ({known}); "
                                  "choose one")
        named = _STEP.fullmatch(folder.name)
        manifest, record = verify(folder, int(named[1]) if named else None)
        return Checkpoint(folder, manifest.step, record, manifest)

    def latest_valid(self) -> Checkpoint | None:
        """Open the newest checkpoint that is whole; what is passed over stands in `warnings`.

        Returns:
            None only where no checkpoint was ever completed.

        Raises:
            CheckpointError: there are checkpoints, and none is whole.
        """
        self.warnings = []
        faults: list[str] = []
        for step in reversed(self.steps()):
            try:
                return self.open(step)
            except CheckpointError as error:
                faults += error.faults
                self.warnings += [f"checkpoint of step {step} passed over: {fault}" for fault in error.faults]
        if faults:
            raise CheckpointError(f"{self.directory}: no checkpoint is whole; one must be, to go on; restore "
                                  "one from a copy, or start anew in another folder", *faults)
        return None

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]],
             record: Mapping[str, Any]) -> Saved:
        """Write the checkpoint of a step, then remove those that need not stay.

        Saving a step again is safe: a valid checkpoint of it stays as it is, a damaged one is replaced.

        Args:
            step: optimizer steps taken.
            tensors: group -> name -> tensor; a group becomes one safetensors file.
            record: anything that JSON can say, without NaN.

        Raises:
            CheckpointError: the record is not JSON.
            DiskError: the disk cannot take it. Nothing of it is left, the former ones are untouched.
        """
        payload = encode_record(record)
        plan = plan_manifest(step, tensors, payload)
        needed = sum(entry.bytes for entry in plan.files.values()) + len(plan.encode())
        target = self._folder(step)
        temporary = target.with_name(f"{target.name}.tmp-{os.getpid()}")
        self.warnings = []
        try:
            self._remove_leftovers()
            if self._is_valid(target):
                self.warnings.append(f"step {step}: a valid checkpoint is there already; it stays as it is")
                return Saved(target, False, 0)
            require_free_space(self.directory, needed, f"the checkpoint of step {step}")
            if not self.directory.is_dir():
                self.directory.mkdir(parents=True)
                fsync_directory(self.directory.parent)
            _fill(temporary, plan, tensors, payload)
            self._move_aside(target)
            os.rename(temporary, target)
            fsync_directory(self.directory)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)  # before the free bytes are counted
            raise self._disk_error(step, needed, error) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self._remove_old(step)
        return Saved(target, True, needed)

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
        steps = self.steps()
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
        while not place.exists():
            place = place.parent
        free = human_bytes(shutil.disk_usage(place).free)
        return DiskError(f"{error.filename or self.directory}: the checkpoint of step {step} could not be "
                         f"written ({error.strerror or error}); it needs {human_bytes(needed)}, {free} are "
                         "free; free some space or repair the disk")


def _fill(folder: Path, plan: Manifest, tensors: Mapping[str, Mapping[str, Tensor]], record: bytes) -> None:
    """Write all files of a checkpoint; the manifest comes last, with the checksums of what was written."""
    folder.mkdir()
    sums = {}
    for group, content in tensors.items():
        sums[file_name(group)] = write_tensors(folder / file_name(group), content)
    sums[RECORD] = checksum_bytes(record)
    files = {name: FileEntry(bytes=plan.files[name].bytes, checksum=sums[name]) for name in plan.files}
    _write_bytes(folder / RECORD, record)
    _write_bytes(folder / MANIFEST, plan.model_copy(update={"files": files}).encode())
    fsync_directory(folder)


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
