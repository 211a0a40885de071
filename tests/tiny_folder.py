"""Model folders, tokenizers and datasets of a few kilobytes, for the tests of what comes after training."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

from megatron_ttl.data.encode import EncodeSettings
from megatron_ttl.data.preprocess import preprocess
from megatron_ttl.tokenizer.train import train_tokenizer

_SUBJECTS = "a menina|o pescador|a professora|o vizinho|a chuva|o trem|a cozinheira|o menino".split("|")
_VERBS = "viu|ouviu|esperou|encontrou|chamou|seguiu|lembrou|perdeu".split("|")
_OBJECTS = "o rio|a cidade|um livro antigo|o caminho de casa|a canção|três laranjas|o café da manhã".split("|")


def documents(count: int, seed: int = 0) -> list[str]:
    """Compose documents of one to twelve sentences; some hold characters that no piece will know."""
    draw = random.Random(seed)
    texts = []
    for number in range(count):
        sentences = [f"{draw.choice(_SUBJECTS)} {draw.choice(_VERBS)} {draw.choice(_OBJECTS)}."
                     for _ in range(draw.randint(1, 12))]
        texts.append(" ".join(sentences).capitalize() + (f"\n日本 🙂 {number}" if number % 5 == 0 else ""))
    return texts


def write_tokenizer(folder: Path, seed: int = 0) -> Path:
    """Train a tokenizer of 350 pieces."""
    train_tokenizer(documents(200, seed), folder, 350, character_coverage=0.995)
    return folder


def write_model_folder(folder: Path, tokenizer: Path, kv_heads: int = 2, vocab_size: int = 350,
                       spread: float = 0.2, seed: int = 0) -> Path:
    """Let transformers write a random model, and put the tokenizer beside it.

    A spread of 0.2 (training begins at 0.02) makes attention and predictions far from uniform.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=kv_heads, vocab_size=vocab_size, max_position_embeddings=48, rms_norm_eps=1e-6,
        initializer_range=spread, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for file in tokenizer.iterdir():
        shutil.copy(file, folder)
    return folder


def write_dataset(prefix: Path, tokenizer: Path, texts: list[str], bos: bool = True) -> Path:
    """Tokenise texts into one dataset, nothing held out."""
    source = prefix.with_suffix(".jsonl")
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    preprocess([source], prefix, EncodeSettings(str(tokenizer), bos=bos, held_out_fraction=0.0))
    return prefix
