"""Count the memory of real computations on any device: what autograd keeps, and the peak of all storages."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_ttl.config.deepspeed import resolve_deepspeed
from megatron_ttl.config.degrees import data_parallel_size_of
from megatron_ttl.config.load import load_settings
from megatron_ttl.train.engine import Engine
from megatron_ttl.train.engine_options import engine_options


class KeptByAutograd(torch.autograd.graph.saved_tensors_hooks):
    """Bytes of all storages that a forward pass keeps for its backward pass, each once."""

    def __init__(self, without: Iterable[Tensor]) -> None:
        self._known = {tensor.untyped_storage().data_ptr() for tensor in without}
        self.storages: dict[int, torch.UntypedStorage] = {}
        super().__init__(self._note, lambda tensor: tensor)

    def __enter__(self) -> Self:
        super().__enter__()
        return self

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self.storages[storage.data_ptr()] = storage  # held, so that its address is not given to another
        return tensor

    @property
    def bytes(self) -> int:
        """So far."""
        return sum(storage.nbytes() for storage in self.storages.values())


class PeakMemory(TorchDispatchMode):
    """Follows every storage that an operation makes until it is freed; what an operation frees itself is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.at_peak = ""
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._follow(tensor, 0)  # was there before
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._follow(tensor, tensor.untyped_storage().nbytes())
        if self.now > self.peak:
            self.peak, self.at_peak = self.now, str(func)
        return result

    def _follow(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self._known:
            self._known.add(address)
            self.now += size
            weakref.finalize(storage, self._freed, address, size)

    def _freed(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.now -= size


def peaks_of_steps(mesh, files: list[tuple[str, str]]) -> list[int]:
    """Train under each pair of files; return the most bytes that a step holds beyond what lies there between steps."""
    peaks = []
    for pair in files:
        engine, step = engine_of(mesh, *pair)
        step()  # makes moments and rotary tables
        with PeakMemory() as counted:
            step()
        engine.close()
        peaks.append(counted.peak)
    return peaks


def memory_on_a_gpu(mesh, deepspeed_path: str, run_path: str, cap: int) -> tuple[int, int]:
    """Train three steps with at most `cap` bytes for PyTorch's allocator; return what it handed out, and what it held."""
    total = torch.cuda.get_device_properties(mesh.device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total), mesh.device)
    engine, step = engine_of(mesh, deepspeed_path, run_path)
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    engine.close()
    return torch.cuda.max_memory_allocated(mesh.device), torch.cuda.max_memory_reserved(mesh.device)


def engine_of(mesh, deepspeed_path: str, run_path: str) -> tuple[Engine, Callable[[], object]]:
    """Return the engine that a pair of files asks for, and a function that does one step with it."""
    settings = load_settings(deepspeed_path, run_path)
    run, profile = settings.run, settings.profile
    resolved = resolve_deepspeed(settings, data_parallel_size_of(settings, mesh.world_size))
    engine = Engine(run, resolved, mesh.cut(profile.cut.tensor, profile.cut.pipeline, profile.cut.sequence),
                    profile.recompute, options=engine_options(run, profile, mesh.world_size, mesh.device))
    ids = torch.zeros(profile.train_micro_batch_size_per_gpu, run.train.sequence_length, dtype=torch.int64)
    return engine, lambda: engine.train_step([(ids, ids)] * engine.accumulation, 1e-3, run.train.tokens_per_step)
