from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_ttl.checkpoint.hf_config import hf_config, read_hf_config
from megatron_ttl.config.schema import ModelConfig
from megatron_ttl.errors import CheckpointError

CONFIG = ModelConfig(hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6,
                     num_key_value_heads=2, vocab_size=400, max_position_embeddings=96, rms_norm_eps=1e-5,
                     rope_theta=50_000.0)
TOKENIZER: Any = SimpleNamespace(bos_id=1, eos_id=2, pad_id=3)


def read(folder: Path, content: Any) -> ModelConfig:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "config.json").write_text(text, encoding="utf-8")
    return read_hf_config(folder / "config.json")


def ours(**changes: Any) -> dict[str, Any]:
    return {**hf_config(CONFIG, TOKENIZER, "bfloat16"), **changes}


def without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in ours().items() if key not in keys}


def test_what_we_write_we_read(tmp_path: Path) -> None:
    assert read(tmp_path, ours()) == CONFIG


def test_both_generations_of_transformers_find_their_words() -> None:
    """Version 4 reads rope_theta and torch_dtype, version 5 rope_parameters and dtype."""
    content = ours()
    assert content["rope_theta"] == content["rope_parameters"]["rope_theta"] == 50_000.0
    assert content["rope_scaling"] is None and content["rope_parameters"]["rope_type"] == "default"
    assert content["dtype"] == content["torch_dtype"] == "bfloat16"
    assert content["architectures"] == ["LlamaForCausalLM"] and content["model_type"] == "llama"
    assert content["head_dim"] == 8 and content["attention_bias"] is content["mlp_bias"] is False


def test_transformers_reads_every_field_and_writes_what_we_read(tmp_path: Path) -> None:
    from transformers import AutoConfig

    read(tmp_path, ours())
    theirs = AutoConfig.from_pretrained(tmp_path)
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "vocab_size", "max_position_embeddings", "head_dim", "rms_norm_eps",
                "tie_word_embeddings"):
        assert getattr(theirs, key) == getattr(CONFIG, key), key
    assert theirs.hidden_act == "silu"
    assert theirs.rope_parameters == {"rope_theta": 50_000.0, "rope_type": "default"}
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 3)
    assert str(theirs.dtype) == "torch.bfloat16" or theirs.dtype == "bfloat16"
    theirs.save_pretrained(tmp_path / "again")
    assert read_hf_config(tmp_path / "again" / "config.json") == CONFIG
    theirs.to_json_file(tmp_path / "config.json", use_diff=False)  # every field that transformers has
    assert read_hf_config(tmp_path / "config.json") == CONFIG


