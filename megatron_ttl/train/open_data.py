"""Open a run's data and check it against the model, before anything is built. No torch: `--dry-run` does it too."""

from __future__ import annotations

from pathlib import Path

from megatron_ttl.config.schema import RunFile
from megatron_ttl.config.stages import stages_of
from megatron_ttl.console import progress
from megatron_ttl.data.causal_lm_dataset import CausalLMDataset, HeldOutDataset, require_apart
from megatron_ttl.errors import ConfigError, DataError, collected, raise_faults
from megatron_ttl.files import human_bytes
from megatron_ttl.runtime import available_memory_bytes
from megatron_ttl.train.energy import country_faults


def open_data(run: RunFile) -> tuple[CausalLMDataset, dict[str, HeldOutDataset]]:
    """Return the training samples and the held-out datasets by prefix.

    Raises:
        DataError: with every fault: missing, damaged, made with other tokenizers, more pieces than the model has rows.
    """
    faults = country_faults(run.energy)
    dataset: CausalLMDataset | None = None
    with collected(faults):
        dataset = CausalLMDataset([(source.prefix, source.weight) for source in run.data.sources],
                                  run.train.sequence_length, run.run.seed,
                                  stages_of(run.data) if run.data.stages else (), run.data.packing,
                                  run.data.document_mask)
    held_out = {}
    for prefix in run.evaluation.prefixes:
        with collected(faults):
            held_out[prefix] = HeldOutDataset(prefix, run.train.sequence_length, run.evaluation.max_tokens,
                                              run.data.document_mask)
    if dataset is not None:
        faults += _tokenizer_faults(run, dataset, held_out)
        with collected(faults, DataError):
            require_apart(dataset, list(held_out.values()))
    raise_faults(DataError, faults)
    assert dataset is not None
    return dataset, held_out


def preload(dataset: CausalLMDataset, processes: int) -> None:
    """Read all training data into memory, and compare them with their checksums on the way.

    Args:
        dataset: what is trained on.
        processes: how many of them on this machine do the same.

    Raises:
        ConfigError: that is more memory than there is.
        DataError: a source was damaged, or cannot be read.
    """
    sizes = [source.token_count * source.dtype.itemsize for source in dataset.datasets]
    needed, available = sum(sizes) * processes, available_memory_bytes()
    if needed > available:
        raise ConfigError(f"data_loader.preload: takes {human_bytes(needed)} for {processes} processes on this machine; "
                          f"{human_bytes(available)} of memory are available; set it to false: the data are then read as "
                          "they are needed")
    with progress("reading the data into memory", sum(sizes), "B") as done:
        for number, source in enumerate(dataset.datasets):
            before = sum(sizes[:number])
            source.preload(lambda read, before=before: done(before + read))


def _tokenizer_faults(run: RunFile, dataset: CausalLMDataset, held_out: dict[str, HeldOutDataset]) -> list[str]:
    """Check that training data, held-out data and model speak of the same pieces."""
    manifests = {d.prefix: d.manifest for d in (*dataset.datasets, *held_out.values())}
    faults = [f"{prefix}: has no manifest (.json); without it nobody knows its tokenizer; write it with "
              "tools/preprocess_data.py, or have it checked by tools/adopt_dataset.py"
              for prefix, manifest in manifests.items() if manifest is None]
    known = {prefix: manifest.tokenizer for prefix, manifest in manifests.items() if manifest is not None}
    for prefix, tokenizer in known.items():
        if tokenizer.vocab_size > run.model.vocab_size:
            faults.append(f"model.vocab_size: {run.model.vocab_size}, and the tokenizer of {prefix} has "
                          f"{tokenizer.vocab_size} pieces; every piece needs a row; set "
                          f"model.vocab_size={tokenizer.vocab_size} or more")
    return faults


def tokenizer_directory(dataset: CausalLMDataset) -> Path:
    """Return the copy of the tokenizer beside the first source."""
    first = dataset.datasets[0]
    return Path(first.prefix).parent / first.manifest.tokenizer.directory
