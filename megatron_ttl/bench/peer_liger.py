"""The peer Liger: its kernels in Hugging Face's Llama, and each by itself. The only door to liger_kernel."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from torch import Tensor, nn

from megatron_ttl.bench.contender import not_installed
from megatron_ttl.bench.peer_hf import hf_llama_module, hf_loop
from megatron_ttl.bench.training_loop import TrainingLoop
from megatron_ttl.bench.workload import Workload

_REPLACED = ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP")
"""What `apply_liger_kernel_to_llama` puts into transformers' module, for every model built later."""


def liger_loop(workload: Workload) -> TrainingLoop:
    """Build Hugging Face's Llama with Liger's kernels, its fused head and loss among them; trained as TTL's scripts did."""
    return hf_loop(workload, change=_apply, note="HF with Liger's kernels")


def _apply(model: nn.Module) -> Callable[[], None]:
    """Put Liger's kernels into one model, and return what leaves other models as they were."""
    try:
        from liger_kernel.transformers import apply_liger_kernel_to_llama
    except ImportError as error:
        raise not_installed("liger-kernel", error) from None
    module = hf_llama_module()
    before = {name: getattr(module, name) for name in _REPLACED}
    apply_liger_kernel_to_llama(model=model)

    def undo() -> None:
        for name, value in before.items():
            setattr(module, name, value)

    return undo


def liger_functions() -> ModuleType:
    """Return Liger's functions by name (`liger_rms_norm` ...).

    Raises:
        NotInstalled: it is not there.
    """
    try:
        from liger_kernel.transformers import functional
    except ImportError as error:
        raise not_installed("liger-kernel", error) from None
    return functional


def liger_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of the last dimension."""
    return liger_functions().liger_rms_norm(x, weight, eps, in_place=False)


def liger_add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Sum and its RMSNorm, in our order."""
    normed, total = liger_functions().liger_fused_add_rms_norm(delta, x, weight, eps, in_place=False)
    return total, normed


def liger_rotary_heads(packed: Tensor, cos: Tensor, sin: Tensor, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of a packed projection, turned as Hugging Face's Llama does it: [b, s, n + 2k, d].

    Args:
        packed, kv_heads: as for `rotary_heads`.
        cos, sin: [1, s, d], twice the half that our tables have.
    """
    heads = packed.shape[2] - 2 * kv_heads
    query, key, value = (part.transpose(1, 2) for part in packed.split((heads, kv_heads, kv_heads), dim=2))
    return *liger_functions().liger_rope(query, key, cos, sin), value


def liger_swiglu(gate_up: Tensor) -> Tensor:
    """SwiGLU of a packed projection; Liger takes the two halves apart."""
    gate, up = gate_up.chunk(2, dim=-1)
    return liger_functions().liger_swiglu(gate, up)


def liger_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the losses; Liger puts the gradient into the place of the logits."""
    return liger_functions().liger_cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum")
