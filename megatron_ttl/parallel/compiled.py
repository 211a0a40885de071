"""torch.compile for the layers of a model: each block by itself, and only while it trains.

A block is compiled once, whatever the number of blocks: seconds and not minutes. What does not train (evaluation on windows
of other sizes, generation on a cache) runs as if nothing were compiled, for each new shape would be compiled anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ttl.errors import ConfigError
from megatron_ttl.model.llama import LMHead, SelfAttention, TransformerBlock
from megatron_ttl.parallel.tensor import ColumnParallelLinear


class _CompiledInTraining:
    """A layer's `add_forward`, compiled for training."""

    def __init__(self, layer: nn.Module, backend: str) -> None:
        self._layer = layer
        self._plain: Callable[..., Any] = layer.add_forward
        self._compiled = torch.compile(self._plain, dynamic=False, fullgraph=True, backend=backend)

    def __call__(self, residual: Tensor, delta: Tensor | None, documents: Any = None, cache: Any = None) -> Any:
        more = () if isinstance(self._layer, LMHead) else (documents, cache)
        if not self._layer.training or not torch.is_grad_enabled() or cache is not None:
            return self._plain(residual, delta, *more)
        if isinstance(attention := getattr(self._layer, "self_attn", None), SelfAttention):
            # Here and not inside: a table that a compiled region makes belongs to it, and is made again beside it.
            attention.angles(0, residual.shape[1], residual.device)
        return self._compiled(residual, delta, *more[:1])


def compile_model(model: nn.Module, backend: str = "inductor") -> None:
    """Compile the blocks and the head of a model in place; the first training step does the work.

    Args:
        model: what `build_part` built, with its paths and what it forgets already chosen, before an engine has it; one that
            hooks into modules, as ZeRO-3 does, cannot be compiled.
        backend: of torch.compile.

    Raises:
        ConfigError: its layers are cut over ranks.
    """
    if any(isinstance(module, ColumnParallelLinear) for module in model.modules()):
        raise ConfigError("compile: true; it must be false where layers are cut over ranks, whose exchanges are no part of "
                          "a compiled region; take parallel.tensor 1, or compile false")
    for module in list(model.modules()):
        if isinstance(module, TransformerBlock | LMHead):
            module.add_forward = _CompiledInTraining(module, backend)  # type: ignore[method-assign]
