"""A tiny dataset, and runs of the real loop on it."""

from __future__ import annotations

import json
from pathlib import Path

from tiny_folder import documents, write_dataset, write_tokenizer

PIECES = 350


def write_data(folder: Path) -> Path:
    """Write `train` and `held` datasets with one tokenizer; return the folder."""
    folder.mkdir(exist_ok=True)
    tokenizer = write_tokenizer(folder / "tokenizer")
    write_dataset(folder / "train", tokenizer, documents(150, seed=1))
    write_dataset(folder / "held", tokenizer, documents(12, seed=2))
    return folder


def write_settings(folder: Path, data: Path, run_dir: Path, profile: dict | None = None) -> tuple[Path, Path]:
    """Write a DeepSpeed JSON and a run file of twelve steps with everything switched on."""
    deepspeed = folder / "machine.json"
    deepspeed.write_text(json.dumps(profile or {"train_micro_batch_size_per_gpu": 2,
                                                "zero_optimization": {"stage": 1}}))
    run = folder / "run.toml"
    run.write_text(f"""
[run]
dir = "{run_dir}"
seed = 7
[model]
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
vocab_size = {PIECES}
max_position_embeddings = 32
[data]
sources = [{{ prefix = "{data}/train", weight = 1.0 }}]
[train]
sequence_length = 32
tokens_per_step = 256
steps = 12
gradient_clipping = 1.0
[optimizer]
lr = 1e-2
[schedule]
kind = "cosine"
warmup_steps = 3
[evaluation]
prefixes = ["{data}/held"]
every_steps = 6
[checkpoint]
every_steps = 100
keep_last = 50
[log]
every_steps = 1
[energy]
enabled = false
""")
    return deepspeed, run


def train_here(mesh, deepspeed: str, run: str, overrides: list[str], stop_after: int | None = None,
               allow: tuple[str, ...] = ()) -> int:
    """Do what pretrain_ttl.py does, in this process; `stop_after` sends SIGTERM when that step is reached."""
    import os
    import signal

    from megatron_ttl.config.load import load_settings
    from megatron_ttl.train.loop import train
    from megatron_ttl.train.session import prepare
    from megatron_ttl.train.stop import StopRequest

    session = prepare(load_settings(deepspeed, run, overrides, allow), mesh)
    if stop_after is not None:
        step_of = session.engine.train_step

        def step_and_stop(*arguments):
            result = step_of(*arguments)
            if session.state.step + 1 == stop_after:
                os.kill(os.getpid(), signal.SIGTERM)
            return result

        session.engine.train_step = step_and_stop
    try:
        with StopRequest(speaks=mesh.is_first) as stop:
            return int(train(session, stop))
    finally:
        session.close()
