"""One row of a grid, measured in a process of its own: what runs out of memory or dies takes no other row with it."""

from __future__ import annotations

import itertools
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_ttl.bench.contender import Trial, switches_restored, time_steps
from megatron_ttl.bench.grid_cells import Cell, cell_of, profile_of
from megatron_ttl.bench.own_models import EngineContender
from megatron_ttl.bench.peer_hf import hf_loop
from megatron_ttl.bench.power import SHORTEST_S, energy_counter
from megatron_ttl.bench.training_loop import TrainingLoop
from megatron_ttl.bench.workload import Workload, load_workload_settings, opened
from megatron_ttl.errors import ConfigError, UserError
from megatron_ttl.files import write_json

_LAST_WORDS = 300  # characters of what a dead process said


@dataclass(frozen=True)
class Task:
    """What all rows of a grid have in common."""

    base: dict[str, Any]
    """Content of the machine profile."""
    config: str | None
    """Run file; None for a small model."""
    overrides: Sequence[str] = ()
    steps: int = 20
    warm_up: int = 5
    data: bool = False


def measure_cell(cell: Cell, task: Task) -> dict[str, Any]:
    """Train the steps of one cell and evaluate as many micro batches, in this process.

    Returns:
        `status`: `measured`, `out of memory` or `not available`, with `reason`; and the figures where it is measured.
    """
    try:
        settings = load_workload_settings(profile_of(cell, task.base), task.config, task.overrides)
        if cell.data == "preload" and not task.data:
            raise ConfigError("data: synthetic tokens are not read from a disk; take --data and a run file with sources")
        with opened(settings, task.data) as workload:
            if cell.precision == "tf32" and workload.device.type != "cuda":
                raise ConfigError("tf32: is a number format of GPUs; a CPU computes fp32")
            return {"status": "measured", "reason": "", **_figures(cell, task, workload)}
    except torch.OutOfMemoryError:
        return {"status": "out of memory", "reason": "the device has not enough memory"}
    except UserError as error:
        return {"status": "not available", "reason": error.faults[0]}


def _figures(cell: Cell, task: Task, workload: Workload) -> dict[str, Any]:
    device, tokens = workload.device, workload.run.train.tokens_per_step
    read_energy, why_not = energy_counter(device)
    with switches_restored(), closing(_contender(cell, workload)) as contender, workload.batches() as batches:
        torch.backends.cuda.matmul.allow_tf32 = cell.precision == "tf32"  # an engine in fp32 has switched it off
        for _ in range(task.warm_up):
            contender.step(next(batches))
        before = read_energy() if read_energy else 0.0
        seconds, losses = time_steps(lambda: contender.step(next(batches)), task.steps, device)
        joules = read_energy() - before if read_energy else None
        if joules is not None and sum(seconds) < SHORTEST_S:
            joules, why_not = None, f"not measured: the steps took less than {SHORTEST_S:g} s; take more"
        trained = Trial(seconds, float(losses[-1]))
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else \
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
        evaluated = _evaluation_seconds(contender, itertools.chain.from_iterable(batches), task, device)
    speed = trained.tokens_per_s(tokens)
    assert speed is not None
    micro_batch_tokens = cell.micro_batch * workload.run.train.sequence_length
    return {"tokens_per_s": speed, "tokens_per_s_best": trained.tokens_per_s(tokens, best=True),
            "mfu": workload.utilisation(speed), "peak_memory_bytes": peak,
            "joules_per_token": None if joules is None else joules / (tokens * task.steps), "energy": why_not or "measured",
            "loss": trained.loss, "evaluation_tokens_per_s": Trial(evaluated).tokens_per_s(micro_batch_tokens),
            "accumulation": workload.accumulation, "note": contender.note}


def _contender(cell: Cell, workload: Workload) -> EngineContender | TrainingLoop:
    return hf_loop(workload, cell.attention) if cell.model == "hf" else EngineContender(workload)


def _evaluation_seconds(contender: EngineContender | TrainingLoop, batches: Iterator[Any], task: Task,
                        device: torch.device) -> list[float]:
    """Return how long single micro batches took forward, loss included."""
    def evaluate() -> Any:
        return contender.evaluate(*next(batches))

    for _ in range(min(task.warm_up, 2)):
        evaluate()
    return time_steps(evaluate, task.steps, device)[0]


Measure = Callable[[Cell, Task], dict[str, Any]]


def measure_in_a_process(cell: Cell, task: Task, timeout_s: float = 900) -> dict[str, Any]:
    """Let a process of its own measure a cell; whatever happens to it is the row."""
    with tempfile.TemporaryDirectory() as folder:
        question, answer = Path(folder) / "question.json", Path(folder) / "answer.json"
        write_json(question, {"cell": asdict(cell), "task": asdict(task)})
        command = [sys.executable, "-m", "megatron_ttl.bench.grid_row", str(question), str(answer)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=timeout_s,
                                  check=False)
        except subprocess.TimeoutExpired:
            return {"status": "failed", "reason": f"was still at it after {timeout_s:g} s"}
        if answer.exists():
            return json.loads(answer.read_text(encoding="utf-8"))
    how = f"died of signal {-done.returncode}" if done.returncode < 0 else f"ended with code {done.returncode}"
    said = [line for line in done.stderr.splitlines() if line.strip()]
    return {"status": "failed", "reason": f"{how}: {said[-1].strip()[:_LAST_WORDS] if said else 'without a word'}"}


def main(question: str, answer: str) -> None:
    """Measure what one file asks for, and write the row into the other."""
    asked = json.loads(Path(question).read_text(encoding="utf-8"))
    write_json(answer, measure_cell(cell_of(asked["cell"]), Task(**asked["task"])))


if __name__ == "__main__":
    main(*sys.argv[1:])
