"""Continue a prompt: one pass over it, then one token at a time on top of cached keys and values."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ttl.config.schema import ModelConfig
from megatron_ttl.console import progress
from megatron_ttl.errors import UserError, raise_faults
from megatron_ttl.generate.kv_cache import StaticCache, build_caches
from megatron_ttl.generate.open_folder import OpenModel, open_model_folder
from megatron_ttl.generate.sampling import Sampling, TokenChooser, choose_sampling
from megatron_ttl.generate.text_stream import TextStream


def cached_logits(model: nn.Sequential, input_ids: Tensor, caches: Sequence[StaticCache],
                  last_only: bool = True) -> Tensor:
    """Run new tokens through the model on top of what the caches hold.

    Args:
        model: layers as `build_model` gives them.
        input_ids: [b, s_new] int64, the tokens after those in the caches.
        caches: one per block; they grow by s_new.
        last_only: skip the head for all but the last position.

    Returns:
        [b, 1, v], or [b, s_new, v] for all positions.
    """
    x = model[0](input_ids)
    for block, cache in zip(list(model)[1:-1], caches, strict=True):
        x = block(x, cache)
    return model[-1](x[:, -1:] if last_only else x)


def generate_steps(model: nn.Sequential, config: ModelConfig, prompt_ids: Sequence[int], max_new_tokens: int,
                   sampling: Sampling, eos_id: int | None = None, num_samples: int = 1,
                   vocab_size: int | None = None) -> Iterator[list[int | None]]:
    """Yield the new token of every sample, step by step; None where a sample has ended.

    The prompt is read once, whatever the number of samples. EOS itself is yielded, and ends its sample; the
    iterator ends when all samples have, or after `max_new_tokens`.

    Args:
        model: on any device; it may be one that is being trained.
        config: of the model.
        prompt_ids: at least one token.
        max_new_tokens: at most so many per sample.
        sampling: how tokens are chosen.
        eos_id: ends a sample; None: nothing does.
        num_samples: continuations of the one prompt, side by side.
        vocab_size: ids from here on are never chosen (rows that no piece belongs to); None: all may be.

    Raises:
        UserError: an empty prompt, an id without a row in the model, or more tokens than it has positions.
    """
    raise_faults(UserError, _length_faults(config, len(prompt_ids), max_new_tokens))
    if not 0 <= min(prompt_ids) <= max(prompt_ids) < config.vocab_size:
        raise UserError(f"prompt: ids from {min(prompt_ids)} to {max(prompt_ids)}; they must be in [0, "
                        f"{config.vocab_size}); tokenize it with the tokenizer of this model")
    chooser = TokenChooser(sampling, num_samples)
    return _steps(model, config, prompt_ids, max_new_tokens, chooser, eos_id, num_samples, vocab_size)


def _length_faults(config: ModelConfig, prompt_tokens: int, max_new_tokens: int) -> list[str]:
    faults = []
    limit = config.max_position_embeddings
    if max_new_tokens < 1:
        faults.append(f"max_new_tokens: {max_new_tokens}; it must be at least 1; 64 is a good start")
    if prompt_tokens < 1:
        faults.append("prompt: no token; it must have at least one; begin with BOS")
    if prompt_tokens + max(max_new_tokens, 0) > limit:
        faults.append(f"prompt: {prompt_tokens} tokens and {max_new_tokens} new ones are "
                      f"{prompt_tokens + max_new_tokens}; the model has {limit} positions; "
                      + (f"ask for at most {limit - prompt_tokens} new tokens" if prompt_tokens < limit else
                         f"shorten the prompt to less than {limit} tokens"))
    return faults


# Not inference_mode: the blocks keep their rotary tables, and training could not use a table made there.
@torch.no_grad()
def _steps(model: nn.Sequential, config: ModelConfig, prompt_ids: Sequence[int], max_new_tokens: int,
           choose: TokenChooser, eos_id: int | None, num_samples: int,
           vocab_size: int | None) -> Iterator[list[int | None]]:
    weight = next(model.parameters())
    caches = build_caches(config, len(prompt_ids) + max_new_tokens, weight.device, weight.dtype)
    logits = cached_logits(model, torch.tensor([list(prompt_ids)], device=weight.device), caches)  # [1, 1, v]
    if num_samples > 1:
        caches = [cache.repeated(num_samples) for cache in caches]
        logits = logits.expand(num_samples, -1, -1)
    ended = [False] * num_samples
    for step in range(max_new_tokens):
        chosen = choose(logits[:, -1, :vocab_size])  # [b]
        yield [None if done else token for done, token in zip(ended, chosen.tolist(), strict=True)]
        ended = [done or token == eos_id for done, token in zip(ended, chosen.tolist(), strict=True)]
        if all(ended) or step + 1 == max_new_tokens:
            return
        logits = cached_logits(model, chosen[:, None].to(weight.device), caches)


def generate(model: nn.Sequential, config: ModelConfig, prompt_ids: Sequence[int], max_new_tokens: int,
             sampling: Sampling, eos_id: int | None = None, num_samples: int = 1,
             vocab_size: int | None = None) -> list[list[int]]:
    """Return the new ids of every sample, EOS included where one came; arguments as for `generate_steps`."""
    samples: list[list[int]] = [[] for _ in range(num_samples)]
    steps = generate_steps(model, config, prompt_ids, max_new_tokens, sampling, eos_id, num_samples,
                           vocab_size)
    for step in steps:
        for ids, token in zip(samples, step, strict=True):
            if token is not None:
                ids.append(token)
    return samples


def encode_prompt(opened: OpenModel, prompt: str) -> list[int]:
    """Return the ids of a prompt, with BOS where the folder's tokenizer wants one.

    An empty prompt is BOS alone, whatever the policy: something must come before the first token.

    Raises:
        UserError: the prompt is not valid Unicode.
    """
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"prompt: character {error.start} is half a character; it must be valid UTF-8; check "
                        "the encoding of the terminal or the script") from None
    ids = opened.tokenizer.encode(prompt) if prompt else []
    return [opened.tokenizer.bos_id, *ids] if opened.add_bos or not ids else ids


def continue_prompt(opened: OpenModel, prompt: str, max_new_tokens: int, sampling: Sampling,
                    num_samples: int = 1, show: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Continue a prompt and measure how fast it went.

    Args:
        opened: model and tokenizer.
        prompt: text; may be empty.
        max_new_tokens: at most so many per sample.
        sampling: how tokens are chosen.
        num_samples: continuations.
        show: receives the prompt, then the first sample's new text piece by piece, never half a character;
            without it progress is shown.

    Returns:
        `samples` (each `text` after the prompt, `new_tokens`, `ended` by "eos" or "length"), settings, times,
        and tokens per second of all samples together; the first token counts to the reading of the prompt.

    Raises:
        UserError: as `generate_steps` and `encode_prompt`.
    """
    tokenizer = opened.tokenizer
    prompt_ids = encode_prompt(opened, prompt)
    streams = [TextStream(tokenizer.decode, prompt_ids) for _ in range(num_samples)]
    texts: list[list[str]] = [[] for _ in range(num_samples)]
    counts, ended = [0] * num_samples, ["length"] * num_samples
    steps = generate_steps(opened.model, opened.config, prompt_ids, max_new_tokens, sampling,
                           tokenizer.eos_id, num_samples, tokenizer.vocab_size)
    started = first = time.perf_counter()
    with _shown(show, prompt, max_new_tokens) as (say, report):
        for number, step in enumerate(steps, start=1):
            first = time.perf_counter() if number == 1 else first
            for sample, token in enumerate(step):
                counts[sample] += token is not None
                is_text = token is not None and token != tokenizer.eos_id
                texts[sample].append(streams[sample].add(token) if is_text else "")
                ended[sample] = "eos" if token == tokenizer.eos_id else ended[sample]
            say(texts[0][-1])
            report(number)
        finished = time.perf_counter()
        for sample, stream in enumerate(streams):
            texts[sample].append(stream.finish())
        say(texts[0][-1])
    decoded, decode_s = sum(counts) - num_samples, finished - first
    return {
        "model": str(opened.directory), "prompt": prompt, "prompt_tokens": len(prompt_ids),
        "samples": [{"text": "".join(pieces), "new_tokens": count, "ended": how}
                    for pieces, count, how in zip(texts, counts, ended, strict=True)],
        "sampling": {"temperature": 0.0} if sampling.greedy else asdict(sampling),
        "device": str(opened.device), "dtype": opened.dtype,
        "prompt_s": round(first - started, 4), "decode_s": round(decode_s, 4),
        "tokens_per_s": round(decoded / decode_s, 2) if decoded else None,
    }


@contextmanager
def _shown(show: Callable[[str], None] | None, prompt: str,
           max_new_tokens: int) -> Iterator[tuple[Callable[[str], None], Callable[[float], None]]]:
    """Give where text goes and where progress goes: never both to one terminal."""
    if show:
        show(prompt)
        yield show, lambda _: None
    else:
        with progress("generating", max_new_tokens, "tokens") as report:
            yield lambda _: None, report


def generate_text(folder: str | os.PathLike[str], prompt: str, max_new_tokens: int = 64, *,
                  temperature: float | None = None, top_k: int | None = None, top_p: float | None = None,
                  seed: int | None = None, greedy: bool = False, device: str = "auto",
                  dtype: str = "float32") -> str:
    """Return a prompt with one continuation; see `choose_sampling` and `open_model_folder`.

    Raises:
        UserError: a value, the folder or the prompt is wrong.
    """
    sampling = choose_sampling(temperature, top_k, top_p, seed, greedy, max_new_tokens=max_new_tokens)
    result = continue_prompt(open_model_folder(folder, device, dtype), prompt, max_new_tokens, sampling)
    return prompt + result["samples"][0]["text"]
