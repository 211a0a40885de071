"""The peer that TTL's scripts were: Hugging Face's Llama, trained and generating."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ttl.bench.own_models import initial_weights, refuse_documents
from megatron_ttl.bench.training_loop import TrainingLoop
from megatron_ttl.bench.workload import Workload
from megatron_ttl.config.schema import ModelConfig
from megatron_ttl.train.engine_options import DTYPES


def build_hf_model(config: ModelConfig, seed: int, device: torch.device, attention: str = "sdpa") -> nn.Module:
    """Build Hugging Face's Llama with the weights that a run begins with, fp32.

    Args:
        config: the architecture.
        seed: of the weights.
        device: where they go.
        attention: `sdpa`, or `eager` for the softmax written out.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {key: getattr(config, key) for key in (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
        "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")}
    theirs = LlamaConfig(**shape, attention_bias=False, mlp_bias=False, use_cache=False, attn_implementation=attention,
                         rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta})
    with torch.device(device):  # transformers draws weights of its own first, which takes a while on a host
        model = LlamaForCausalLM(theirs)
    model.load_state_dict(initial_weights(config, seed))
    return model.train()


def hf_loop(workload: Workload, attention: str = "sdpa", change: Callable[[nn.Module], Callable[[], None]] | None = None,
            note: str = "") -> TrainingLoop:
    """Build what TTL's scripts did: fp32 weights, autocast where the profile says bf16, AdamW over lists of tensors.

    Args:
        workload: what is trained.
        attention: as for `build_hf_model`.
        change: made to the model before training; returns what takes it back.
        note: for the row.
    """
    refuse_documents(workload)
    model = build_hf_model(workload.run.model, workload.run.run.seed, workload.device, attention)
    undo = change(model) if change else None
    precision = workload.settings.profile.precision
    note = note or f"eager, {attention}, fp32 weights{'' if precision == 'fp32' else f', autocast {precision}'}"

    def mean_loss(input_ids: Tensor, labels: Tensor) -> Tensor:
        labels = labels.contiguous()
        return model(input_ids=input_ids, labels=labels, shift_labels=labels).loss

    return TrainingLoop(model, mean_loss, workload, note, fused=False,
                        autocast=None if precision == "fp32" else DTYPES[precision], undo=undo)


def hf_llama_module() -> ModuleType:
    """Return the module of Hugging Face's Llama, whose names others replace."""
    from transformers.models.llama import modeling_llama

    return modeling_llama


def open_hf_folder(folder: str | os.PathLike[str], device: torch.device, dtype: torch.dtype) -> Any:
    """Load a model folder with transformers, as its users do; its `generate` ends nothing early."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True, local_files_only=True)
    model.generation_config.eos_token_id = None
    return model.to(device).eval()


def hf_greedy(model: Any, prompt: Tensor, new_tokens: int) -> Tensor:
    """Generate exactly so many tokens after a prompt, greedily: [b, s] -> [b, s + new_tokens]."""
    return model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, use_cache=True,
                          max_new_tokens=new_tokens, pad_token_id=0)
