"""Measure how fast questions are scored, against lm-eval's backend for Hugging Face models in the same process."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

from megatron_ttl.console import progress
from megatron_ttl.errors import ConfigError, UserError, raise_faults
from megatron_ttl.evaluate.answer import ModelAnswerer
from megatron_ttl.evaluate.task import Request
from megatron_ttl.generate.open_folder import OpenModel, open_model_folder
from megatron_ttl.tokenizer.tokenizer import SPACE

_QUESTION, _CHOICE, _CHOICES = 40, 12, 4
"""Words of a question and of each of its choices; nearly every word is one token."""
_SETS = {"0-shot": (0, True, False), "5-shot": (5, True, False), "25-shot": (25, True, False),
         "5-shot, others for every question": (5, False, False), "letters, 0-shot": (0, True, True),
         "letters, 5-shot": (5, True, True)}
"""Demonstrations, whether they are the same for all questions, and whether the choices are letters."""


def bench_scoring(folder: str | os.PathLike[str], questions: int = 16, batch: int = 8, repeats: int = 2
                  ) -> dict[str, Any]:
    """Score questions of random words with both; each alternates with the other, and its best processor time counts.

    Args:
        folder: model folder; its weights may be random.
        questions: of each set; four choices each.
        batch: sequences side by side, for both.
        repeats: times of each.

    Returns:
        For each set: tokens that lm-eval ran for one of ours (what a machine that is busy with tokens alone would
        gain), the ratio of the times, our requests per second of a processor, and the largest difference of two
        log-likelihoods.

    Raises:
        ConfigError: a number is below 1.
        UserError: the folder cannot be read, has too few words or positions, or lm-eval is not installed.
    """
    numbers = {"questions": questions, "batch": batch, "repeats": repeats}
    raise_faults(ConfigError, [f"--{name}: is {number}; it must be at least 1; leave it out"
                               for name, number in numbers.items() if number < 1])
    opened = open_model_folder(folder, "cpu")
    words, counted = _words(opened), [0]
    theirs = _lm_eval(opened, batch, counted)
    result: dict[str, Any] = {"model": str(folder), "questions": questions, "batch": batch}
    with progress("scoring", len(_SETS), "sets") as report:
        for number, (name, (shots, same, letters)) in enumerate(_SETS.items(), start=1):
            requests = _requests(words, questions, shots, same, letters)
            figures = _compare(requests, opened, theirs, batch, repeats, counted)
            result |= {f"{name}: {key}": figure for key, figure in figures.items()}
            report(number)
    return result


def _compare(requests: Sequence[Request], opened: OpenModel, theirs: Callable[[Sequence[Request]], list[float]],
             batch: int, repeats: int, counted: list[int]) -> dict[str, Any]:
    """Time both, turn about."""
    best = {"ours": float("inf"), "theirs": float("inf")}
    for _ in range(repeats):
        answerer, counted[0] = ModelAnswerer(opened, batch), 0
        began = time.process_time()
        answers = [nats for nats, _ in answerer.loglikelihood(requests)]
        between = time.process_time()
        if answerer.truncated:
            return {"left out": f"longer than the model's {opened.config.max_position_embeddings} positions"}
        expected = theirs(requests)
        ended = time.process_time()
        best = {"ours": min(best["ours"], between - began), "theirs": min(best["theirs"], ended - between)}
    return {"ratio of tokens": counted[0] / answerer.scorer.tokens_run, "ratio of times": best["theirs"] / best["ours"],
            "requests per processor s": len(requests) / best["ours"],
            "largest difference": max(abs(a - b) for a, b in zip(answers, expected, strict=True))}


def _words(opened: OpenModel) -> list[str]:
    """Return what pieces that begin with a space stand for."""
    tokenizer = opened.tokenizer
    texts = [tokenizer.decode([number]) for number in range(tokenizer.vocab_size)]
    found = [text for text in texts if text.startswith(" ") and text[1:].isalpha() and SPACE not in text]
    if len(found) < 20:
        raise UserError(f"{opened.directory}: its tokenizer has {len(found)} words; there must be 20; take a larger one")
    return found


def _requests(words: list[str], questions: int, shots: int, same: bool, letters: bool) -> list[Request]:
    """Compose questions of random words, demonstrations before them."""
    draw = random.Random(0)

    def text(count: int) -> str:
        return "".join(draw.choices(words, k=count))

    def question() -> str:
        listed = "".join(f"\n{letter}.{text(_CHOICE)}" for letter in "ABCD") if letters else ""
        return f"Pergunta:{text(_QUESTION)}{listed}\nResposta:"

    def demonstrations() -> str:
        return "".join(f"{question()}{' A' if letters else text(_CHOICE)}\n\n" for _ in range(shots))

    found, before = [], demonstrations()
    for item in range(questions):
        context = (before if same else demonstrations()) + question()
        found += [Request(context, f" {'ABCD'[choice]}" if letters else text(_CHOICE), item, choice)
                  for choice in range(_CHOICES)]
    return found


def _lm_eval(opened: OpenModel, batch: int, counted: list[int]) -> Callable[[Sequence[Request]], list[float]]:
    """Return lm-eval's way to score requests with the model of the same folder; `counted[0]` grows by its tokens."""
    try:
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise UserError(f"lm-eval: its backend for Hugging Face models cannot be imported ({error}); it is needed to "
                        "compare with; pip install 'megatron_ttl[evaluation]' accelerate") from None
    model = AutoModelForCausalLM.from_pretrained(opened.directory, dtype="float32", local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(opened.directory, local_files_only=True)

    def count(_: Any, given: tuple[Any, ...]) -> None:
        counted[0] += given[0].numel()

    model.get_input_embeddings().register_forward_pre_hook(count)
    peer = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)

    def score(requests: Sequence[Request]) -> list[float]:
        instances = [Instance("loglikelihood", {}, (one.context, one.continuation), one.choice) for one in requests]
        return [nats for nats, _ in peer.loglikelihood(instances, disable_tqdm=True)]

    return score
