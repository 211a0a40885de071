"""Cut flat token files into samples for next-token prediction: `(input_ids, labels)`, labels already shifted.

A source is the stream of its documents, one after another, each closed by its EOS. `packing.py` says which ids of it
make a window, s inputs and s labels; usually `tokens[w * s : w * s + s + 1]`, whatever document they are of.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from megatron_ttl.data.indexed_dataset import IndexedDataset
from megatron_ttl.data.manifest import require_same_tokens
from megatron_ttl.data.mixture import StagedMixture
from megatron_ttl.data.order import EpochOrder
from megatron_ttl.data.packing import IGNORED_LABEL, BestFit, Concatenated, Packing
from megatron_ttl.errors import DataError, collected, raise_faults


class CausalLMDataset:
    """Training samples without end: sources mixed by weight, each in epochs of its own.

    Sample i is a function of (sources, weights, stages, sequence length, seed) and i alone. It does not depend on the
    length of the run, on ranks, micro batches or workers, so a position in the data is one integer.

    Args:
        sources: (prefix, weight) of each tokenised dataset; weights are relative shares of the tokens.
        sequence_length: s.
        seed: of the order.
        stages: (token of the run before which it ends, weights of all sources) of each; the weights of `sources` then
            say nothing. Ends are whole samples, ascending; the last stage goes on without end.
        packing: "concatenate" or "best_fit", see `packing.py`.
        document_mask: attention is to stay within documents: what follows an EOS is no label.

    Attributes:
        mixture: which source each sample comes from.
        samples_per_epoch: windows of each source.
        used_tokens: ids of each source that its windows read.
        remainder_tokens: ids of each source that no window reads.
        padding: input positions in an epoch of each source that hold none of its ids.
        all_labelled: whether every position of every sample has a label.
        eos_id: what ends a document, if attention is to stay within documents.
        unchecked_prefixes: sources without a manifest, whose tokenizer nobody can check.

    Raises:
        DataError: all faults of all sources: damaged, held out, too short, named twice, of unlike tokenizers.
    """

    def __init__(self, sources: Sequence[tuple[str, float]], sequence_length: int, seed: int,
                 stages: Sequence[tuple[int | None, Sequence[float]]] = (), packing: str = "concatenate",
                 document_mask: bool = False) -> None:
        assert sources and sequence_length > 0, (sources, sequence_length)
        assert packing in ("concatenate", "best_fit"), packing
        self.sequence_length = sequence_length
        self.seed = seed
        self.packing = packing
        self.document_mask = document_mask
        self.all_labelled = packing == "concatenate" and not document_mask
        self.datasets = _open_all([prefix for prefix, _ in sources])
        raise_faults(DataError, self._faults([weight for _, weight in sources]))
        manifests = {dataset.prefix: dataset.manifest for dataset in self.datasets if dataset.manifest}
        require_same_tokens(manifests, "training")
        self.weights = [weight for _, weight in sources]
        self.unchecked_prefixes = [dataset.prefix for dataset in self.datasets if dataset.manifest is None]
        first = self.datasets[0].manifest
        self.eos_id = first.tokenizer.eos_id if document_mask and first else None
        self._packings = [self._pack(dataset) for dataset in self.datasets]
        self.samples_per_epoch = [packed.rows for packed in self._packings]
        self.used_tokens = [packed.used_tokens for packed in self._packings]
        self.remainder_tokens = [packed.remainder_tokens for packed in self._packings]
        self.padding = [packed.padding for packed in self._packings]
        self._stages = [(until, list(weights)) for until, weights in stages]
        self.mixture = StagedMixture([(until and until // sequence_length, weights)
                                      for until, weights in self._stages or [(None, self.weights)]])
        self._orders = [EpochOrder(size, seed, source) for source, size in enumerate(self.samples_per_epoch)]
        self._tokens = [dataset.ids for dataset in self.datasets]

    def _faults(self, weights: list[float]) -> list[str]:
        faults = []
        seen: dict[str, str] = {}
        for dataset, weight in zip(self.datasets, weights, strict=True):
            if not (math.isfinite(weight) and weight > 0):
                faults.append(f"{dataset.prefix}: has weight {weight}; a weight is a number above 0; "
                              "correct it, or take the source out")
            if self.packing == "best_fit" and dataset.token_count <= dataset.document_count:
                faults.append(f"{dataset.prefix}: has {dataset.token_count:,} tokens in {dataset.document_count:,} "
                              "documents; one sample needs a document of two; tokenise more text")
            if self.packing == "concatenate" and dataset.token_count < self.sequence_length + 1:
                faults.append(f"{dataset.prefix}: has {dataset.token_count:,} tokens; one sample needs "
                              f"{self.sequence_length + 1:,}; tokenise more text, or shorten the sequence")
            if self.document_mask and dataset.manifest is None:
                faults.append(_no_eos_known(dataset.prefix))
            split = dataset.manifest.held_out if dataset.manifest else None
            if split and split.role == "held_out":
                faults.append(f"{dataset.prefix}: is held-out data; training may not read it; "
                              "name the training side of the split, and this one under [evaluation]")
            real = os.path.realpath(dataset.paths.bin)
            if real in seen:
                faults.append(f"{dataset.prefix}: is the same data as {seen[real]}; a source is named once; "
                              "add the two weights")
            seen[real] = dataset.prefix
        return faults

    def _pack(self, dataset: IndexedDataset) -> Packing:
        if self.packing == "concatenate":
            return Concatenated(dataset.token_count, self.sequence_length)
        filler = dataset.manifest.tokenizer.eos_id if dataset.manifest else 0
        return BestFit(dataset.document_ends(), self.sequence_length, filler)

    def locate(self, sample: int) -> tuple[int, int, int]:
        """Return (source number, epoch of that source, window) of a sample."""
        source, index = self.mixture.locate(sample)
        epoch, window = self._orders[source].locate(index)
        return source, epoch, window

    def locate_many(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (source numbers, epochs, windows) of many samples, int64; equal to `locate` of each."""
        sources, indices = self.mixture.locate_many(samples)
        epochs, windows = np.empty_like(indices), np.empty_like(indices)
        for source in np.unique(sources):
            chosen = sources == source
            epochs[chosen], windows[chosen] = self._orders[source].locate_many(indices[chosen])
        return sources, epochs, windows

    def sample(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (input_ids, labels) of a sample, int64.  # [s], [s]"""
        input_ids, labels = self.samples(np.array([number]))
        return input_ids[0], labels[0]

    def samples(self, numbers: np.ndarray | Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return (input_ids, labels) of many samples, int64.  # [len(numbers), s] both"""
        sources, _, windows = self.locate_many(np.asarray(numbers, dtype=np.int64))
        s = self.sequence_length
        input_ids = np.empty((len(windows), s), np.int64)
        labels = np.empty((len(windows), s), np.int64)
        for row, (source, window) in enumerate(zip(sources.tolist(), windows.tolist(), strict=True)):
            self._packings[source].fill(self._tokens[source], window, input_ids[row], labels[row])
        if self.eos_id is not None:
            labels[input_ids == self.eos_id] = IGNORED_LABEL
        return input_ids, labels

    def documents(self, numbers: Sequence[int]) -> dict[str, list[list[int]]]:
        """Return for each prefix the documents that samples read from: ranges of numbers, first and last, ascending."""
        sources, _, windows = self.locate_many(np.asarray(numbers, dtype=np.int64))
        found: dict[str, list[list[int]]] = {}
        for source in np.unique(sources).tolist():
            dataset = self.datasets[source]
            ends = dataset.document_ends()
            firsts, lasts = (np.searchsorted(ends, places, side="right")
                             for places in self._packings[source].stretches(windows[sources == source]))
            ranges: list[list[int]] = []
            for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
                if ranges and first <= ranges[-1][1] + 1:
                    ranges[-1][1] = max(ranges[-1][1], last)
                else:
                    ranges.append([first, last])
            found[dataset.prefix] = ranges
        return found

    def samples_drawn(self, consumed_samples: int) -> list[int]:
        """Return how many of the first `consumed_samples` samples came from each source."""
        return self.mixture.counts(consumed_samples)

    def epochs(self, consumed_samples: int) -> list[float]:
        """Return how often each source was read after `consumed_samples` samples."""
        drawn = self.samples_drawn(consumed_samples)
        return [count / size for count, size in zip(drawn, self.samples_per_epoch, strict=True)]

    def packing_report(self) -> dict[str, Any]:
        """Return how documents lie in samples, what no sample reads, and the share of all positions that is padding.

        The share is that of a run that draws from the sources by their weights.
        """
        shares = [padding / (rows * self.sequence_length)
                  for padding, rows in zip(self.padding, self.samples_per_epoch, strict=True)]
        mean = sum(weight * share for weight, share in zip(self.weights, shares, strict=True)) / sum(self.weights)
        return {"packing": self.packing, "document_mask": self.document_mask,
                "remainder_tokens": sum(self.remainder_tokens), "padding_share": mean}

    def record(self) -> dict[str, Any]:
        """Return what determines every sample, for a checkpoint: equal records mean equal samples."""
        stages = [{"until_tokens": until, "weights": weights} for until, weights in self._stages]
        return {
            "sequence_length": self.sequence_length,
            "seed": self.seed,
            **({"stages": stages} if stages else {}),
            "packing": self.packing,
            "document_mask": self.document_mask,
            "sources": [
                {
                    "prefix": dataset.prefix,
                    "weight": weight,
                    "tokens": dataset.token_count,
                    "checksum": dataset.manifest.bin.checksum if dataset.manifest else None,
                }
                for dataset, weight in zip(self.datasets, self.weights, strict=True)
            ],
        }


class HeldOutDataset:
    """The windows of a dataset in file order, each label once: what a loss on unseen text is measured on.

    Windows lie side by side, or overlap: then the labels of a window but the first are its last `stride`, and what
    precedes these in the window is only seen. The last window may be partial: it is filled up with inputs that no label
    asks about (label -100).

    Args:
        prefix: a tokenised dataset that is not the training side of a split.
        sequence_length: s.
        max_tokens: read the first so many ids at most; absent: all.
        document_mask: attention is to stay within documents: what follows an EOS is no label.
        stride: how far a window lies behind the one before it, 1 to s; absent: s, side by side.

    Attributes:
        token_count: ids that are read.
        label_count: labels over all windows: all that are read but the first, of all or of each document.
        eos_id: what ends a document, if attention is to stay within documents.

    Raises:
        DataError: damaged, the training side of a split, or without a single label.
    """

    def __init__(self, prefix: str | os.PathLike[str], sequence_length: int,
                 max_tokens: int | None = None, document_mask: bool = False, stride: int | None = None) -> None:
        assert 0 < (stride or sequence_length) <= sequence_length, (stride, sequence_length)
        self.sequence_length = sequence_length
        self.stride = stride or sequence_length
        self.dataset = IndexedDataset(prefix)
        self.manifest = self.dataset.manifest
        self.prefix = self.dataset.prefix
        split = self.manifest.held_out if self.manifest else None
        if split and split.role == "train" and split.fraction > 0:
            raise DataError(f"{self.prefix}: is the training side of a split; a held-out loss needs text "
                            "that training never sees; name the held-out side")
        self.token_count = min(self.dataset.token_count, max_tokens or self.dataset.token_count)
        if self.token_count < 2:
            raise DataError(f"{self.prefix}: has {self.token_count} tokens to read; a label needs two; "
                            "tokenise more text, or raise max_tokens")
        if document_mask and self.manifest is None:
            raise DataError(_no_eos_known(self.prefix))
        self._filler = self.manifest.tokenizer.eos_id if self.manifest else 0
        self.eos_id = self._filler if document_mask else None
        self.label_count = self.token_count - 1
        if document_mask:
            self.label_count -= int(np.count_nonzero(self.dataset.ids[0:self.token_count - 1] == self._filler))
        if not self.label_count:
            raise DataError(f"{self.prefix}: no document of what is read has two tokens; a label needs two; tokenise "
                            "more text, or raise max_tokens")

    def __len__(self) -> int:
        """Return the number of windows."""
        return 1 + max(0, -(-(self.token_count - 1 - self.sequence_length) // self.stride))

    def sample(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (input_ids, labels) of a window, int64.  # [s], [s]"""
        assert 0 <= number < len(self), (number, len(self))
        s, start = self.sequence_length, number * self.stride
        tokens = self.dataset.ids[start : min(start + s + 1, self.token_count)]
        count, seen = len(tokens) - 1, s - self.stride if number else 0
        input_ids = np.full(s, self._filler, np.int64)
        labels = np.full(s, IGNORED_LABEL, np.int64)
        input_ids[:count] = tokens[:-1]
        labels[seen:count] = tokens[1 + seen :]
        if self.eos_id is not None:
            labels[input_ids == self.eos_id] = IGNORED_LABEL
        return input_ids, labels

    def samples(self, numbers: Iterable[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return (input_ids, labels) of several windows, int64.  # [len(numbers), s] both"""
        rows = [self.sample(int(number)) for number in numbers]
        return np.stack([row[0] for row in rows]), np.stack([row[1] for row in rows])


def require_apart(training: CausalLMDataset, held_out: Sequence[HeldOutDataset]) -> None:
    """Refuse evaluation on a training source, or on ids that mean something else.

    Raises:
        DataError: a held-out dataset is one of the sources (same file or content), or of another tokenizer.
    """
    faults = []
    trained = {os.path.realpath(dataset.paths.bin): dataset.prefix for dataset in training.datasets}
    for dataset in training.datasets:
        if dataset.manifest:
            trained[dataset.manifest.bin.checksum] = dataset.prefix
    for dataset in held_out:
        keys = [os.path.realpath(dataset.dataset.paths.bin)]
        keys += [dataset.manifest.bin.checksum] if dataset.manifest else []
        source = next((trained[key] for key in keys if key in trained), None)
        if source is not None:
            faults.append(f"{dataset.prefix}: is the same data as the training source {source}; "
                          "a held-out loss needs text that training never sees; name the held-out side")
    raise_faults(DataError, faults)
    first = next((dataset for dataset in training.datasets if dataset.manifest), None)
    if first is not None:
        manifests = {first.prefix: first.manifest}
        manifests |= {dataset.prefix: dataset.manifest for dataset in held_out if dataset.manifest}
        require_same_tokens(manifests, "evaluation beside training")


def _no_eos_known(prefix: str) -> str:
    return (f"{prefix}: has no manifest (.json); document_mask needs the id that ends a document; write the dataset with "
            "tools/preprocess_data.py, or set document_mask to false")


def _open_all(prefixes: list[str]) -> list[IndexedDataset]:
    datasets, faults = [], []
    for prefix in prefixes:
        with collected(faults):
            datasets.append(IndexedDataset(prefix))
    raise_faults(DataError, faults)
    return datasets
