"""Measure held-out loss: nats per token, perplexity, and bits per byte, which compares across tokenizers.

Text is read in windows of s tokens side by side, without overlap: a token is predicted from 1 to s tokens,
those that precede it in its window. With a stride of n < s windows overlap, and a token is predicted from at least
s - n + 1 tokens, save the first ones of the file: a lower loss, s / n times the work, and never to be compared with the other.
Every token but the first of the file is predicted exactly once in either form, EOS too.
Where documents are kept apart, a token is predicted from those of its own document that precede it in its window, and
the first of each document is not predicted.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_ttl import console
from megatron_ttl.data.causal_lm_dataset import HeldOutDataset
from megatron_ttl.errors import CheckpointError, DataError, UserError, raise_faults
from megatron_ttl.generate.open_folder import OpenModel, open_model_folder
from megatron_ttl.kernels.cross_entropy import IGNORED_LABEL
from megatron_ttl.model.llama import within_documents
from megatron_ttl.parallel.loss import exact_loss_sum, exact_nats


# Not inference_mode: the model may be in training, and keeps its rotary tables.
@torch.no_grad()
def held_out_loss(logits_of: Callable[[Tensor], Tensor], dataset: HeldOutDataset, batch: int,
                  progress: Callable[[float], None] | None = None, device: torch.device | str = "cpu",
                  rank: int = 0, world_size: int = 1) -> tuple[float, int]:
    """Sum the losses of all windows, or of one rank's share, given a model that returns whole logits.

    Args:
        logits_of: [b, s] int64 -> [b, s, v]; a model in training is as good as any, no gradient is kept.
        device: where `logits_of` wants its input.
        dataset, batch, progress, rank, world_size: as for `held_out_nats`, whose result is returned.
    """
    def nats_of(input_ids: Tensor, labels: Tensor) -> float:
        logits = logits_of(input_ids.to(device))  # [b, s, v]
        return float(exact_loss_sum(logits, labels.to(logits.device), logits.shape[-1]))

    return held_out_nats(nats_of, dataset, batch, progress, rank, world_size)


def held_out_nats(nats_of: Callable[[Tensor, Tensor], float], dataset: HeldOutDataset, batch: int,
                  progress: Callable[[float], None] | None = None, rank: int = 0,
                  world_size: int = 1) -> tuple[float, int]:
    """Sum the losses of this rank's share of the windows.

    Rank r takes windows r, r + world_size, ...; every rank calls the model equally often with the same
    shapes, as engines that gather weights during the call need it (windows that are missing count nothing).
    The sums of all ranks, added, are those of one.

    Args:
        nats_of: (input ids, labels), [b, s] int64 on the host -> nats, summed; label -100 is ignored.
        dataset: windows, padded with label -100.
        batch: windows per call (b).
        progress: receives the tokens done on this rank after each call.
        rank, world_size: place among the data-parallel ranks.

    Returns:
        Nats, summed in fp64; tokens that were predicted. The caller adds up ranks and divides.
    """
    assert batch > 0 and 0 <= rank < world_size
    nats, tokens = 0.0, 0
    for _, input_ids, labels in _batches(dataset, batch, rank, world_size):
        tokens += int((labels != IGNORED_LABEL).sum())
        nats += nats_of(torch.from_numpy(input_ids), torch.from_numpy(labels))
        if progress:
            progress(tokens)
    return nats, tokens


def _batches(dataset: HeldOutDataset, batch: int, rank: int,
             world_size: int) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Yield numbers of this rank's windows and [b, s] of each side; windows past the end are copies without labels."""
    share = -(-len(dataset) // world_size)
    for start in range(0, share, batch):
        numbers = [rank + place * world_size for place in range(start, min(start + batch, share))]
        pairs = [dataset.sample(number) if number < len(dataset) else _unlabelled(dataset.sample(0))
                 for number in numbers]
        input_ids, labels = (np.stack(side) for side in zip(*pairs, strict=True))
        yield numbers, input_ids, labels


def _unlabelled(sample: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return sample[0], np.full_like(sample[1], IGNORED_LABEL)


@torch.no_grad()
def nats_by_stretch(logits_of: Callable[[Tensor], Tensor], dataset: HeldOutDataset, batch: int, ends: np.ndarray,
                    progress: Callable[[float], None] | None = None,
                    device: torch.device | str = "cpu") -> tuple[np.ndarray, np.ndarray]:
    """Sum the losses of stretches of a file separately, each label in the stretch that it lies in.

    Args:
        logits_of, dataset, batch, progress, device: as for `held_out_loss`.
        ends: position after the last token of each stretch, ascending; together they hold all that is read.

    Returns:
        Nats, fp64, and predicted tokens of each stretch.
    """
    nats, tokens = np.zeros(len(ends)), np.zeros(len(ends), np.int64)
    for numbers, input_ids, labels in _batches(dataset, batch, 0, 1):
        logits = logits_of(torch.from_numpy(input_ids).to(device))  # [b, s, v]
        found = exact_nats(logits, torch.from_numpy(labels).to(logits.device), logits.shape[-1]).cpu().numpy()
        asked = labels != IGNORED_LABEL
        places = np.array(numbers)[:, None] * dataset.stride + 1 + np.arange(labels.shape[1])  # of the labels
        stretches = np.searchsorted(ends, places[asked], side="right")
        nats += np.bincount(stretches, found[asked], len(ends))
        tokens += np.bincount(stretches, minlength=len(ends))
        if progress:
            progress(int(tokens.sum()))
    return nats, tokens


def perplexity_report(folder: str | os.PathLike[str], prefixes: Iterable[str | os.PathLike[str]],
                      batch: int = 8, max_tokens: int | None = None, sequence_length: int | None = None,
                      device: str = "auto", dtype: str = "float32", document_mask: bool = False,
                      stride: int | None = None) -> dict[str, Any]:
    """Evaluate a model folder on tokenised datasets.

    Args:
        folder: model folder with its tokenizer.
        prefixes: datasets made with the same tokenizer.
        batch: windows per call.
        max_tokens: read at most so many tokens of each dataset.
        sequence_length: tokens per window; None: as many as the model has positions.
        device, dtype: as for `open_model_folder`.
        document_mask: keep documents apart, as a run with data.document_mask does.
        stride: let windows overlap, each so many tokens behind the one before it; None: side by side.

    Returns:
        The settings, `prefixes` (a list of measurements) and `total`. A dataset whose manifest names several files has
        a measurement of each in `sources`.

    Raises:
        UserError: every fault of the numbers, then of the folder, then of all datasets.
    """
    prefixes = list(dict.fromkeys(map(os.fspath, prefixes)))
    raise_faults(UserError, _number_faults(prefixes, batch, max_tokens, sequence_length, stride))
    opened = open_model_folder(folder, device, dtype)
    length = sequence_length or opened.config.max_position_embeddings
    datasets = _open_datasets(opened, prefixes, length, max_tokens, document_mask, stride)
    logits_of = partial(within_documents, opened.model, eos_id=opened.tokenizer.eos_id) if document_mask else opened.model
    rows = []
    started = time.perf_counter()
    for prefix, dataset in datasets.items():
        with console.progress(f"evaluating {prefix}", dataset.label_count, "tokens") as report:
            rows.append(_dataset_row(opened, prefix, dataset, logits_of, batch, report))
    seconds = time.perf_counter() - started
    sums = {key: sum(row[key] for row in rows) for key in ("nats", "tokens", "bytes", "windows")}
    total = {"prefix": "total", **_measures(opened, sums["nats"], sums["tokens"], sums["bytes"]),
             "windows": sums["windows"], "complete": all(row["complete"] for row in rows)}
    return {"model": str(opened.directory), "tokenizer": opened.tokenizer.checksum,
            "device": str(opened.device), "dtype": dtype, "context_tokens": length,
            "windowing": windowing(stride, document_mask),
            "prefixes": rows, "total": total, "tokens_per_s": round(sums["tokens"] / seconds, 1)}


def windowing(stride: int | None, document_mask: bool) -> str:
    """Say how text is cut into windows: losses compare only where this and the length of the windows are equal."""
    how = "chunked, non-overlapping" if stride is None else f"sliding, stride {stride}, each token predicted once"
    return f"{how}; a token sees what precedes it in its window{' and its document' if document_mask else ''}"


def _dataset_row(opened: OpenModel, prefix: str, dataset: HeldOutDataset, logits_of: Callable[[Tensor], Tensor],
                 batch: int, progress: Callable[[float], None]) -> dict[str, Any]:
    """Measure one dataset, and each file that it was made of where there are several."""
    files, ends = _files_of(dataset)
    nats, tokens = nats_by_stretch(logits_of, dataset, batch, ends, progress, opened.device)
    row = {"prefix": prefix, **_measures(opened, float(nats.sum()), int(tokens.sum()), _target_bytes(opened, dataset)),
           "windows": len(dataset), "complete": dataset.token_count == dataset.dataset.token_count}
    if len(files) > 1:
        starts = np.concatenate(([0], ends[:-1]))
        row["sources"] = [
            {"source": name, **_measures(opened, float(one), int(count), _label_bytes(opened, dataset, start, end))}
            for name, start, end, one, count in zip(files, starts, ends, nats, tokens, strict=True) if count]
    return row


def _files_of(dataset: HeldOutDataset) -> tuple[list[str], np.ndarray]:
    """Return the files that a dataset was made of, in order, and the position after the last token of each."""
    found = [source for source in dataset.manifest.sources if source.documents]
    last = np.cumsum([source.documents for source in found], dtype=np.int64)
    if not found or last[-1] != dataset.dataset.document_count:  # written by another program, or imported
        return [dataset.prefix], np.array([dataset.dataset.token_count])
    return [source.file for source in found], dataset.dataset.document_ends()[last - 1]


def _label_bytes(opened: OpenModel, dataset: HeldOutDataset, start: int, end: int) -> int:
    """Count the UTF-8 bytes of the tokens that are predicted in a stretch, piece by piece."""
    start, end = max(start, 1), min(end, dataset.token_count)
    ids = np.asarray(dataset.dataset.tokens[start - 1 : end])
    labels = ids[1:] if dataset.eos_id is None else ids[1:][ids[:-1] != dataset.eos_id]
    return int(np.array(opened.tokenizer.bytes_per_id())[labels].sum())


def _number_faults(prefixes: list[str], batch: int, max_tokens: int | None, sequence_length: int | None,
                   stride: int | None) -> Iterator[str]:
    if not prefixes:
        yield ("perplexity: no dataset; it must be one or more prefixes; name what tools/preprocess_data.py "
               "wrote")
    for name, value in (("batch", batch), ("max_tokens", max_tokens), ("sequence_length", sequence_length),
                        ("stride", stride)):
        if value is not None and value < 1:
            yield f"{name}: {value}; it must be at least 1; leave it out for the usual value"


def _open_datasets(opened: OpenModel, prefixes: list[str], sequence_length: int,
                   max_tokens: int | None, document_mask: bool, stride: int | None) -> dict[str, HeldOutDataset]:
    """Open all datasets and check each against the model; all faults at once."""
    datasets, faults = {}, []
    positions = opened.config.max_position_embeddings
    if sequence_length > positions:
        faults.append(f"sequence_length: {sequence_length}; {opened.directory} has {positions} positions; "
                      "give at most so many")
    if stride and stride > sequence_length:
        faults.append(f"stride: {stride}; windows have {sequence_length} tokens, and with a larger stride some would be "
                      "in none; give at most so many, or none for windows side by side")
        stride = None
    for prefix in prefixes:
        try:
            datasets[prefix] = HeldOutDataset(prefix, sequence_length, max_tokens, document_mask, stride)
        except DataError as error:
            faults += error.faults
        else:
            faults += _fit_faults(opened, prefix, datasets[prefix])
    raise_faults(DataError, faults)
    return datasets


def _fit_faults(opened: OpenModel, prefix: str, dataset: HeldOutDataset) -> Iterator[str]:
    manifest, tokenizer = dataset.manifest, opened.tokenizer
    if manifest is None:
        yield (f"{prefix}.json: does not exist; it must say which tokenizer made the ids; write the dataset "
               "with tools/preprocess_data.py")
    elif manifest.tokenizer.checksum != tokenizer.checksum:
        yield (f"{prefix}: its tokenizer is {manifest.tokenizer.checksum}, that of {opened.directory} is "
               f"{tokenizer.checksum}; they must be the same; tokenize the text again with --tokenizer "
               f"{opened.directory}")
    if (largest := int(dataset.dataset.tokens[: dataset.token_count].max())) >= opened.config.vocab_size:
        yield (f"{prefix}: holds id {largest}; {opened.directory} has {opened.config.vocab_size} rows, every "
               "id must be below; the file is damaged: copy it again, or tokenize the text again")


def _target_bytes(opened: OpenModel, dataset: HeldOutDataset) -> int:
    """Count the UTF-8 bytes of the tokens that are predicted: all that are read but the first, of all or of each document."""
    ids = np.asarray(dataset.dataset.tokens[: dataset.token_count])
    unasked = ids[:1]
    if dataset.eos_id is not None:
        unasked = np.append(unasked, ids[1:][ids[:-1] == dataset.eos_id])
    numbers, counts = np.unique(unasked, return_counts=True)
    first = sum(count * _text_bytes(opened.tokenizer.decode([number]))
                for number, count in zip(numbers.tolist(), counts.tolist(), strict=True))
    if dataset.token_count == dataset.dataset.token_count:
        return dataset.manifest.text_bytes - first
    documents = np.split(ids, np.flatnonzero(ids == opened.tokenizer.eos_id) + 1)
    return sum(len(opened.tokenizer.decode(document).encode()) for document in documents) - first


def _text_bytes(piece: str) -> int:
    return 1 if piece == "\ufffd" else len(piece.encode())  # a byte piece alone is no UTF-8


def _measures(opened: OpenModel, nats: float, tokens: int, text_bytes: int) -> dict[str, Any]:
    mean = nats / tokens
    if not mean < 700:  # NaN too
        ignorant = math.log(opened.config.vocab_size)
        raise CheckpointError(f"{opened.directory}: its loss is {mean:g} nats per token; a model that knows "
                              f"nothing has {ignorant:.1f}; the weights are damaged or overflow in this "
                              "dtype: try float32, or convert the checkpoint again")
    return {"nats_per_token": mean, "perplexity": math.exp(mean),
            "bits_per_byte": nats / math.log(2) / text_bytes if text_bytes else None, "tokens": tokens,
            "bytes": text_bytes, "nats": nats}
