"""A language of two topics, and a model that has read it: what a model may know that a few labelled rows do not say.

Each topic has words of its own. A document is about one topic, which is all that there is to learn; a model that has read
documents knows which words belong together, also those that no labelled row holds.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from megatron_ttl.checkpoint.hf_config import hf_config
from megatron_ttl.checkpoint.hf_weights import write_weights
from megatron_ttl.checkpoint.names import packed_names, split_to_hf
from megatron_ttl.config.schema import ModelConfig
from megatron_ttl.model.llama import build_model
from megatron_ttl.tokenizer.tokenizer import Tokenizer
from megatron_ttl.tokenizer.train import train_tokenizer

_WORDS = [first + second for first in ("ba", "co", "du", "fe", "gi", "lo", "mu", "ne") for second in
          ("da", "fo", "ga", "li", "mo", "nu", "pe", "ra", "so", "ti")]
_TOPICS = (_WORDS[::2], _WORDS[1::2])
_FAMILIAR = 8  # words of each topic that labelled rows for learning are made of
_LENGTH = 12  # words


def _document(topic: int, draw: random.Random, words: slice = slice(None)) -> str:
    return " ".join(draw.choice(_TOPICS[topic][words]) for _ in range(_LENGTH))


def labelled(count: int, seed: int, familiar: bool) -> list[dict[str, Any]]:
    """Compose rows of the two topics: of the few words that are learnt from, or of all the others."""
    draw = random.Random(seed)
    words = slice(_FAMILIAR) if familiar else slice(_FAMILIAR, None)
    return [{"text": _document(number % 2, draw, words), "label": number % 2} for number in range(count)]


def write_reader(folder: Path, steps: int = 80) -> Path:
    """Train a small model on documents for a few seconds, and write its folder."""
    draw = random.Random(0)
    train_tokenizer([_document(number % 2, draw) for number in range(400)], folder, 400, character_coverage=1.0)
    tokenizer = Tokenizer.load(folder)
    config = ModelConfig(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=4, vocab_size=tokenizer.vocab_size, max_position_embeddings=48)
    model = build_model(config, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        documents = tokenizer.encode_batch([_document(number % 2, draw) for number in range(32)])
        ids = [[tokenizer.bos_id, *row][:_LENGTH + 1] for row in documents]
        batch = torch.tensor([row + [tokenizer.eos_id] * (_LENGTH + 1 - len(row)) for row in ids])
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in zip(packed_names(config), model.parameters(), strict=True):
        tensors |= split_to_hf(name, weight.detach(), config)
    write_weights(folder, tensors, config, torch.float32, 1 << 30, lambda done: None)
    (folder / "config.json").write_text(json.dumps(hf_config(config, tokenizer, "float32")))
    shutil.copy(folder / "config.json", folder / "generation_config.json")
    return folder
