"""What fine-tuning asks of a pretrained model, and what a classifier's folder says of itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from megatron_ttl.checkpoint.bounded_json import read_json_object
from megatron_ttl.config.schema import ModelConfig
from megatron_ttl.errors import CheckpointError
from megatron_ttl.evaluate.records import ScoredModel
from megatron_ttl.files import checksum, checksum_bytes
from megatron_ttl.finetune.tasks import ClassificationTask

RECORD = "classifier.json"
CURE = "use a folder that tools/finetune.py wrote"
Pooling = Literal["last", "mean"]
_MODEL = ConfigDict(strict=True, frozen=True, extra="forbid", use_attribute_docstrings=True)


@dataclass(frozen=True)
class Encoded:
    """A text as a model reads it."""

    ids: list[int]
    kinds: list[int]
    """0 for the first text and 1 for the second, where a model wants to know; empty where not."""
    cut: bool
    """Whether the text was too long and lost its end."""


class Backbone(Protocol):
    """A pretrained model that can become a classifier."""

    scored: ScoredModel
    """Which weights it has."""
    pad_id: int

    def encode(self, texts: Sequence[tuple[str, ...]]) -> list[Encoded]:
        """Return the ids of texts, or of pairs of texts."""
        ...

    def build(self, seed: int, untrained: bool, device: torch.device) -> nn.Module:
        """Return (ids [b, s], real [b, s], kinds [b, s]) -> logits [b, classes], its head drawn from a seed.

        Where it has dropout, that goes on from the same seed: whoever trains it needs no other.

        Args:
            seed: of the head, and of all weights if untrained.
            untrained: draw the backbone's weights too.
            device: where it is to be.
        """
        ...

    def write(self, module: nn.Module, folder: Path) -> None:
        """Write a trained module and all that is needed to use it into a folder, which is there."""
        ...


class ClassifierRecord(BaseModel):
    """What a classifier's folder says of itself."""

    model_config = _MODEL

    format: Literal["megatron_ttl classifier"] = "megatron_ttl classifier"
    version: Literal[1] = 1
    family: Literal["llama", "encoder"]
    base: str
    """Name of the model folder it was made from."""
    base_checksum: str
    task: ClassificationTask
    max_tokens: int
    pooling: Pooling = "last"
    add_bos: bool = True
    model: ModelConfig | None = None
    """Shape of a Llama; an encoder has its own config.json."""


@dataclass(frozen=True)
class Classifier:
    """A trained classifier, ready to be asked."""

    record: ClassifierRecord
    module: nn.Module
    pad_id: int
    encode: Callable[[Sequence[tuple[str, ...]]], list[Encoded]]


def read_record(folder: Path) -> ClassifierRecord:
    """Read what a classifier's folder says of itself.

    Raises:
        CheckpointError: it is none.
    """
    if not (folder / RECORD).is_file():
        raise CheckpointError(f"{folder}: is no classifier (it has no {RECORD}); it must be one; {CURE}")
    read_json_object(folder / RECORD)
    try:
        return ClassifierRecord.model_validate_json((folder / RECORD).read_bytes())
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise CheckpointError(f"{folder / RECORD}: {where}: {error.errors()[0]['msg']}; it must be as it was written; "
                              f"{CURE}") from None


def describe(folder: Path, parameters: int) -> ScoredModel:
    """Describe a model folder by its name and a checksum of its safetensors, of their names and contents."""
    files = sorted(path for path in folder.iterdir() if path.suffix == ".safetensors")
    digest = checksum_bytes("\n".join(f"{path.name} {checksum(path)}" for path in files).encode())
    return ScoredModel(name=folder.resolve().name, checksum=digest, parameters=parameters)


def settings_of(record: ClassifierRecord) -> dict[str, Any]:
    """Return what decides how texts are read, for records."""
    return {"max_tokens": record.max_tokens, "pooling": record.pooling if record.family == "llama" else "[CLS]",
            "separator": record.task.separator if record.family == "llama" else "[SEP]"}
