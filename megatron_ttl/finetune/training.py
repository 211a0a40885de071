"""Train one classifier from one seed, and keep the epoch that the validation rows like best."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ttl.errors import UserError
from megatron_ttl.files import atomic_directory, or_disk_error
from megatron_ttl.finetune.backbone import Backbone, Encoded
from megatron_ttl.finetune.classifier import all_logits, collate, computing_in, epoch_batches
from megatron_ttl.finetune.metrics import measure

CLASSIFIER = "classifier"
"""Folder of a seed's best classifier."""


@dataclass(frozen=True)
class HyperParameters:
    """How a classifier is trained. Source of the defaults: TeenyTinyLlama (Corrêa et al. 2024), Table 5, and where it is
    silent those of Hugging Face's Trainer."""

    epochs: int = 3
    batch: int = 16
    learning_rate: float = 4e-5
    """Of the first step; it falls linearly to 0."""
    epsilon: float = 1e-8
    weight_decay: float = 0.01
    """Of matrices; norms and biases have none."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    warmup: float = 0.0
    """Share of the steps in which the learning rate rises from 0."""
    dtype: str = "float32"
    """float32, or bfloat16: computed in bf16, weights and moments in fp32."""


@dataclass(frozen=True)
class LabelledTexts:
    """Encoded texts and their classes."""

    encoded: list[Encoded]
    labels: list[int]


def train_seed(backbone: Backbone, train: LabelledTexts, validation: LabelledTexts, names: Sequence[str], metric: str,
               settings: HyperParameters, seed: int, folder: Path, device: torch.device, untrained: bool = False,
               progress: Callable[[float], None] | None = None) -> dict[str, Any]:
    """Train a classifier and write the one of its best epoch to `folder/classifier`.

    The seed decides head, order and dropout. The best epoch has the highest metric on the validation rows; of equals it
    is the one with the lowest loss there.

    Args:
        backbone: what to start from.
        train, validation: what to learn from, and what to choose the epoch by.
        names: of the classes.
        metric: "accuracy" or "f1_macro".
        settings: how.
        seed: see above.
        folder: of the seed; made if missing.
        device: where to compute.
        untrained: start from random weights instead.
        progress: is told the texts done, over all epochs.

    Returns:
        `epochs` (a row each), `best_epoch` (from 1), and its `validation` figures.

    Raises:
        UserError: the loss is no number.
        DiskError: the classifier cannot be written.
    """
    module = backbone.build(seed, untrained, device).train()
    optimizer = build_optimizer(module, settings)
    steps = settings.epochs * math.ceil(len(train.labels) / settings.batch)
    lengths = [len(text.ids) for text in train.encoded]
    labels = torch.tensor(train.labels)
    rows: list[dict[str, Any]] = []
    best: tuple[float, float] | None = None
    step, done = 0, 0
    for epoch in range(1, settings.epochs + 1):
        total = 0.0
        for numbers in epoch_batches(lengths, settings.batch, seed, epoch):
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * rate_at(step, steps, settings.warmup)
            batch = collate([train.encoded[number] for number in numbers], backbone.pad_id, device)
            loss = _step(module, optimizer, batch, labels[numbers].to(device), settings, device)
            if not math.isfinite(loss):
                raise UserError(f"seed {seed}, step {step + 1}: the loss is {loss}; it must be a number; try a lower "
                                "--learning-rate, or --dtype float32")
            total += loss * len(numbers)
            step, done = step + 1, done + len(numbers)
            if progress:
                progress(done)
        figures = _validate(module, validation, names, backbone.pad_id, settings, device)
        rows.append({"epoch": epoch, "train_loss": total / len(train.labels), **figures})
        quality = (figures[metric], -figures["loss"])
        if best is None or quality > best:
            best, kept = quality, rows[-1]
            with or_disk_error(folder), atomic_directory(folder / CLASSIFIER) as temporary:
                backbone.write(module, temporary)
    return {"seed": seed, "epochs": rows, "best_epoch": kept["epoch"], "validation": kept}


def build_optimizer(module: nn.Module, settings: HyperParameters) -> torch.optim.AdamW:
    """Build AdamW; matrices decay, vectors (norms and biases) do not."""
    groups = [{"params": [p for p in module.parameters() if (p.dim() > 1) == matrices], "weight_decay": decay}
              for matrices, decay in ((True, settings.weight_decay), (False, 0.0))]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, eps=settings.epsilon)


def rate_at(step: int, steps: int, warmup: float = 0.0) -> float:
    """Return the share of the learning rate for a step, from 0: a linear rise, then a linear fall to 0 after the last."""
    rising = math.ceil(warmup * steps)
    return step / rising if step < rising else (steps - step) / max(1, steps - rising)


def _step(module: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, ...], labels: Tensor,
          settings: HyperParameters, device: torch.device) -> float:
    with computing_in(settings.dtype, device):
        logits = module(*batch)
    loss = F.cross_entropy(logits.float(), labels)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(module.parameters(), settings.clip)
    optimizer.step()
    return float(loss.detach())


def _validate(module: nn.Module, rows: LabelledTexts, names: Sequence[str], pad_id: int, settings: HyperParameters,
              device: torch.device) -> dict[str, Any]:
    logits = all_logits(module, rows.encoded, pad_id, 2 * settings.batch, device, settings.dtype)
    figures = measure(rows.labels, logits.argmax(-1).tolist(), names)
    return {"loss": float(F.cross_entropy(logits, torch.tensor(rows.labels))),
            **{key: figures[key] for key in ("n", "accuracy", "f1_macro")}}
