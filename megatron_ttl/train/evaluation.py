"""Measure the model in training: held-out loss, signal tasks, samples. It changes nothing of the training's state."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

from torch import Tensor

from megatron_ttl.evaluate.perplexity import held_out_nats
from megatron_ttl.train.session import Session
from megatron_ttl.train.signals import Ask, Sample, continuations, row_nats, task_figures
from megatron_ttl.train.stop import StopRequest

_SHOWN = 160  # characters of a sample on the screen; the file has all


class _Interrupted(Exception):
    """Some process was asked to stop."""


def evaluate(session: Session, stop: StopRequest) -> None:
    """Measure, and keep what was measured; when asked to stop, what is measured by then. Every process must call."""
    row: dict[str, Any] = {"event": "evaluation", "step": session.state.step, "tokens": session.state.consumed_tokens}
    known = len(row)

    def ask() -> None:
        if session.mesh.any(stop.is_set):
            raise _Interrupted

    try:
        _held_out(session, ask, row)
        _tasks(session, ask, row)
        _samples(session, ask)
    except _Interrupted:
        session.say(f"step {session.state.step}: the evaluation was cut short, for somebody asked to stop")
    if len(row) > known:
        session.metrics.row(row)


def _held_out(session: Session, ask: Ask, row: dict[str, Any]) -> None:
    """Add the loss on every held-out dataset, in nats per token."""
    mesh = session.mesh

    def nats_of(input_ids: Tensor, labels: Tensor) -> float:
        ask()
        return session.engine.held_out_nats(input_ids, labels)

    for prefix, dataset in session.held_out.items():
        nats, tokens = held_out_nats(nats_of, dataset, _rows_at_once(session), rank=mesh.data_parallel_rank,
                                     world_size=mesh.data_parallel_size)
        nats, tokens = mesh.sum_data_parallel(nats, tokens)
        row[f"loss/{prefix}"] = nats / tokens
        row[f"perplexity/{prefix}"] = math.exp(nats / tokens)


def _tasks(session: Session, ask: Ask, row: dict[str, Any]) -> None:
    """Add accuracies of the signal tasks."""
    for task, rows in session.signals.tasks.values() if session.signals else ():
        row.update(task_figures(task, row_nats(session.engine, rows, _rows_at_once(session), ask)))


def _rows_at_once(session: Session) -> int:
    """Return how many rows a data-parallel rank takes at a time: several micro batches where stages would wait."""
    pipeline = session.mesh.layout.pipeline
    return session.micro_batch * (4 * pipeline if pipeline > 1 else 1)


def _samples(session: Session, ask: Ask) -> None:
    """Continue the prompts; keep all, show their beginnings."""
    signals, wanted = session.signals, session.run.evaluation
    if signals is None or not signals.prompts:
        return
    samples = continuations(session.engine, signals.prompts, signals.tokenizer, wanted.sample_tokens, session.run.run.seed,
                            ask)
    for sample in samples:
        if session.samples is not None:
            session.samples.append({"step": session.state.step, "tokens": session.state.consumed_tokens, **_sample_row(sample)})
        how = "greedy" if sample.sampling.greedy else "drawn"
        text = sample.text if len(sample.text) <= _SHOWN else sample.text[:_SHOWN] + "..."
        session.say(f"step {session.state.step}  {how}  {json.dumps(sample.prompt, ensure_ascii=False)} -> "
                    f"{json.dumps(text, ensure_ascii=False)}")


def _sample_row(sample: Sample) -> dict[str, Any]:
    sampling = {"temperature": 0.0} if sample.sampling.greedy else asdict(sample.sampling)
    return {"prompt": sample.prompt, "text": sample.text, "new_tokens": sample.new_tokens,
            "ended": "eos" if sample.ended else "length", "sampling": sampling}
