"""Generation: ours against transformers' `generate` with the same folder on the same device, turn about."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_ttl.bench.contender import free_memory, settings_faults
from megatron_ttl.bench.peer_hf import hf_greedy, open_hf_folder
from megatron_ttl.bench.workload import device_name
from megatron_ttl.console import progress
from megatron_ttl.errors import ConfigError, raise_faults
from megatron_ttl.generate.generate import generate
from megatron_ttl.generate.open_folder import OpenModel, choose_dtype, open_model_folder
from megatron_ttl.generate.sampling import choose_sampling

_PROMPT = 16  # tokens


def bench_generate(folder: str | os.PathLike[str], batches: Sequence[int] = (1, 64), new_tokens: int = 128,
                   repeats: int = 3) -> dict[str, Any]:
    """Continue one random prompt greedily, as often as the batch is large; the prompt's reading counts.

    Args:
        folder: model folder.
        batches: continuations side by side.
        new_tokens: of each; nothing ends one earlier.
        repeats: timed runs of each, after one that is not.

    Returns:
        Device, dtype, and `rows`: tokens per second of both by the median run, how many times as fast ours is by the
        median and by the best run, and the share of tokens on which both agree.

    Raises:
        ConfigError: a number is wrong.
        UserError: the folder cannot be read.
    """
    raise_faults(ConfigError, settings_faults({"new-tokens": new_tokens, "repeats": repeats, "batch": min(batches)}))
    cuda = torch.cuda.is_available()
    dtype = "bfloat16" if cuda else "float32"
    opened = open_model_folder(folder, "auto", dtype)
    positions = opened.config.max_position_embeddings
    if _PROMPT + new_tokens > positions:
        raise ConfigError(f"--new-tokens: is {new_tokens}; with a prompt of {_PROMPT} the model has positions for "
                          f"{positions - _PROMPT}; ask for fewer")
    theirs = open_hf_folder(folder, opened.device, choose_dtype(dtype))
    prompt = torch.randint(3, opened.config.vocab_size, (_PROMPT,), generator=torch.Generator().manual_seed(0))
    rows = []
    with progress("measuring", len(batches), " batches") as report:
        for number, batch in enumerate(batches):
            many = prompt.repeat(batch, 1).to(opened.device)
            ways: dict[str, Callable[[], list[list[int]]]] = {
                "ours": lambda batch=batch: _ours(opened, prompt.tolist(), new_tokens, batch),
                "hf": lambda many=many: hf_greedy(theirs, many, new_tokens)[:, _PROMPT:].tolist()}
            rows.append({"batch": batch, **_compare(ways, batch * new_tokens, repeats, opened.device)})
            free_memory(opened.device)
            report(number + 1)
    return {"model": str(folder), "device": device_name(opened.device), "dtype": dtype, "prompt_tokens": _PROMPT,
            "new_tokens": new_tokens, "repeats": repeats, "rows": rows}


def _ours(opened: OpenModel, prompt: list[int], new_tokens: int, batch: int) -> list[list[int]]:
    return generate(opened.model, opened.config, prompt, new_tokens, choose_sampling(greedy=True), num_samples=batch)


def _compare(ways: dict[str, Callable[[], list[list[int]]]], tokens: int, repeats: int,
             device: torch.device) -> dict[str, Any]:
    written = {name: way() for name, way in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[name].append(time.perf_counter() - began)
    median = {name: statistics.median(found) for name, found in seconds.items()}
    pairs = [a == b for ours, hf in zip(written["ours"], written["hf"], strict=True)
             for a, b in zip(ours, hf, strict=True)]
    return {"ours_tokens_per_s": tokens / median["ours"], "hf_tokens_per_s": tokens / median["hf"],
            "ratio": median["hf"] / median["ours"], "ratio_of_minima": min(seconds["hf"]) / min(seconds["ours"]),
            "same_tokens": sum(pairs) / len(pairs)}
