"""Run folders made up from formulas, so that every figure of a report is known beforehand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MODEL = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 2048, "max_position_embeddings": 128}
TOKENS_PER_STEP = 1000


def loss_at(tokens: float) -> float:
    """Nats per token of the made-up model: a power law over a floor of 2 nats."""
    return 2 + 40 / tokens ** 0.3


def train_rows(steps: int, every: int = 1) -> list[dict[str, Any]]:
    """Rows of training; a kWh per hundred thousand tokens."""
    return [{"event": "train", "step": step, "tokens": step * TOKENS_PER_STEP, "loss": loss_at(step * TOKENS_PER_STEP),
             "lr": 1e-3, "grad_norm": 1.5, "energy_kwh": step * TOKENS_PER_STEP / 1e5,
             "emissions_kg_co2e": step * TOKENS_PER_STEP / 1e6, "energy_source": {"gpu": "measured", "cpu": "estimated"}}
            for step in range(every, steps + 1, every)]


def evaluation_rows(steps: int, every: int, prefix: str = "data/held") -> list[dict[str, Any]]:
    """Rows of held-out loss, a tenth of a nat above that of training."""
    return [{"event": "evaluation", "step": step, "tokens": step * TOKENS_PER_STEP,
             f"loss/{prefix}": loss_at(step * TOKENS_PER_STEP) + 0.1} for step in range(every, steps + 1, every)]


def event_row(event: str, step: int) -> dict[str, Any]:
    """A row that marks a point of the run."""
    return {"event": event, "step": step, "tokens": step * TOKENS_PER_STEP}


def write_run(folder: Path, rows: list[dict[str, Any]], tail: str = "", model: dict[str, Any] | None = MODEL) -> Path:
    """Write a run folder as training leaves it; `tail` comes after the last row."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail, encoding="utf-8")
    if model is not None:
        (folder / "settings.json").write_text(json.dumps({"run": {"model": model}}), encoding="utf-8")
    return folder


def score_row(run: str, tokens: int | None, value: float, task: str = "arc_pt", **others: Any) -> dict[str, Any]:
    """A line of scores.jsonl."""
    model = {"name": run, "checksum": f"xxh3:{run}{tokens}", "parameters": 1000, "run": run, "tokens": tokens}
    return {"time": "2026-01-01T00:00:00Z", "model": model,
            "task": task, "version": "1.0", "definition": "lm-eval", "language": "pt", "prompt_language": "en", "shots": 25,
            "metric": "acc_norm", "value": value, "stderr": 0.013, "n": 1170, "prompt_checksum": "xxh3:p",
            "data_checksum": "xxh3:d", "request_checksum": "xxh3:r", "data": "arc.jsonl", "baselines": {"random": 0.25},
            "versions": {"lm_eval": "0.4.13"}, **others}


def write_scores(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write a file of scores."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
