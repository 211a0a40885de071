"""Which implementation each operation of the model and the optimizer takes: section "kernels" of the machine profile."""

from __future__ import annotations

from typing import Literal

from megatron_ttl.config.schema import Section


class KernelsConfig(Section):
    """Implementations by operation; "auto" is the fastest that is there, `tools/doctor.py` says which and why."""

    rms_norm: Literal["auto", "cuda", "torch", "apex"] = "auto"
    """RMSNorm, alone and after an addition: our CUDA kernel, PyTorch, or NVIDIA Apex."""
    rotary: Literal["auto", "cuda", "torch"] = "auto"
    """Rotary positions on the packed projection: our CUDA kernel, in place, or PyTorch."""
    swiglu: Literal["auto", "cuda", "torch"] = "auto"
    """SwiGLU on the packed projection: our CUDA kernel or PyTorch."""
    cross_entropy: Literal["auto", "cuda", "torch"] = "auto"
    """The loss: our CUDA kernel, whose gradient replaces the logits, or PyTorch."""
    adamw: Literal["auto", "cuda", "torch", "apex"] = "auto"
    """The optimizer on one GPU: our CUDA kernel over flat buffers, PyTorch, or NVIDIA Apex."""
    attention: Literal["auto", "cudnn", "flash", "efficient", "math", "flash_attn"] = "auto"
    """Attention: a backend of PyTorch by name, or the package flash-attn."""