def test_the_files_of_published_models(tmp_path: Path) -> None:
    """The fields that TinyLlama-1.1B and Llama-2 were published with, by transformers 4."""
    published = {
        "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 5632,
        "max_position_embeddings": 2048, "model_type": "llama", "num_attention_heads": 32,
        "num_hidden_layers": 22, "num_key_value_heads": 4, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float32",
        "transformers_version": "4.31.0.dev0", "use_cache": True, "vocab_size": 32000}
    config = read(tmp_path, published)
    assert (config.num_key_value_heads, config.rope_theta, config.rms_norm_eps) == (4, 10_000.0, 1e-5)
    del published["num_key_value_heads"], published["rms_norm_eps"], published["max_position_embeddings"]
    config = read(tmp_path, published)
    assert (config.num_key_value_heads, config.rms_norm_eps) == (32, 1e-6)
    assert config.max_position_embeddings == 2048


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "another model": (lambda: ours(model_type="mistral"), "model_type: 'mistral'; it must be 'llama'"),
    "another class": (lambda: ours(architectures=["LlamaForSequenceClassification"]),
                      "architectures: .*no other architecture"),
    "tied": (lambda: ours(tie_word_embeddings=True),
             "tie_word_embeddings: True; it must be False, embedding and head are two"),
    "tied, as a number": (lambda: ours(tie_word_embeddings=1), "tie_word_embeddings: 1; it must be False"),
    "attention bias": (lambda: ours(attention_bias=True),
                       "attention_bias: True; it must be False, the model has no biases"),
    "bias as 0": (lambda: ours(attention_bias=0), "attention_bias: 0; it must be False"),
    "mlp bias": (lambda: ours(mlp_bias=True), "mlp_bias: True"),
    "gelu": (lambda: ours(hidden_act="gelu"), "hidden_act: 'gelu'; it must be 'silu'"),
    "dropout": (lambda: ours(attention_dropout=0.1), "attention_dropout: 0.1; it must be 0.0"),
    "tensor parallel rounding": (lambda: ours(pretraining_tp=2), "pretraining_tp: 2; it must be 1"),
    "linear scaling": (lambda: ours(rope_scaling={"type": "linear", "factor": 2.0}),
                       "rope_scaling: .*positions are not scaled"),
    "llama3 scaling": (lambda: ours(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, "factor": 8}),
                       "rope_parameters"),
    "dynamic": (lambda: ours(rope_parameters={"rope_type": "dynamic", "rope_theta": 5e4}),
                "rope_parameters: .*'dynamic'"),
    "rope list": (lambda: ours(rope_parameters=[1]), "rope_parameters"),
    "two thetas": (lambda: ours(rope_theta=10_000.0),
                   "rope_theta: 50000.0 and 10000.0; it must be one number"),
    "theta text": (lambda: {**without("rope_parameters"), "rope_theta": "1e4"}, "rope_theta: '1e4'"),
    "theta 0": (lambda: {**without("rope_parameters"), "rope_theta": 0},
                "rope_theta: 0; it must be one number larger than 1"),
    "remote code": (lambda: ours(auto_map={"AutoModel": "x.Y"}),
                    "'auto_map': is not a field that we know.*load code"),
    "internal attention": (lambda: ours(_attn_implementation_internal="a/b"),
                           "'_attn_implementation_internal': is not a field"),
    "attention kernel": (lambda: ours(_attn_implementation="kernels-community/x"),
                         "'_attn_implementation': is not a field"),
    "pipelines": (lambda: ours(custom_pipelines={}), "'custom_pipelines': is not a field"),
    "quantised": (lambda: ours(quantization_config={"quant_method": "awq"}),
                  "quantization_config: .*it must be None"),
    "sliding window": (lambda: ours(sliding_window=4), "'sliding_window': is not a field"),
    "long key": (lambda: ours(**{"k" * 100_000: 1}), "'k{80}': is not a field"),
    "text size": (lambda: ours(hidden_size="48"), "hidden_size: '48'; it must be a whole number"),
    "float size": (lambda: ours(vocab_size=400.0), "vocab_size: 400.0; it must be a whole number"),
    "bool size": (lambda: ours(num_hidden_layers=True), "num_hidden_layers: True; it must be a whole number"),
    "negative": (lambda: ours(intermediate_size=-1),
                 "intermediate_size: -1; it must be a whole number from 1"),
    "huge": (lambda: ours(hidden_size=2**40),
             "hidden_size: 1099511627776; it must be a whole number from 1 to 2147483647"),
    "list": (lambda: ours(num_attention_heads=[6]), r"num_attention_heads: \[6\]"),
    "no size": (lambda: without("hidden_size"), "hidden_size: is missing; it must be there"),
    "no type": (lambda: without("model_type"), "model_type: is missing"),
    "heads": (lambda: ours(num_attention_heads=7, num_key_value_heads=7),
              "hidden_size: 48 with 7 attention heads"),
    "odd heads": (lambda: ours(num_attention_heads=16),
                  "hidden_size: 48 with 16 attention heads; it must be an even multiple"),
    "groups": (lambda: ours(num_key_value_heads=4),
               "num_key_value_heads: 4; it must divide num_attention_heads = 6"),
    "head size": (lambda: ours(head_dim=16),
                  "head_dim: 16; it must be hidden_size / num_attention_heads = 8"),
    "tiny vocabulary": (lambda: ours(vocab_size=3), "vocab_size: 3; it must be at least 4"),
    "epsilon": (lambda: ours(rms_norm_eps=0), "rms_norm_eps: 0; it must be a number between 0 and 1"),
    "epsilon text": (lambda: ours(rms_norm_eps="1e-5"), "rms_norm_eps: '1e-5'"),
    "epsilon NaN": (lambda: json.dumps(ours(rms_norm_eps=float("nan"))), "NaN is no number of JSON"),
    "duplicate": (lambda: json.dumps(ours())[:-1] + ', "vocab_size": 5}',
                  "key 'vocab_size' stands there twice"),
    "deep": (lambda: '{"a":' * 100_000, "is nested too deeply|is not JSON"),
    "array": (lambda: "[]", "holds list; it must be a JSON object"),
    "not JSON": (lambda: "model_type: llama", "is not JSON"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path: Path, name: str) -> None:
    content, message = REFUSED[name]
    with pytest.raises(CheckpointError, match=f"config.json: .*{message}|config.json: {message}") as caught:
        read(tmp_path, content())
    assert all(len(fault) < 700 for fault in caught.value.faults)


def test_all_faults_at_once(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path, {**without("vocab_size"), "auto_map": {}, "mlp_bias": True, "hidden_size": 0,
                        "rms_norm_eps": 2})
    assert len(caught.value.faults) == 5


def test_missing_and_special_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="config.json: cannot be read .No such file"):
        read_hf_config(tmp_path / "config.json")
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match="config.json: cannot be read .Is a directory.; it must be a regular file"):
        read_hf_config(tmp_path / "config.json")


def test_links_are_followed(tmp_path: Path) -> None:
    """Hugging Face's cache consists of links."""
    (tmp_path / "snapshot").mkdir()
    read(tmp_path, ours())
    (tmp_path / "snapshot" / "config.json").symlink_to(tmp_path / "config.json")
    assert read_hf_config(tmp_path / "snapshot" / "config.json") == CONFIG
