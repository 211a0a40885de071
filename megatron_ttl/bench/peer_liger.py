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


def liger_rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Turn queries and keys, [b, heads, s, d] over [b, s, heads, d]; cos and sin are [1, s, d], each angle twice."""
    return liger_functions().liger_rope(query, key, cos, sin)


def liger_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SwiGLU of two projections."""
    return liger_functions().liger_swiglu(gate, up)


def liger_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the losses; Liger puts the gradient into the place of the logits."""
    return liger_functions().liger_cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum")
