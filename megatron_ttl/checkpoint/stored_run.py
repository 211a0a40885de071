"""Open the folder of a run for reading: the model's shape, its tokenizer, its checkpoints."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from megatron_ttl.checkpoint.bounded_json import read_json_object
from megatron_ttl.checkpoint.names import hf_shapes
from megatron_ttl.checkpoint.store import Checkpoint, CheckpointStore
from megatron_ttl.config.schema import ModelConfig
from megatron_ttl.errors import CheckpointError, raise_faults


@dataclass(frozen=True)
class StoredRun:
    """A run folder."""

    directory: Path
    config: ModelConfig
    store: CheckpointStore

    @property
    def name(self) -> str:
        """Name of the folder, without its place."""
        return self.directory.resolve().name

    @property
    def tokenizer_directory(self) -> Path:
        """The tokenizer that the data was made with."""
        return self.directory / "tokenizer"

    def checkpoint(self, step: int | None = None) -> Checkpoint:
        """Open and verify the checkpoint of a step, or the newest valid one.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        checkpoint = self.store.latest_valid() if step is None else self.store.open(step)
        if checkpoint is None:
            raise CheckpointError(f"{self.directory}: has no checkpoint yet; the run must have saved one; train it "
                                  "further")
        return checkpoint


def open_run(run: str | os.PathLike[str]) -> StoredRun:
    """Read the settings of a run folder; nothing in it is changed.

    Raises:
        CheckpointError: it is no run folder, or its settings are damaged.
    """
    folder = Path(run)
    if not (folder / "settings.json").is_file():
        raise CheckpointError(f"{folder}: is no run folder (it has no settings.json); it must be the run.dir "
                              "of a training; correct the path")
    settings = read_json_object(folder / "settings.json")
    try:
        config = ModelConfig.model_validate(settings["run"]["model"])
    except (KeyError, TypeError, ValidationError) as error:
        raise CheckpointError(f"{folder / 'settings.json'}: run.model cannot be read ({str(error)[:200]}); "
                              "it must be as the run wrote it; restore the file") from None
    return StoredRun(folder, config, CheckpointStore(folder / "checkpoints"))


def require_weights(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Refuse a checkpoint whose weights are not those of a model of this shape.

    Raises:
        CheckpointError: with all faults.
    """
    expected = hf_shapes(config)
    entries = checkpoint.manifest.groups.get("weights", {})
    found = {name: tuple(entry.shape) for name, entry in entries.items()}
    raise_faults(CheckpointError, [
        f"{checkpoint.directory}: {name}: has shape {found.get(name)}; the run's settings ask for "
        f"{expected.get(name)}; they must belong together; use the settings of this run"
        for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)])
