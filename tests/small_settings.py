"""A run file and a DeepSpeed JSON with the keys that must be there, for tests of settings."""

PROFILE = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}}
RUN = """
[run]
dir = "runs/x"
[model]
hidden_size = 64
intermediate_size = 128
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
vocab_size = 512
max_position_embeddings = 128
[data]
sources = [{ prefix = "data/pt", weight = 1.0 }]
[train]
sequence_length = 64
tokens_per_step = 512
steps = 100
[optimizer]
lr = 1e-3
[schedule]
kind = "cosine"
warmup_steps = 10
[checkpoint]
every_steps = 10
[energy]
country_iso_code = "BRA"
"""
