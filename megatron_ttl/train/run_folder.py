"""The run folder: one owner at a time, the settings it was started with, its metrics and checkpoints."""

from __future__ import annotations

import fcntl
import time
from pathlib import Path
from typing import IO, Any

from megatron_ttl.checkpoint.bounded_json import read_json_object
from megatron_ttl.checkpoint.peers import ALONE, Peers
from megatron_ttl.checkpoint.store import Checkpoint, CheckpointStore
from megatron_ttl.config.changes import forbidden_changes
from megatron_ttl.config.load import Settings
from megatron_ttl.errors import CheckpointError, ConfigError, raise_faults
from megatron_ttl.files import atomic_directory, open_own, write_json, write_text
from megatron_ttl.runtime import describe_process
from megatron_ttl.tokenizer.folder import copy_tokenizer


class RunFolder:
    """Paths of a run, and the lock that keeps a second run out."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.path = Path(settings.run.run.dir)
        self.metrics_path = self.path / "metrics.jsonl"
        self.tokenizer_path = self.path / "tokenizer"
        self._lock: IO[str] | None = None
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
            self._lock = open_own(lock_path, "r+")
        except OSError as error:
            raise ConfigError(f"run.dir: '{error.filename or self.path}' cannot be written ({error.strerror}); it must "
                              "be a folder of yours, and its run.lock a file; choose another run.dir") from None
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
            ConfigError: the run file was changed in a way that would make it another run.
        """
        checkpoint = self.store.latest_valid(peers)
        run = self.settings.run
        if checkpoint is not None:
            _require_record(checkpoint)
            raise_faults(ConfigError, forbidden_changes(self._stored()["run"], run))
            return checkpoint, list(self.store.warnings)
        if run.run.start_from is None:
            return None, []
        parent = open_checkpoint(Path(run.run.start_from), peers)
        _require_record(parent)
        raise_faults(ConfigError, _branch_faults(parent, self.settings))
        return parent, []

    def _stored(self) -> dict[str, Any]:
        path = self.path / "settings.json"
        try:
            stored = read_json_object(path, follow_links=True).get("run")
            why = "" if isinstance(stored, dict) else "it has no table 'run'"
        except CheckpointError as error:
            why = str(error).removeprefix(f"{path}: ").partition(";")[0]
        if why:
            raise CheckpointError(f"{path}: the settings of the run cannot be read ({why}); they must lie beside its "
                                  "checkpoints; restore the file or choose another run.dir")
        return {"run": stored}

    def describe(self, deepspeed_settings: dict[str, Any], versions: dict[str, str], tokenizer: Path) -> None:
        """Write the settings as given and as resolved, and a copy of the tokenizer."""
        settings = self.settings
        write_text(self.path / "run.toml", settings.run_text)
        write_text(self.path / "deepspeed.json", settings.deepspeed_text)
        write_json(self.path / "settings.json", {"run": settings.run.model_dump(mode="json"),
                                                 "deepspeed": deepspeed_settings, "origins": settings.origins,
                                                 "versions": versions})
        if not self.tokenizer_path.exists():
            with atomic_directory(self.tokenizer_path) as folder:
                copy_tokenizer(tokenizer, folder)


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
    faults += [f"run.{key}: {type(run.get(key)).__name__}; it must be a table" for key in ("model", "data", "train")
               if not isinstance(run.get(key), dict)]
    if not faults and record["step"] != checkpoint.step:
        faults.append(f"step: {record['step']}; the manifest says {checkpoint.step}")
    raise_faults(CheckpointError, (f"{where}: {fault}; use a checkpoint of a training run" for fault in faults))


def _branch_faults(parent: Checkpoint, settings: Settings) -> list[str]:
    """Say what keeps a run from going on at the parent's weights and data position."""
    stored, now = parent.record["run"], settings.run.model_dump(mode="json")
    faults = []
    for key in ("model", "data"):
        if stored[key] != now[key]:
            faults.append(f"{settings.run_path}: {key}: differs from the checkpoint {parent.directory}; a branch goes "
                          "on with the same model and at the same place of the same data; copy the section from its "
                          "settings.json")
    before, after = stored["train"].get("sequence_length"), now["train"]["sequence_length"]
    if before != after:
        faults.append(f"{settings.run_path}: train.sequence_length: {after} here, {before} in the checkpoint; "
                      "the data position counts sequences; keep the length")
    if settings.run.total_steps <= parent.step:
        faults.append(f"{settings.run_path}: train.steps: {settings.run.total_steps}, and the checkpoint is at step "
                      f"{parent.step}; the horizon counts from the first step of the parent; set a larger one")
    return faults
