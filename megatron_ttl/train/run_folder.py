"""The run folder: one owner at a time, the settings it was started with, its metrics and checkpoints."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from pathlib import Path
from typing import IO, Any

from megatron_ttl.checkpoint.peers import ALONE, Peers
from megatron_ttl.checkpoint.store import Checkpoint, CheckpointStore
from megatron_ttl.config.describe import show
from megatron_ttl.config.load import Settings
from megatron_ttl.errors import CheckpointError, ConfigError, raise_faults
from megatron_ttl.files import write_json, write_text
from megatron_ttl.runtime import describe_process
from megatron_ttl.train.changed_settings import (
    SETTINGS,
    change_faults,
    changes_since,
    history_with,
    print_changes,
    read_settings_of_record,
)


class RunFolder:
    """Paths of a run, and the lock that keeps a second run out."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.path = Path(settings.run.run.dir)
        self.metrics_path = self.path / "metrics.jsonl"
        self.tokenizer_path = self.path / "tokenizer"
        self._lock: IO[str] | None = None
        self._history: list[dict[str, Any]] = []
        keep = settings.run.checkpoint
        self.store = CheckpointStore(self.path / "checkpoints", keep.keep_last, keep.keep_every_steps)

    def claim(self) -> None:
        """Take the folder for this process; the lock goes with the process, so none is ever stale.

        Raises:
            ConfigError: another run has it, or it cannot be written.
        """
        lock_path = self.path / "run.lock"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(lock_path, "a+", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"run.dir: '{self.path}' cannot be written ({error.strerror}); it must be a folder of "
                              "yours; choose another run.dir") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.seek(0)
            owner = self._lock.read().strip() or "an unknown process"
            self._lock.close()
            self._lock = None
            raise ConfigError(f"run.dir: '{self.path}' is in use by {owner}; a run folder has one run at a time; wait "
                              "for it, stop it, or choose another run.dir") from None
        self._lock.seek(0)
        self._lock.truncate()
        self._lock.write(f"{describe_process()}, since {time.strftime('%F %T')}\n")
        self._lock.flush()

    def release(self) -> None:
        """Let the next run in."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

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
        checkpoint = self.store.latest_valid(peers)
        run = self.settings.run
        if checkpoint is not None:
            self._compare(checkpoint, speaks=peers.rank == 0)
            return checkpoint, list(self.store.warnings)
        if run.run.start_from is None:
            return None, []
        parent = open_checkpoint(Path(run.run.start_from), peers)
        raise_faults(ConfigError, _branch_faults(parent, self.settings))
        return parent, []

    def _compare(self, checkpoint: Checkpoint, speaks: bool) -> None:
        stored = read_settings_of_record(self.path)
        changes = changes_since(self.path, stored, checkpoint.record, self.settings)
        if speaks:
            print_changes(changes, self.path, checkpoint.step)
        raise_faults(ConfigError, change_faults(changes, checkpoint.step, self.settings))
        self._history = history_with(stored, changes, checkpoint.step)

    def describe(self, deepspeed_settings: dict[str, Any], versions: dict[str, str], tokenizer: Path) -> None:
        """Write the settings as given and as resolved, what was changed and when, and a copy of the tokenizer."""
        settings = self.settings
        write_text(self.path / "run.toml", settings.run_text)
        write_text(self.path / "deepspeed.json", settings.deepspeed_text)
        write_json(self.path / SETTINGS, {"run": settings.run.model_dump(mode="json"),
                                          "profile": settings.profile.model_dump(mode="json"),
                                          "deepspeed": deepspeed_settings, "origins": settings.origins,
                                          "versions": versions, "changes": self._history})
        if not self.tokenizer_path.exists():
            temporary = self.path / f"tokenizer.tmp-{os.getpid()}"
            shutil.copytree(tokenizer, temporary)
            os.replace(temporary, self.tokenizer_path)


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
