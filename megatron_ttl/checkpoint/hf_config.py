"""Between ModelConfig and Hugging Face's config.json: all is written out, and only what we know is read.

The reader takes a list of Llama's fields and nothing else: what it does not know could change the model, or
load code.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ttl.checkpoint.bounded_json import read_json_object
from megatron_ttl.config.schema import ModelConfig
from megatron_ttl.errors import CheckpointError, raise_faults
from megatron_ttl.tokenizer.tokenizer import Tokenizer

_LARGEST = 2**31 - 1
# No weight stands for these: every layer is a list entry before weights are looked for, and an evaluation takes windows
# as long as the model has positions.
_MOST = {"num_hidden_layers": 10_000, "max_position_embeddings": 1 << 20}

# Integers of the architecture, and what Hugging Face takes where the field is absent.
_SIZES: dict[str, int | None] = {
    "hidden_size": None, "intermediate_size": None, "num_hidden_layers": None, "num_attention_heads": None,
    "num_key_value_heads": None, "vocab_size": None, "max_position_embeddings": 2048,
}

# Fields that must have the one value for which our model is the same function.
_FIXED: dict[str, tuple[Any, str]] = {
    "model_type": ("llama", "no other architecture is known"),
    "architectures": (["LlamaForCausalLM"], "no other architecture is known"),
    "hidden_act": ("silu", "no other activation is known"),
    "attention_bias": (False, "the model has no biases"),
    "mlp_bias": (False, "the model has no biases"),
    "tie_word_embeddings": (False, "embedding and head are two weights"),
    "attention_dropout": (0.0, "the model has no dropout"),
    "pretraining_tp": (1, "another value changes the rounding"),
    "rope_scaling": (None, "positions are not scaled"),
    "is_encoder_decoder": (False, "the model is a decoder"),
    "quantization_config": (None, "the weights are read as they are"),
}

# Fields that say nothing about the function that the model computes.
_IGNORED = {"_name_or_path", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "dtype",
            "torch_dtype", "initializer_range", "transformers_version", "use_cache", "return_dict",
            "output_attentions", "output_hidden_states", "id2label", "label2id", "problem_type",
            "chunk_size_feed_forward"}
_NOT_WRITTEN = ("is_encoder_decoder", "quantization_config")
_HANDLED = {"head_dim", "rms_norm_eps", "rope_theta", "rope_parameters"}
_CURE = "use a Llama-2 model folder, such as tools/convert_to_hf.py writes"


def hf_config(config: ModelConfig, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    """Return the content of config.json, rotary settings and dtype in the words of transformers 4 and 5."""
    return {
        **{key: value for key, (value, _) in _FIXED.items() if key not in _NOT_WRITTEN},
        **{key: getattr(config, key) for key in _SIZES},
        "head_dim": config.head_dim, "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id,
        "initializer_range": 0.02, "use_cache": True, "dtype": dtype, "torch_dtype": dtype,
    }


def read_hf_config(path: Path) -> ModelConfig:
    """Read a config.json strictly.

    Raises:
        CheckpointError: with all faults: fields that are missing, unknown, or mean another model than ours.
    """
    content = read_json_object(path, follow_links=True)
    required = ("model_type", *(key for key in list(_SIZES)[:6] if key != "num_key_value_heads"))
    faults = [f"{key}: is missing; it must be there" for key in required if key not in content]
    faults += _unknown(content) + _fixed_faults(content)
    content = {"num_key_value_heads": content.get("num_attention_heads"), "max_position_embeddings": 2048,
               **content}
    for key in _SIZES:
        largest = _MOST.get(key, _LARGEST)
        if key in content and not _is_whole(content[key], largest):
            faults.append(f"{key}: {_short(content[key])}; it must be a whole number from 1 to {largest}")
    epsilon = content.get("rms_norm_eps", 1e-6)
    if not _is_number(epsilon) or not 0 < epsilon < 1:
        faults.append(f"rms_norm_eps: {epsilon!r}; it must be a number between 0 and 1")
    theta, theta_faults = _rope_theta(content)
    faults += theta_faults
    if not faults:
        faults = _head_faults(content)
    raise_faults(CheckpointError, (f"{path}: {fault}; {_CURE}" for fault in faults))
    return ModelConfig(**{key: content[key] for key in _SIZES}, rms_norm_eps=float(epsilon),
                       rope_theta=float(theta))


def _unknown(content: Mapping[str, Any]) -> list[str]:
    known = _SIZES.keys() | _FIXED.keys() | _IGNORED | _HANDLED
    return [f"{key[:80]!r}: is not a field that we know; every field must be known, for it could change the "
            "model or load code" for key in sorted(content.keys() - known)]


def _fixed_faults(content: Mapping[str, Any]) -> list[str]:
    # In Python 0 == False: the type of a yes or no must be right as well.
    return [f"{key}: {_short(content[key])}; it must be {value!r}, {why}"
            for key, (value, why) in _FIXED.items() if key in content
            and (content[key] != value or isinstance(content[key], bool) != isinstance(value, bool))]


def _rope_theta(content: Mapping[str, Any]) -> tuple[float, list[str]]:
    """Return the base of the rotary angles, a field for transformers 4, in `rope_parameters` for 5."""
    rope = content.get("rope_parameters")
    if rope is None:
        rope = {}
    plain = isinstance(rope, dict) and rope.keys() <= {"rope_theta", "rope_type"}
    if not plain or rope.get("rope_type", "default") != "default":
        return 0.0, [f"rope_parameters: {_short(rope)}; it must be rope_theta and rope_type 'default', "
                     "positions are not scaled"]
    given = [source["rope_theta"] for source in (rope, content) if "rope_theta" in source] or [10_000.0]
    if any(not _is_number(theta) or not 1 < theta < 1e12 for theta in given) or len(set(given)) > 1:
        return 0.0, [f"rope_theta: {' and '.join(_short(theta) for theta in given)}; it must be one number "
                     "larger than 1"]
    return given[0], []


def _head_faults(content: Mapping[str, Any]) -> list[str]:
    hidden, heads, groups = (content[key] for key in ("hidden_size", "num_attention_heads",
                                                      "num_key_value_heads"))
    faults = []
    if hidden % heads or hidden // heads % 2:
        faults.append(f"hidden_size: {hidden} with {heads} attention heads; it must be an even multiple of "
                      "them")
    elif content.get("head_dim") not in (None, hidden // heads):
        faults.append(f"head_dim: {_short(content['head_dim'])}; it must be hidden_size / "
                      f"num_attention_heads = {hidden // heads}")
    if heads % groups:
        faults.append(f"num_key_value_heads: {groups}; it must divide num_attention_heads = {heads}")
    if content["vocab_size"] < 4:
        faults.append(f"vocab_size: {content['vocab_size']}; it must be at least 4")
    return faults


def _is_whole(value: Any, largest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= largest


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
