"""The protocol of many trainers, to show that the trials can fail: write into the final folder, then a `latest` file.

`open("latest", "w")` has emptied the file before the new name is in it: a kill between the two leaves a run that does
not know its checkpoints.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

from megatron_ttl.checkpoint.peers import ALONE


class NaiveStore:
    """Looks like a `CheckpointStore` of one process."""

    def __init__(self, directory: str | os.PathLike[str], keep_last: int = 2) -> None:
        self.directory, self.keep_last = Path(directory), keep_last

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Any]], record: Mapping[str, Any],
             peers: Any = ALONE) -> None:
        """Write the folder, then its name into `latest`, then delete what need not stay."""
        folder = self.directory / f"step-{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        for group, found in tensors.items():
            with open(folder / f"{group}.safetensors", "wb") as handle:
                handle.write(to_bytes({name: piece.tensor.contiguous() for name, piece in found.items()}))
        with open(folder / "record.json", "w", encoding="utf-8") as handle:
            json.dump({**record, "groups": list(tensors)}, handle)
        with open(self.directory / "latest", "w", encoding="utf-8") as handle:
            handle.write(folder.name)
        for old in sorted(self.directory.glob("step-*"))[: -self.keep_last]:
            shutil.rmtree(old)

    def latest_valid(self, peers: Any = ALONE) -> Any:
        """Read the folder that `latest` names; None where there is no such file."""
        if not (self.directory / "latest").exists():
            return None
        folder = self.directory / (self.directory / "latest").read_text(encoding="utf-8")
        record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
        groups = {group: load_file(folder / f"{group}.safetensors") for group in record["groups"]}
        return SimpleNamespace(step=record["step"], record=record, tensors=groups.__getitem__)
