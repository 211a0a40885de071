"""Training under a layout, for the parity tests: one data for all layouts, and a loop in plain torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from megatron_ttl.checkpoint.names import split_to_hf
from megatron_ttl.checkpoint.state import capture
from megatron_ttl.kernels.cross_entropy import cross_entropy
from megatron_ttl.model.llama import build_model
from megatron_ttl.testing import tiny_model, tiny_run
from megatron_ttl.train.engine import Engine, EngineOptions
from megatron_ttl.train.optimizer import build_optimizer, parameter_groups

STEPS, BATCH, SEQUENCE, CLIPPING = 10, 24, 32, 0.3

MODELS = {
    "MHA": {"num_hidden_layers": 3, "num_key_value_heads": 4},
    "GQA": {"num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4},
    "odd vocabulary": {"num_hidden_layers": 3, "num_key_value_heads": 4, "vocab_size": 97},
    "five blocks": {"num_hidden_layers": 5, "num_key_value_heads": 4},
}


@dataclass(frozen=True)
class Case:
    """One row of the parity matrix; what the degrees leave of the processes is data parallel."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    stage: int = 1
    model: str = "MHA"
    sequence: bool = False
    recompute: str = "none"
    precision: str = "fp32"
    micro_batch: int = 6
    offload: bool = False
    engine: str = "deepspeed"

    @property
    def options(self):
        return EngineOptions(self.engine)

    @property
    def world_size(self):
        return self.tensor * self.pipeline * self.data

    def __str__(self):
        layout = f"tp{self.tensor}-pp{self.pipeline}-dp{self.data}-zero{self.stage}"
        words = ["flat" if self.engine == "flat" else layout, self.model.replace(" ", "_")]
        words += ["sequence"] * self.sequence + ["offload"] * self.offload
        words += [word for word in (self.recompute, self.precision) if word not in ("none", "fp32")]
        return "-".join(words)


def run_of(case):
    """Return the run file: clipping on and active, weight decay on.

    Adam's epsilon is larger than usual: with 1e-8 a gradient entry that is zero but for rounding moves a weight by a
    whole learning rate in a direction that rounding chooses, under any layout and in any program.
    """
    return tiny_run("unused", model=tiny_model(**MODELS[case.model]).model_dump(), optimizer={"eps": 1e-5},
                    train={"gradient_clipping": CLIPPING})


def deepspeed_settings(case, clipping=CLIPPING):
    """Return what `resolve_deepspeed` would for a batch of 24 sequences."""
    settings = {"train_micro_batch_size_per_gpu": case.micro_batch, "train_batch_size": BATCH,
                "gradient_accumulation_steps": BATCH // case.micro_batch // case.data, "gradient_clipping": clipping,
                "zero_optimization": {"stage": case.stage}, "communication_data_type": "fp32",
                "zero_allow_untested_optimizer": True, "steps_per_print": 10**9}
    if case.offload:
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        settings["zero_force_ds_cpu_optimizer"] = False
    if case.precision != "fp32":
        settings |= {case.precision: {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    return settings


def steps_of_data(vocab_size, micro_batch, rank=0, world_size=1, steps=STEPS, seed=5):
    """Yield the micro batches of each step; the first rows carry ignored labels, so micro batches weigh differently."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = torch.randint(vocab_size, (BATCH, SEQUENCE + 1), generator=generator)
        labels = ids[:, 1:].clone()
        labels[:7, : SEQUENCE - 5] = -100
        pairs = list(zip(ids[:, :-1].split(micro_batch), labels.split(micro_batch), strict=True))
        yield pairs[rank::world_size]


def plain_loop(case, clipping=CLIPPING, steps=STEPS):
    """Train without DeepSpeed and layouts: fp32 masters, fp32 accumulation, torch's AdamW and clipping.

    Returns losses and norms [2, steps], and the final weights by Hugging Face's names.
    """
    run, bf16 = run_of(case), case.precision == "bf16"
    master = build_model(run.model, run.run.seed)
    model = build_model(run.model, run.run.seed, dtype=torch.bfloat16 if bf16 else torch.float32)
    optimizer = build_optimizer(parameter_groups(master, run.optimizer), run.optimizer, torch.device("cpu"))
    rows = []
    for micro_batches in steps_of_data(run.model.vocab_size, case.micro_batch, steps=steps):
        tokens = sum(int((labels != -100).sum()) for _, labels in micro_batches)
        total = 0.0
        for ids, labels in micro_batches:
            nats = cross_entropy(model(ids), labels)
            (nats / tokens).backward()
            total += nats.item()
            for wide, low in zip(master.parameters(), model.parameters(), strict=True):
                wide.grad = low.grad.float() if wide.grad is None else wide.grad + low.grad.float()
                low.grad = None
        norm = torch.nn.utils.clip_grad_norm_(master.parameters(), clipping or 1e9)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for wide, low in zip(master.parameters(), model.parameters(), strict=True):
                low.copy_(wide)
        rows.append((total / tokens, float(norm)))
    weights = {}
    for name, tensor in master.state_dict().items():
        weights |= split_to_hf(name, tensor, run.model)
    return torch.tensor(rows, dtype=torch.float64).T, weights


def train_case(mesh, case, clipping=CLIPPING):
    """Train under a layout; return losses and norms [2, steps], and this process's pieces of the final state."""
    run = run_of(case)
    mesh = mesh.cut(case.tensor, case.pipeline, case.sequence)
    engine = Engine(run, deepspeed_settings(case, clipping), mesh, case.recompute, options=case.options)
    data = steps_of_data(run.model.vocab_size, case.micro_batch, mesh.data_parallel_rank, mesh.data_parallel_size)
    results = [engine.train_step(micro_batches, run.optimizer.lr) for micro_batches in data]
    curve = torch.tensor([[float(r.loss) for r in results], [float(r.grad_norm) for r in results]], dtype=torch.float64)
    pieces = capture(engine.state, run.model, mesh)
    engine.close()
    return curve, pieces


def train_cases(mesh, cases):
    """Train under several layouts one after the other; by case."""
    return {case: train_case(mesh, case) for case in cases}


def joined(states):
    """Put the pieces of all processes together, seeing that every element is there exactly once."""
    whole, seen = {}, {}
    for groups in states:
        for group, pieces in groups.items():
            for name, piece in pieces.items():
                tensor = whole.setdefault(group, {}).setdefault(name, torch.zeros(piece.shape, dtype=piece.tensor.dtype))
                count = seen.setdefault((group, name), torch.zeros(piece.shape, dtype=torch.int8))
                block = tuple(slice(start, start + size) for start, size in zip(piece.offset, piece.tensor.shape,
                                                                                strict=True))
                tensor[block] = piece.tensor
                count[block] += 1
    assert all(bool((count == 1).all()) for count in seen.values())
    return whole


def reference_of(case):
    """Return the case that one process and plain torch stand for."""
    return replace(Case(), model=case.model, precision=case.precision)
