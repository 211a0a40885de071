"""Prepare what a run is asked beside its held-out loss: prompts and signal tasks as ids. No torch: `--dry-run` does it too."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ttl.config.schema import RunFile
from megatron_ttl.data.causal_lm_dataset import CausalLMDataset
from megatron_ttl.errors import DataError, collected, raise_faults
from megatron_ttl.evaluate.signals import ScoredRow, SignalTask, read_signal_tasks, rows_of
from megatron_ttl.tokenizer.tokenizer import Tokenizer
from megatron_ttl.train.open_data import tokenizer_directory


@dataclass(frozen=True)
class Signals:
    """Prompts and tasks, tokenised as the run's data are."""

    prompts: dict[str, list[int]]
    """Ids by text."""
    tasks: dict[str, tuple[SignalTask, list[ScoredRow]]]
    """By name: the items, and a row for each of their continuations."""
    tokenizer: Tokenizer


def open_signals(run: RunFile, dataset: CausalLMDataset) -> Signals | None:
    """Return what a run is asked at every evaluation; None where nothing is.

    Raises:
        DataError: with every fault of the prompts and tasks.
    """
    wanted = run.evaluation
    if not wanted.samples and not wanted.tasks:
        return None
    tokenizer, faults = Tokenizer.load(tokenizer_directory(dataset)), []
    add_bos = dataset.datasets[0].manifest.bos
    prompts: dict[str, list[int]] = {}
    for number, text in enumerate(wanted.samples):
        ids = tokenizer.encode(text)
        prompts[text] = [tokenizer.bos_id, *ids] if add_bos or not ids else ids
        most = run.train.sequence_length - wanted.sample_tokens
        if len(prompts[text]) > most:
            faults.append(f"evaluation.samples[{number}]: has {len(prompts[text]):,} tokens; with {wanted.sample_tokens:,} new "
                          f"ones it must fit into train.sequence_length, {run.train.sequence_length:,}; shorten it to {most:,}, "
                          "or lower evaluation.sample_tokens")
    rows: dict[str, tuple[SignalTask, list[ScoredRow]]] = {}
    with collected(faults):
        for task in read_signal_tasks(wanted.tasks, wanted.task_items):
            if task.name in rows:
                faults.append(f"evaluation.tasks: two are called {task.name}; metrics name tasks by it; rename a file")
            rows[task.name] = task, list(rows_of(task, tokenizer, add_bos, run.model.max_position_embeddings))
    raise_faults(DataError, faults)
    return Signals(prompts, rows, tokenizer)
