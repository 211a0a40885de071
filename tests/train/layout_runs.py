"""Training under a layout, for the parity tests: the same data, dealt to whoever needs it."""

from __future__ import annotations

import torch

from megatron_ttl.train.engine import Engine

STEPS, BATCH, SEQUENCE = 10, 24, 32


def deepspeed_settings(stage=1, precision="fp32", micro_batch=3, data_parallel=1, clipping=0.3, offload=False):
    """Return what `resolve_deepspeed` would for a batch of 24 sequences."""
    settings = {"train_micro_batch_size_per_gpu": micro_batch, "train_batch_size": BATCH,
                "gradient_accumulation_steps": BATCH // micro_batch // data_parallel, "gradient_clipping": clipping,
                "zero_optimization": {"stage": stage}, "communication_data_type": "fp32",
                "zero_allow_untested_optimizer": True, "steps_per_print": 10**9}
    if offload:
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        settings["zero_force_ds_cpu_optimizer"] = False
    if precision != "fp32":
        settings |= {precision: {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    return settings


def steps_of_data(vocab_size, micro_batch=3, rank=0, world_size=1, steps=STEPS):
    """Yield the micro batches of each step; the first rows carry ignored labels, so micro batches weigh differently."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        ids = torch.randint(vocab_size, (BATCH, SEQUENCE + 1), generator=generator)
        labels = ids[:, 1:].clone()
        labels[:7, : SEQUENCE - 5] = -100
        pairs = list(zip(ids[:, :-1].split(micro_batch), labels.split(micro_batch), strict=True))
        yield pairs[rank::world_size]


def curve(mesh, run, settings, recompute="none", steps=STEPS):
    """Train; return the engine, and losses and norms.  # [2, steps]"""
    engine = Engine(run, settings, mesh, recompute)
    data = steps_of_data(run.model.vocab_size, settings["train_micro_batch_size_per_gpu"], mesh.data_parallel_rank,
                         mesh.data_parallel_size, steps)
    results = [engine.train_step(micro_batches, run.optimizer.lr) for micro_batches in data]
    return engine, torch.tensor([[float(r.loss) for r in results], [float(r.grad_norm) for r in results]],
                                dtype=torch.float64)
