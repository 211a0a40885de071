"""Which backend of attention a device takes: asked for, set for the whole process, and seen running."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from megatron_ttl.errors import ConfigError
from megatron_ttl.kernels.attention import BACKENDS, attention, backends_of
from megatron_ttl.kernels.flash_attn import flash_attn_refusal

Shape = tuple[int, int, int, int]
"""Query heads, key heads, tokens, channels of a head."""
SMALL: Shape = (4, 4, 256, 64)

# Parts of names, of kernels on a GPU and of operators elsewhere; the first that is found decides. The order matters:
# cuDNN's own kernels have "flash" in their names, and PyTorch's copy of flash-attn "flash::".
_TRACES = (
    ("cudnn", ("cudnn",)),
    ("flash", ("pytorch_flash", "_flash_attention")),
    ("efficient", ("fmha", "_efficient_attention")),
    ("flash_attn", ("flash::", "flash_attn")),
    ("flash", ("flash_fwd", "flash_bwd")),
    ("math", ("softmax", "_attention_math")),
)


def attention_refusal(path: str, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> str | None:
    """Return why a path cannot compute on a device; None where it can, as far as can be known without trying."""
    if path == "flash_attn":
        return flash_attn_refusal(device, dtype)
    if device.type != "cuda":
        return f"{path} computes on a GPU and not on {device.type}" if path in ("cudnn", "efficient") else None
    if path in ("cudnn", "flash") and dtype == torch.float32:
        return f"{path} computes in bf16 and fp16, not in fp32; take \"efficient\""
    if path in ("cudnn", "flash") and torch.cuda.get_device_capability(device)[0] < 8:
        return f"{path} needs compute capability 8.0; take \"efficient\""
    if path == "cudnn" and not torch.backends.cudnn.is_available():
        return "this PyTorch has no cuDNN; take \"flash\""
    return None


def prefer_attention_backend(path: str, device: torch.device, dtype: torch.dtype = torch.bfloat16,
                             shape: Shape = SMALL) -> str:
    """Switch PyTorch to one backend, for the whole process, and return its name.

    Whoever trains on a GPU calls this once, before anything is compiled. A compiled region keeps the backend that the
    switches named when it was traced, also where a context around it says otherwise; and in eager mode every `attention` of
    a training step then saves the change of switches and back. Calls without gradients, with a mask or on a cache still
    change the switches for themselves. It does nothing without a GPU or for the package flash-attn.

    Args:
        path: from `KernelPaths`; "auto" takes the fastest that computes this shape, forward and backward, on this device.
        device, dtype, shape: of queries, keys and values.

    Raises:
        ConfigError: the backend that is asked for by name does not compute this.
    """
    if path == "flash_attn" or device.type != "cuda":
        return path
    switches, why = torch.backends.cuda, ""
    for backend in backends_of(device, dtype, path):
        name = next(name for name, known in BACKENDS.items() if known is backend)
        why = _failure(name, device, dtype, shape)
        if not why:
            for switch, known in ((switches.enable_cudnn_sdp, "cudnn"), (switches.enable_flash_sdp, "flash"),
                                  (switches.enable_mem_efficient_sdp, "efficient"), (switches.enable_math_sdp, "math")):
                switch(known == name)
            return name
    raise ConfigError(f"attention: {path!r}; it does not compute {dtype} heads of {shape[3]} channels on {device} ({why}); "
                      "take \"auto\"")


def _failure(path: str, device: torch.device, dtype: torch.dtype, shape: Shape) -> str:
    """Return what PyTorch says where a backend does not compute forward and backward; nothing where it does."""
    query, key, value = _random_inputs(device, dtype, shape)
    try:
        attention(query, key, value, path=path).sum().backward()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


def attention_that_runs(device: torch.device, path: str = "auto", dtype: torch.dtype | None = None,
                        shape: Shape = SMALL) -> str:
    """Run a small attention, forward and backward, under the profiler, and return whose kernels ran.

    Args:
        device: where.
        path: as for `attention`.
        dtype: None: bf16 on a GPU, fp32 elsewhere.
        shape: of queries, keys and values.

    Returns:
        A name of `BACKENDS`, "flash_attn", or "unknown".
    """
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    inputs = _random_inputs(device, dtype, shape)

    def run() -> None:
        out = attention(*inputs, path=path)
        out.backward(torch.ones_like(out))

    run()  # plans are made and libraries loaded at the first call
    return backend_named_by(profiled_kernels(run, device))


def profiled_kernels(function: Callable[[], Any], device: torch.device) -> list[str]:
    """Return the names of what a function ran: kernels on a GPU, operators elsewhere."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as measured:
        function()
        if on_gpu:
            torch.cuda.synchronize(device)
    wanted = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    return [event.name for event in measured.events() if event.device_type == wanted]


def backend_named_by(names: Iterable[str]) -> str:
    """Return the backend that names of kernels or operators give away, or "unknown"."""
    names = [name.lower() for name in names if not name.startswith("triton_")]  # those are called after what they replace
    for backend, parts in _TRACES:
        if any(part in name for name in names for part in parts):
            return backend
    return "unknown"


def _random_inputs(device: torch.device, dtype: torch.dtype, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value as the model has them: stored [1, s, heads, d], requiring gradients."""
    heads, kv_heads, tokens, channels = shape
    query, key, value = (torch.randn(1, tokens, count, channels, device=device, dtype=dtype).requires_grad_()
                         for count in (heads, kv_heads, kv_heads))
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
