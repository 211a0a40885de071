"""Count what a real optimizer step sends: every collective of this process, by the ranks that take part."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ttl.config.deepspeed import resolve_deepspeed
from megatron_ttl.config.degrees import data_parallel_size_of
from megatron_ttl.config.load import load_settings
from megatron_ttl.train.engine import Engine

SMALL = 32  # bytes: norms, overflow flags, shapes; what processes agree on is not counted

_INPUT = {"_allgather_base_": 1, "_reduce_scatter_base_": 1}  # the others begin with what they send


class CountedTraffic(TorchDispatchMode):
    """Adds up the bytes that this process sends, by ring algorithms, to its tensor, pipeline and data neighbours."""

    def __init__(self, mesh) -> None:
        super().__init__()
        self.mesh = mesh
        self.sent = {"tensor": 0.0, "pipeline": 0.0, "data": 0.0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("c10d::")
        if func.namespace == "c10d" and name not in ("recv_", "barrier"):
            volume = _bytes(args[_INPUT.get(name, 0)])
            if volume > SMALL:
                group = next(dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject)
                             and "ProcessGroup" in str(a._type()))
                n = group.size()
                factor = {"allreduce_": 2 * (n - 1) / n, "_allgather_base_": n - 1,
                          "_reduce_scatter_base_": (n - 1) / n, "send": 1}[name]
                if factor * volume:
                    self.sent["pipeline" if name == "send" else self._axis(group)] += factor * volume
        return func(*args, **(kwargs or {}))

    def _axis(self, group) -> str:
        places = [self.mesh.layout.place(rank) for rank in dist.get_process_group_ranks(group)]
        varying = [axis for axis in ("tensor", "pipeline", "data") if len({getattr(p, axis) for p in places}) > 1]
        assert len(varying) == 1, places
        return varying[0]


def _bytes(tensors) -> int:
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(_bytes, tensors))


def count_steps(mesh, files: list[tuple[str, str]]) -> list[tuple[dict[str, float], int]]:
    """Train under each pair of files; return what the third step sent and how many weights this process has."""
    return [_count(mesh, *pair) for pair in files]


def _count(mesh, deepspeed_path: str, run_path: str) -> tuple[dict[str, float], int]:
    settings = load_settings(deepspeed_path, run_path)
    run, profile = settings.run, settings.profile
    resolved = resolve_deepspeed(settings, data_parallel_size_of(settings, mesh.world_size))
    mesh = mesh.cut(profile.cut.tensor, profile.cut.pipeline, profile.cut.sequence)
    engine = Engine(run, resolved, mesh, profile.recompute)
    ids = torch.zeros(profile.train_micro_batch_size_per_gpu, run.train.sequence_length, dtype=torch.int64)
    counted = CountedTraffic(mesh)
    for step in range(3):  # ZeRO 3 learns in the first step what will be needed when
        with counted if step == 2 else nullcontext():
            engine.train_step([(ids, ids)] * engine.accumulation, 1e-3, run.train.tokens_per_step)
    weights = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    engine.close()
    return counted.sent, weights
