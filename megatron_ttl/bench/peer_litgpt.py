"""The peer litgpt: its model under torch.compile. The only door to litgpt."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_ttl.bench.contender import not_installed
from megatron_ttl.bench.own_models import (
    compiled_on_a_gpu,
    initial_weights,
    mean_loss_of,
    prefer_cudnn_attention,
    refuse_documents,
)
from megatron_ttl.bench.training_loop import TrainingLoop
from megatron_ttl.bench.workload import Workload
from megatron_ttl.config.schema import ModelConfig

_OUTER = {"model.embed_tokens.weight": "transformer.wte.weight", "model.norm.weight": "transformer.ln_f.weight",
          "lm_head.weight": "lm_head.weight"}
_BLOCK = {"input_layernorm": "norm_1", "post_attention_layernorm": "norm_2", "self_attn.o_proj": "attn.proj",
          "mlp.gate_proj": "mlp.fc_1", "mlp.up_proj": "mlp.fc_2", "mlp.down_proj": "mlp.proj"}


def litgpt_loop(workload: Workload) -> TrainingLoop:
    """Build litgpt's model, in bf16 without fp32 masters where the profile says bf16, as its pretraining does."""
    refuse_documents(workload)
    dtype = torch.float32 if workload.settings.profile.precision == "fp32" else torch.bfloat16
    model = build_litgpt_model(workload.run.model, workload.run.run.seed).to(workload.device, dtype)
    prefer_cudnn_attention(workload.device)
    called, how, undo = compiled_on_a_gpu(model, workload.device)
    note = f"{str(dtype).removeprefix('torch.')} weights alone, {how}"
    return TrainingLoop(model, mean_loss_of(called, "torch", workload.all_labelled), workload, note, undo=undo)


def build_litgpt_model(config: ModelConfig, seed: int) -> nn.Module:
    """Build litgpt's model with the weights that a run begins with.

    Raises:
        NotInstalled: it is not there.
    """
    try:
        from litgpt import GPT, Config
    except ImportError as error:
        raise not_installed("litgpt", error) from None
    theirs = Config(
        name="bench", block_size=config.max_position_embeddings, vocab_size=config.vocab_size,
        padded_vocab_size=config.vocab_size, n_layer=config.num_hidden_layers, n_head=config.num_attention_heads,
        n_query_groups=config.num_key_value_heads, n_embd=config.hidden_size, rotary_percentage=1.0, parallel_residual=False,
        bias=False, norm_class_name="RMSNorm", norm_eps=config.rms_norm_eps, mlp_class_name="LLaMAMLP",
        intermediate_size=config.intermediate_size, rope_base=int(config.rope_theta))
    model = GPT(theirs)
    model.load_state_dict(_named_as_litgpt(initial_weights(config, seed), config.num_hidden_layers))
    return model


def _named_as_litgpt(weights: dict[str, Tensor], blocks: int) -> dict[str, Tensor]:
    """Rename Hugging Face's weights, and pack query, key and value."""
    found = {new: weights[old] for old, new in _OUTER.items()}
    for number in range(blocks):
        block, theirs = f"model.layers.{number}", f"transformer.h.{number}"
        found |= {f"{theirs}.{new}.weight": weights[f"{block}.{old}.weight"] for old, new in _BLOCK.items()}
        found[f"{theirs}.attn.qkv.weight"] = torch.cat([weights[f"{block}.self_attn.{piece}_proj.weight"]
                                                        for piece in "qkv"])
    return found
