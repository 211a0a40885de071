"""Let a model answer requests as text, by the rules of lm-eval's backend for Hugging Face models.

A context and its continuation are encoded together, and what follows the tokens of the context alone is the continuation;
white space at the end of a context belongs to the continuation, where pieces begin with it. A context begins with BOS where
the model folder's tokenizer_config.json says so, and an empty one is BOS alone, whatever that says. What does not fit loses
its beginning, BOS included.

Cases that lm-eval leaves open are defined here: no continuation has probability 1; a continuation whose characters
all merge into the context's last token is that token; one longer than the model has positions is read in windows. Text
that spells a special piece ("</s>") is text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch

from megatron_ttl.evaluate.scoring import Scorer
from megatron_ttl.evaluate.task import GenerationRequest, Request
from megatron_ttl.evaluate.token_trees import Pair, shared_beginning
from megatron_ttl.generate.generate import cached_logits
from megatron_ttl.generate.kv_cache import StaticCache, build_caches
from megatron_ttl.generate.open_folder import OpenModel
from megatron_ttl.generate.sampling import Sampling, TokenChooser

_REQUESTS_AT_A_TIME = 2048
"""Requests whose tokens are held together: 2,048 tokens each make 16 MiB."""


class ModelAnswerer:
    """Answers of a model; an `Answerer`.

    Args:
        opened: model and tokenizer.
        batch: sequences side by side, at most.
        seed: of sampled answers, with the numbers of item and choice.

    Attributes:
        truncated: requests so far whose context was cut on the left, or whose continuation alone did not fit.
    """

    def __init__(self, opened: OpenModel, batch: int = 32, seed: int = 0) -> None:
        self.opened, self.batch, self.seed = opened, batch, seed
        self.scorer = Scorer(opened.model, opened.config, batch)
        self.truncated = 0

    @property
    def _positions(self) -> int:
        return self.opened.config.max_position_embeddings

    def loglikelihood(self, requests: Sequence[Request],
                      progress: Callable[[int], None] | None = None) -> list[tuple[float, bool]]:
        """Return for each request the log-probability in nats, and whether greedy decoding would say it.

        Args:
            requests: in any order; those with the same beginning are cheapest near each other.
            progress: receives the number of requests answered.

        Raises:
            DataError: a text is no Unicode.
            CheckpointError: the model says something that is no number.
        """
        return self._in_parts(requests, lambda part: self._encode_pairs([(one.context, one.continuation) for one in part]),
                              progress)

    def rolling(self, texts: Sequence[str], progress: Callable[[int], None] | None = None) -> list[float]:
        """Return for each text its log-probability in nats, every token predicted once.

        The first window is read behind BOS; each further one is as long as the model allows, and predicts what the one
        before it did not. Where texts begin with BOS, it is predicted too, as lm-eval does.

        Raises:
            DataError: a text is no Unicode.
            CheckpointError: the model says something that is no number.
        """
        def windows(part: Sequence[str]) -> list[list[Pair]]:
            tokenizer = self.opened.tokenizer
            return [_windows([tokenizer.bos_id], self._begun(ids), self._positions)
                    for ids in tokenizer.encode_batch(part)]

        return [nats for nats, _ in self._in_parts(texts, windows, progress)]

    def _in_parts(self, asked: Sequence[Any], encode: Callable[[Sequence[Any]], list[list[Pair]]],
                  progress: Callable[[int], None] | None) -> list[tuple[float, bool]]:
        """Score what is asked, some at a time; each becomes the sum of its pairs of tokens."""
        answers: list[tuple[float, bool]] = []
        for start in range(0, len(asked), _REQUESTS_AT_A_TIME):
            pieces = encode(asked[start : start + _REQUESTS_AT_A_TIME])
            flat = [pair for pairs in pieces for pair in pairs]

            def report(done: int, before: int = len(answers), pairs: int = len(flat), own: int = len(pieces)) -> None:
                if progress:
                    progress(before + done * own // pairs)

            scored = iter(self.scorer.score(flat, report))
            for pairs in pieces:
                found = [next(scored) for _ in pairs]
                answers.append((sum(nats for nats, _ in found), all(greedy for _, greedy in found)))
        if progress:
            progress(len(answers))
        return answers

    def _begun(self, ids: list[int]) -> list[int]:
        """Put BOS before a text's ids where the folder asks for it."""
        return [self.opened.tokenizer.bos_id, *ids] if self.opened.add_bos else ids

    def _encode_pairs(self, texts: Sequence[tuple[str, str]]) -> list[list[Pair]]:
        """Return for each context and continuation what the scorer is asked: nothing, a pair, or windows."""
        moved = [_space_moved(context, continuation) for context, continuation in texts]
        tokenizer = self.opened.tokenizer
        contexts = list(dict.fromkeys(context for context, _ in moved))
        ids_of = dict(zip(contexts, tokenizer.encode_batch(contexts), strict=True))
        wholes = tokenizer.encode_batch([context + continuation for context, continuation in moved])
        return [self._split(context, ids_of[context], whole) if continuation else []
                for (context, continuation), whole in zip(moved, wholes, strict=True)]

    def _split(self, context: str, context_ids: list[int], whole: list[int]) -> list[Pair]:
        """Cut the ids of a text where its context ends, and make them fit."""
        cut = min(len(context_ids), len(whole) - 1)
        before = self._begun(context_ids[:cut]) if context else []
        before, after = before or [self.opened.tokenizer.bos_id], whole[cut:]
        excess = len(before) + len(after) - (self._positions + 1)
        self.truncated += excess > 0
        if len(after) > self._positions:
            return _windows(before[-1:], after, self._positions)
        return [(before[max(excess, 0) :], after)]

    def generate(self, requests: Sequence[GenerationRequest],
                 progress: Callable[[int], None] | None = None) -> list[str]:
        """Return the answers, without the text that ended them.

        Prompts of equal length go side by side; a beginning that all prompts share is read once. An answer ends with
        EOS, before the first stop text, or after `max_new_tokens`, of which there are at most as many as the model has
        positions, less one for the prompt; a prompt that leaves too little room loses its beginning.

        Raises:
            DataError: a text is no Unicode.
            CheckpointError: the model says something that is no number.
        """
        prompts = [self._prompt(request) for request in requests]
        answers = [""] * len(requests)
        order = sorted(range(len(requests)), key=lambda place: (len(prompts[place]), prompts[place]))
        common = _common_beginning(prompts)
        answered = 0
        shared = self._read(common)
        for _, places in groupby(order, key=lambda place: len(prompts[place])):
            alike = list(places)
            for start in range(0, len(alike), self.batch):
                side = alike[start : start + self.batch]
                texts = self._continue([prompts[place] for place in side], [requests[place] for place in side],
                                       shared, len(common))
                for place, text in zip(side, texts, strict=True):
                    answers[place] = text
                answered += len(side)
                if progress:
                    progress(answered)
        return answers

    def _new_tokens(self, request: GenerationRequest) -> int:
        return min(request.max_new_tokens, self._positions - 1)

    def _prompt(self, request: GenerationRequest) -> list[int]:
        """Return the ids of a prompt, cut on the left so that the answer fits."""
        ids = self._begun(self.opened.tokenizer.encode(request.context)) or [self.opened.tokenizer.bos_id]
        room = self._positions - self._new_tokens(request)
        self.truncated += len(ids) > room
        return ids[-room:]

    @torch.no_grad()
    def _read(self, ids: list[int]) -> list[StaticCache]:
        """Return keys and values of what all prompts begin with."""
        caches = self._empty(max(len(ids), 1))
        if ids:
            cached_logits(self.opened.model, torch.tensor([ids], device=self.opened.device), caches)
        return caches

    def _empty(self, capacity: int) -> list[StaticCache]:
        weight = next(self.opened.model.parameters())
        return build_caches(self.opened.config, capacity, weight.device, weight.dtype)

    @torch.no_grad()
    def _continue(self, prompts: list[list[int]], requests: list[GenerationRequest], shared: list[StaticCache],
                  read: int) -> list[str]:
        """Continue prompts of equal length, of which `read` tokens are in the shared caches."""
        tokenizer = self.opened.tokenizer
        room = max(self._new_tokens(request) for request in requests)
        caches = [cache.repeated(len(prompts), len(prompts[0]) + room) for cache in shared]
        choosers = [TokenChooser(self._sampling(request)) for request in requests]
        new: list[list[int]] = [[] for _ in requests]
        texts, open_rows = [""] * len(requests), set(range(len(requests)))
        ids = torch.tensor([prompt[read:] for prompt in prompts], device=self.opened.device)
        for _ in range(room):
            logits = cached_logits(self.opened.model, ids, caches)[:, -1, : tokenizer.vocab_size]
            chosen = torch.cat([choose(logits[row : row + 1]) for row, choose in enumerate(choosers)])
            for row in sorted(open_rows):
                token = int(chosen[row])
                if token != tokenizer.eos_id:
                    new[row].append(token)
                    texts[row] = tokenizer.decode(new[row])
                stopped = any(stop in texts[row] for stop in requests[row].until if stop)
                if token == tokenizer.eos_id or stopped or len(new[row]) >= self._new_tokens(requests[row]):
                    open_rows.discard(row)
            if not open_rows:
                break
            ids = chosen[:, None].to(self.opened.device)
        return [_before_stops(text, request.until) for text, request in zip(texts, requests, strict=True)]

    def _sampling(self, request: GenerationRequest) -> Sampling:
        """Return how an answer is drawn: from the whole distribution, with a seed of its own."""
        mixed = np.random.SeedSequence((self.seed, request.item, request.choice)).generate_state(1, np.uint64)
        return Sampling(request.temperature, 0, 1.0, int(mixed[0] >> np.uint64(1)))


def _space_moved(context: str, continuation: str) -> tuple[str, str]:
    """Move the white space at the end of a context to the continuation."""
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


def _windows(before: list[int], ids: list[int], positions: int) -> list[Pair]:
    """Return pairs that predict every id once, each from as many others as the model allows.

    The first window begins behind `before` (one id); the last one reaches back to be as long as the others.
    """
    windows: list[Pair] = [(before, ids[:positions])] if ids else []
    for start in range(positions, len(ids), positions):
        end = min(start + positions, len(ids))
        windows.append((ids[end - positions - 1 : start], ids[start:end]))
    return windows


def _common_beginning(prompts: list[list[int]]) -> list[int]:
    """Return what all prompts begin with, and none ends with."""
    if len(prompts) < 2:
        return []
    first, last = (np.array(find(prompts)) for find in (min, max))
    return first[: min(shared_beginning(first, last), len(min(prompts, key=len)) - 1)].tolist()


def _before_stops(text: str, until: Sequence[str]) -> str:
    """Cut a text where its first stop begins, stop after stop in the order given, as lm-eval does."""
    for stop in until:
        if stop:
            text = text.partition(stop)[0]
    return text
