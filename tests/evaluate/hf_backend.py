"""lm-eval's own model for transformers, the oracle of the tests of evaluation."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any


def hf_backend(folder: Path, batch: int = 4) -> Any:
    """Open a model folder with lm-eval's HFLM.

    It imports accelerate, which nothing else here needs, and uses none of it for a model that is handed over: where it is
    not installed, empty names stand in for the import.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer  # first: it looks whether accelerate is there

    stand_ins = {}
    if find_spec("accelerate") is None:
        stand_ins = {name: ModuleType(name) for name in ("accelerate", "accelerate.utils")}
        for name in ("Accelerator", "InitProcessGroupKwargs", "find_executable_batch_size"):
            setattr(stand_ins["accelerate"], name, None)
        stand_ins["accelerate.utils"].get_max_memory = None
    sys.modules.update(stand_ins)
    try:
        from lm_eval.models.huggingface import HFLM
    finally:
        for name in stand_ins:
            del sys.modules[name]
    model = AutoModelForCausalLM.from_pretrained(folder)
    return HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=batch,
                max_length=model.config.max_position_embeddings)
