"""For tests alone: several gloo processes started in a fraction of a second, and a tiny run file."""

from __future__ import annotations

import json
import multiprocessing
import queue
import signal
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

from megatron_ttl.config.schema import ModelConfig, RunFile

# What the first deepspeed.initialize imports by itself: loaded once in the fork server, not once per process.
_PRELOAD = ["torch._dynamo", "torch._inductor.compile_fx", "megatron_ttl.parallel.door",
            "deepspeed.runtime.zero.muon.muon_optimizer", "megatron_ttl.train.loop"]


def run_distributed(function: Callable[..., Any], world_size: int, *arguments: Any,
                    timeout_s: float = 120) -> list[Any]:
    """Call `function(mesh, *arguments)` on `world_size` gloo processes and return their results by rank.

    Args:
        function: importable by name; its result must survive pickling.
        world_size: number of processes.
        timeout_s: after so long without a result the processes are killed.

    Raises:
        RuntimeError: a process raised, died or hung; with its traceback.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    results: Any = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=_child, daemon=True,
                                     args=(function, rank, world_size, f"file://{folder}/store", results, arguments))
                     for rank in range(world_size)]
        for process in processes:
            process.start()
        try:
            return _collect(results, processes, timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(results: Any, processes: list[Any], timeout_s: float) -> list[Any]:
    found: dict[int, Any] = {}
    waited = 0.0
    while len(found) < len(processes):
        try:
            rank, result, error = results.get(timeout=0.5)
        except queue.Empty:
            waited += 0.5
            dead = [r for r, p in enumerate(processes) if not p.is_alive() and r not in found]
            if dead and results.empty():
                raise RuntimeError(f"rank {dead[0]} died with exit code {processes[dead[0]].exitcode}") from None
            if waited >= timeout_s:
                raise RuntimeError(f"no result from ranks {sorted(set(range(len(processes))) - set(found))} "
                                   f"within {timeout_s} s") from None
            continue
        if error:
            raise RuntimeError(f"rank {rank}:\n{error}")
        found[rank] = result
    return [found[rank] for rank in range(len(processes))]


def _child(function: Callable[..., Any], rank: int, world_size: int, rendezvous: str, results: Any,
           arguments: tuple[Any, ...]) -> None:
    import torch

    from megatron_ttl.parallel.mesh import join
    from megatron_ttl.runtime import Ranks

    torch.set_num_threads(1)
    try:
        mesh = join(Ranks(rank, world_size, rank), timeout_s=60, rendezvous=rendezvous)
        results.put((rank, function(mesh, *arguments), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    finally:
        results.close()
        results.join_thread()
        # Tensors travel through this process's shared memory: it stays until the parent has them and kills it.
        signal.pause()


def tiny_model(**changes: Any) -> ModelConfig:
    """Return a two-layer model with grouped key/value heads; any field can be changed."""
    return ModelConfig(**{"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
                          "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 32, **changes})


def tiny_run(directory: str, **sections: dict[str, Any]) -> RunFile:
    """Return a run file for `tiny_model`; each keyword updates one section."""
    values: dict[str, dict[str, Any]] = {
        "run": {"dir": directory, "seed": 1},
        "model": tiny_model().model_dump(),
        "data": {"sources": [{"prefix": "data/none"}]},
        "train": {"sequence_length": 32, "tokens_per_step": 256, "steps": 10, "gradient_clipping": 0.3},
        "optimizer": {"lr": 1e-3, "weight_decay": 0.1},
        "schedule": {"kind": "constant", "warmup_steps": 2},
        "checkpoint": {"every_steps": 5},
        "log": {"every_steps": 1},
        "energy": {"enabled": False},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return RunFile.model_validate_json(json.dumps(values))
