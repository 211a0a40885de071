"""Open pretrained models to fine-tune, and trained classifiers to ask; put texts into batches."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from megatron_ttl.checkpoint.bounded_json import read_json_object
from megatron_ttl.errors import CheckpointError
from megatron_ttl.finetune.backbone import Backbone, Classifier, Encoded, Pooling, read_record
from megatron_ttl.finetune.encoder import EncoderBackbone, load_encoder_classifier
from megatron_ttl.finetune.llama_classifier import LlamaBackbone, load_llama_classifier
from megatron_ttl.finetune.tasks import ClassificationTask
from megatron_ttl.generate.open_folder import choose_device

_BUCKET = 50  # batches that are sorted by length together


def open_backbone(folder: str | os.PathLike[str], task: ClassificationTask, max_tokens: int | None = None,
                  pooling: Pooling = "last") -> Backbone:
    """Open a model folder to fine-tune: one of ours, or an encoder's.

    Args:
        folder: what its config.json calls `llama` is read by us, everything else by transformers as an encoder.
        task: what it is to learn.
        max_tokens: longer texts lose their end; None: as many as the model has positions.
        pooling: what the head of a Llama sees: "last" or "mean"; an encoder's sees [CLS].

    Raises:
        UserError: the folder or a file in it is missing or wrong.
    """
    directory = Path(folder)
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory}: has no config.json; it must be a model folder, as tools/convert_to_hf.py "
                              "writes it, or an encoder's; correct --model")
    if read_json_object(directory / "config.json", follow_links=True).get("model_type") == "llama":
        return LlamaBackbone(directory, task, max_tokens, pooling)
    return EncoderBackbone(directory, task, max_tokens)


def load_classifier(folder: str | os.PathLike[str], device: str = "auto") -> Classifier:
    """Read a classifier that fine-tuning wrote.

    Raises:
        UserError: the device is not there, or the folder is none or damaged.
    """
    directory, where = Path(folder), choose_device(device)
    record = read_record(directory)
    load = load_llama_classifier if record.family == "llama" else load_encoder_classifier
    return load(directory, record, where)


def predict(classifier: Classifier, texts: Sequence[tuple[str, ...]], batch: int = 32) -> list[dict[str, object]]:
    """Return the class of each text, by its name, and the probability of every class."""
    device = next(classifier.module.parameters()).device
    logits = all_logits(classifier.module, classifier.encode(texts), classifier.pad_id, batch, device)
    names = classifier.record.task.label_names
    return [{"label": names[int(row.argmax())], "probabilities": dict(zip(names, row.tolist(), strict=True))}
            for row in logits.softmax(-1)]


@torch.no_grad()
def all_logits(module: nn.Module, encoded: Sequence[Encoded], pad_id: int, batch: int, device: torch.device,
               dtype: str = "float32", progress: Callable[[float], None] | None = None) -> Tensor:
    """Compute the logits of all texts, in their order, fp32 on the host.  # [n, classes]

    Args:
        module: as `Backbone.build` returns it.
        encoded: the texts.
        pad_id: what fills shorter rows.
        batch: texts per call.
        device: where the module is.
        dtype: what to compute in, "float32" or "bfloat16".
        progress: is told the texts done.
    """
    was_training = module.training
    module.eval()
    order = np.argsort([len(text.ids) for text in encoded], kind="stable")[::-1]  # the longest first: memory shows at once
    found: dict[int, Tensor] = {}
    for start in range(0, len(order), batch):
        numbers = order[start : start + batch].tolist()
        with computing_in(dtype, device):
            logits = module(*collate([encoded[number] for number in numbers], pad_id, device))
        found.update(zip(numbers, logits.float().cpu(), strict=True))
        if progress:
            progress(len(found))
    module.train(was_training)
    return torch.stack([found[number] for number in range(len(encoded))])


def computing_in(dtype: str, device: torch.device) -> AbstractContextManager[object]:
    """Compute in bf16 where it loses little, keeping weights in fp32; or in fp32 throughout."""
    return nullcontext() if dtype == "float32" else torch.autocast(device.type, torch.bfloat16)


def collate(texts: Sequence[Encoded], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Put texts into one batch, padded at their ends: ids, what is no padding, and kinds.  # [b, s] each"""
    length = max(len(text.ids) for text in texts)
    ids = torch.full((len(texts), length), pad_id)
    real, kinds = torch.zeros(ids.shape, dtype=torch.bool), torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text.ids)] = torch.tensor(text.ids)
        kinds[row, : len(text.kinds)] = torch.tensor(text.kinds, dtype=torch.long)
        real[row, : len(text.ids)] = True
    return ids.to(device), real.to(device), kinds.to(device)


def epoch_batches(lengths: Sequence[int], batch: int, seed: int, epoch: int) -> Iterator[list[int]]:
    """Yield the numbers of the rows of each batch of an epoch, every row once.

    Rows are shuffled, and texts of like length meet in a batch: within a stretch of fifty batches rows are sorted by
    length, batches are cut, and all batches of the epoch are shuffled. A pure function of its arguments.
    """
    draw = np.random.default_rng([seed, epoch])
    order = draw.permutation(len(lengths))
    batches = []
    for start in range(0, len(order), batch * _BUCKET):
        stretch = sorted(order[start : start + batch * _BUCKET].tolist(), key=lambda number: lengths[number])
        batches += [stretch[first : first + batch] for first in range(0, len(stretch), batch)]
    yield from (batches[number] for number in draw.permutation(len(batches)))
