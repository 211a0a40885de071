"""AdamW as it is measured: over one flat buffer, with the copy that the model computes with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_ttl.bench.kernel_bytes import adamw_bytes_per_parameter
from megatron_ttl.bench.kernel_timing import Call
from megatron_ttl.bench.own_engine import require_path
from megatron_ttl.errors import UserError

ADAMW = "adamw"
_LR, _BETAS, _EPS, _DECAY = 1e-3, (0.9, 0.95), 1e-8, 0.1


def adamw_bytes(dtype: torch.dtype) -> int:
    """Return the least traffic of a parameter whose weight is computed with in this dtype."""
    return adamw_bytes_per_parameter(0 if dtype == torch.float32 else dtype.itemsize)


def adamw_calls(parameters: int, paths: Sequence[str], device: torch.device, dtype: torch.dtype
                ) -> dict[str, Callable[[], list[Call]] | str]:
    """Return one update per path over so many parameters, or why there is none."""
    found: dict[str, Callable[[], list[Call]] | str] = {}
    for path in paths:
        if path == "torch":
            found[path] = partial(_calls, _torch_update, parameters, device, dtype)
        elif path in ("cuda", "apex"):
            try:
                require_path("adamw", path, device)
            except UserError as error:
                found[path] = f"not available: {error.faults[0]}"
            else:
                found[path] = partial(_calls, partial(_own_update, path), parameters, device, dtype)
    return found


def _calls(make: Callable[[Tensor, Tensor | None], Callable[[], None]], parameters: int, device: torch.device,
           dtype: torch.dtype) -> list[Call]:
    master = torch.randn(parameters, device=device) * 0.02
    update = make(master, None if dtype == torch.float32 else master.to(dtype))
    return [(lambda: None, lambda _: update())]


def _own_update(path: str, master: Tensor, weights: Tensor | None) -> Callable[[], None]:
    """The update of our engine: with our kernel, clipping and copy in one pass."""
    from megatron_ttl.kernels.adamw import adamw_

    gradient, average, square = torch.randn_like(master), torch.zeros_like(master), torch.zeros_like(master)
    lr, step, norm = (torch.full((), value, device=master.device) for value in (_LR, 1.0, 1.0))
    return partial(adamw_, master, gradient, average, square, weights, lr=lr, step=step, squared_norm=norm, clipping=1.0,
                   betas=_BETAS, eps=_EPS, weight_decay=_DECAY, path=path)


def _torch_update(master: Tensor, weights: Tensor | None) -> Callable[[], None]:
    """PyTorch's fused AdamW, then the copy by itself."""
    master.grad = torch.randn_like(master)
    options: dict[str, Any] = {"lr": _LR, "betas": _BETAS, "eps": _EPS, "weight_decay": _DECAY, "fused": True}
    optimizer = torch.optim.AdamW([master], **options)

    def update() -> None:
        optimizer.step()
        if weights is not None:
            weights.copy_(master)

    return update
