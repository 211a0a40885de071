"""Checkpoints and model folders of a few kilobytes, for the tests of the export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ttl.checkpoint.names import split_to_hf
from megatron_ttl.checkpoint.store import Checkpoint, CheckpointStore
from megatron_ttl.config.schema import ModelConfig
from megatron_ttl.model.llama import build_model

FILES = {"config.json", "generation_config.json", "model.safetensors", "megatron_ttl.json", "tokenizer.model",
         "tokenizer_config.json", "special_tokens_map.json"}
PROMPT = "a menina viu o rio; 日本 🙂"


def config_of(kv_heads: int, vocab_size: int = 352) -> ModelConfig:
    return ModelConfig(hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
                       num_key_value_heads=kv_heads, vocab_size=vocab_size, max_position_embeddings=96,
                       rms_norm_eps=1e-5)


def random_weights(config: ModelConfig) -> dict[str, Tensor]:
    """Weights far from those of a fresh model, where attention is uniform and all norms are one."""
    generator = torch.Generator().manual_seed(3)

    def drawn(tensor: Tensor) -> Tensor:
        return 0.2 * torch.randn(tensor.shape, generator=generator) + (tensor.dim() == 1)

    return {hf: piece for name, tensor in build_model(config, seed=1).state_dict().items()
            for hf, piece in split_to_hf(name, drawn(tensor), config).items()}


def checkpoint_of(folder: Path, config: ModelConfig, record: dict[str, Any] | None = None,
                  step: int = 40) -> Checkpoint:
    store = CheckpointStore(folder)
    store.save(step, {"weights": random_weights(config)},
               record if record is not None else {"consumed_tokens": 1000})
    return store.open(step)


def transformers_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def ids_of(config: ModelConfig, seed: int = 1) -> Tensor:
    return torch.randint(config.vocab_size, (2, config.max_position_embeddings),
                         generator=torch.Generator().manual_seed(seed))


# --- transformers is the judge ---
