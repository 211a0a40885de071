"""Score records for tests, with what matters to a test said and everything else usual."""

from __future__ import annotations

from typing import Any

from megatron_ttl.evaluate.records import ScoredModel, ScoreRecord


def score(task: str = "arc_pt", value: float = 0.25, model: str = "pequeno", **others: Any) -> ScoreRecord:
    """Return a record; `model_...` words go into its model, `lm_eval` into its versions."""
    of_model = {name.removeprefix("model_"): others.pop(name) for name in list(others) if name.startswith("model_")}
    usual: dict[str, Any] = {
        "time": "2026-01-02T03:04:05Z", "version": "2.0", "definition": "lm-eval", "language": "pt",
        "prompt_language": "en", "shots": 25, "metric": "acc_norm", "stderr": 0.0125, "n": 1170,
        "prompt_checksum": f"xxh3:{task}", "data_checksum": f"xxh3:rows of {task}", "request_checksum": f"xxh3:all of {task}",
        "data": f"{task}.jsonl", "versions": {"lm_eval": others.pop("lm_eval", "0.4.13")},
    }
    return ScoreRecord(task=task, value=value, model=ScoredModel(**{
        "name": model, "checksum": f"xxh3:{model}", "parameters": 1000} | of_model), **(usual | others))
