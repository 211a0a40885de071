"""lm-eval's own model for transformers, the oracle of the tests of evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def hf_backend(folder: Path, batch: int = 4) -> Any:
    """Open a model folder with lm-eval's HFLM."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    return HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=batch,
                max_length=model.config.max_position_embeddings)
