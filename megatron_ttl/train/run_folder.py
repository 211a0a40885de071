"""The run folder: one owner at a time, the settings it was started with, its metrics and checkpoints."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from megatron_ttl.checkpoint.peers import ALONE, Peers
from megatron_ttl.checkpoint.store import Checkpoint, CheckpointStore
from megatron_ttl.config.describe import show
from megatron_ttl.config.load import Settings
from megatron_ttl.errors import CheckpointError, ConfigError, raise_faults
from megatron_ttl.files import atomic_directory, or_disk_error, remove_leftovers, write_json, write_text
from megatron_ttl.tokenizer.folder import copy_tokenizer
from megatron_ttl.train.changed_settings import (
    SETTINGS,
    change_faults,
    changes_since,
    history_with,
    print_changes,
    read_settings_of_record,
    skip_fault,
)
from megatron_ttl.train.run_lock import RunLock

_MIXTURE = "mixture.json"
_DESCRIPTION = ("run.toml", "deepspeed.json", "settings.json", "tokenizer", _MIXTURE)


class RunFolder:
    """Paths of a run, and the lock that keeps a second run out: the one given, or one of its own."""

    def __init__(self, settings: Settings, lock: RunLock | None = None) -> None:
        self.settings = settings
        self.path = Path(settings.run.run.dir)
        self.metrics_path = self.path / "metrics.jsonl"
        self.samples_path = self.path / "samples.jsonl"
        self.tokenizer_path = self.path / "tokenizer"
        self._history: list[dict[str, Any]] = []
        self.lock = lock or RunLock()
        keep = settings.run.checkpoint
        self.store = CheckpointStore(self.path / "checkpoints", keep.keep_last, keep.keep_every_steps)

    def claim(self) -> None:
        """Take the folder for this process, unless it has it.

        Raises:
            ConfigError: another run has it, or it cannot be written.
            DiskError: the disk cannot take even that.
        """
        self.lock.take(self.path)
        with or_disk_error(self.path):
            remove_leftovers(self.path, _DESCRIPTION)

    def release(self) -> None:
        """Let the next run in."""
        self.lock.release()

    def starting_point(self, peers: Peers = ALONE) -> tuple[Checkpoint | None, list[str]]:
        """Find where the run goes on: its own newest valid checkpoint, else the one it branches from, else nowhere.

        Args:
            peers: the run's processes; they share the work of reading every byte, and come to the same result.

        Returns:
            The checkpoint or None for a fresh start, and warnings about damaged checkpoints that were passed over.

        Raises:
            CheckpointError: there are checkpoints and none is valid.
            ConfigError: a setting was changed that may not change, or only when it is asked for.
        """
        run = self.settings.run
        behind: list[int] = []

        def unfit(found: Checkpoint) -> str:
            fault = skip_fault(found.record, found.step, run)
            behind.extend([found.step] if fault else [])
            return fault

        checkpoint = self.store.latest_valid(peers, unfit)
        if checkpoint is not None:
            _require_record(checkpoint)
            warnings = list(self.store.warnings)
            self._compare(checkpoint, speaks=peers.rank == 0)
            if behind and peers.rank == 0:
                self.store.set_aside(behind)
                warnings.append(f"checkpoints of steps {', '.join(map(str, behind))} are set aside, for the run goes there "
                                "again; delete them by hand (*.set-aside) when they are not missed")
            return checkpoint, warnings
        if run.run.start_from is None:
            return None, []
        parent = open_checkpoint(Path(run.run.start_from), peers)
        _require_record(parent)
        faults = _branch_faults(parent, self.settings)
        if fault := skip_fault(parent.record, parent.step, run):
            faults.append(f"{parent.directory}: {fault}")
        raise_faults(ConfigError, faults)
        return parent, []

    def _compare(self, checkpoint: Checkpoint, speaks: bool) -> None:
        stored = read_settings_of_record(self.path)
        changes = changes_since(self.path, stored, checkpoint.record, self.settings)
        if speaks:
            print_changes(changes, self.path, checkpoint.step)
        raise_faults(ConfigError, change_faults(changes, checkpoint.step, self.settings))
        self._history = history_with(stored, changes, checkpoint.step)

    def describe(self, deepspeed_settings: dict[str, Any], versions: dict[str, str], tokenizer: Path) -> None:
        """Write the settings as given and as resolved, what was changed and when, and a copy of the tokenizer.

        Raises:
            DiskError: the disk cannot take them.
        """
        settings = self.settings
        with or_disk_error(self.path):
            write_text(self.path / "run.toml", settings.run_text)
            write_text(self.path / "deepspeed.json", settings.deepspeed_text)
            write_json(self.path / SETTINGS, {"run": settings.run.model_dump(mode="json"),
                                              "profile": settings.profile.model_dump(mode="json"),
                                              "deepspeed": deepspeed_settings, "origins": settings.origins,
                                              "versions": versions, "changes": self._history})
            if not self.tokenizer_path.exists():
                with atomic_directory(self.tokenizer_path) as folder:
                    copy_tokenizer(tokenizer, folder)

    def write_mixture(self, table: dict[str, Any]) -> None:
        """Write what was drawn of the data, for people; checkpoints know it too, so a full disk costs this file alone."""
        try:
            write_json(self.path / _MIXTURE, table)
        except OSError as error:
            print(f"warning: {self.path / _MIXTURE}: could not be written ({error.strerror})", file=sys.stderr)


def open_checkpoint(path: Path, peers: Peers = ALONE) -> Checkpoint:
    """Open a checkpoint folder, or the newest valid one of a run folder; peers share the work.

    Raises:
        CheckpointError: there is none.
    """
    if (path / "manifest.json").exists():
        return CheckpointStore(path.parent).open(path, peers)
    checkpoint = CheckpointStore(path / "checkpoints").latest_valid(peers) if path.is_dir() else None
    if checkpoint is None:
        raise CheckpointError(f"{path}: no checkpoint is there; it must be a checkpoint folder (step-...) or a run "
                              "folder; check the path")
    return checkpoint


def _require_record(checkpoint: Checkpoint) -> None:
    """Refuse a record that a training run did not write: what follows believes its types.

    Raises:
        CheckpointError: with all faults.
    """
    record, where = checkpoint.record, checkpoint.directory / "record.json"
    run = record.get("run") if isinstance(record.get("run"), dict) else {}
    faults = [f"{key}: {str(record.get(key))[:80]}; it must be a count"
              for key in ("step", "consumed_samples", "consumed_tokens")
              if not isinstance(record.get(key), int) or isinstance(record.get(key), bool)
              or not 0 <= record[key] < 2**63]
    left_out = record.get("left_out_samples", [])
    ends = [end for pair in left_out for end in pair] if _is_pairs(left_out) else [-1]
    if not faults and (ends != sorted(set(ends)) or (ends and not 0 <= ends[0] <= ends[-1] <= record["consumed_samples"])):
        faults.append(f"left_out_samples: {str(left_out)[:80]}; they must be ranges of samples before the position")
    faults += [f"run.{key}: {type(run.get(key)).__name__}; it must be a table" for key in ("model", "data", "train")
               if not isinstance(run.get(key), dict)]
    if not faults and record["step"] != checkpoint.step:
        faults.append(f"step: {record['step']}; the manifest says {checkpoint.step}")
    raise_faults(CheckpointError, (f"{where}: {fault}; use a checkpoint of a training run" for fault in faults))


def _branch_faults(parent: Checkpoint, settings: Settings) -> list[str]:
    """Say what keeps a run from going on at the parent's weights and data position."""
    if not isinstance(parent.record.get("run"), dict):
        return [f"{parent.directory}: its record has no settings; a branch needs to know what its weights are; choose "
                "another checkpoint"]
    folder = parent.directory.parent.parent
    faults = []
    for change in changes_since(folder, parent.record, parent.record, settings):
        if change.verdict != "forbidden" or not change.field.startswith(("model.", "data.", "train.")):
            continue
        faults.append(f"{settings.run_path}: {change.field}: is {show(change.new)}, and {show(change.old)} in the "
                      f"checkpoint {parent.directory}; a branch goes on with the same model and at the same place of "
                      f"the same data: {change.why}; copy it from the checkpoint's run")
    if settings.run.total_steps <= parent.step:
        faults.append(f"{settings.run_path}: train.steps: {settings.run.total_steps}, and the checkpoint is at step "
                      f"{parent.step}; the horizon counts from the first step of the parent; set a larger one")
    return faults


def _is_pairs(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2
                                           and all(type(end) is int for end in pair) for pair in value)
