"""Cross-entropy as a sum: dividing by the number of tokens is the business of whoever knows the whole batch.

The kernels make the gradient together with the loss, (softmax(logits) - onehot) * scale, and write it over the logits:
4 bytes of traffic per bf16 logit for forward and backward, and no memory besides. The price is a contract:

* After the loss of logits that require a gradient, the logits are gone. Nobody may read them; whoever kept them for a
  backward pass of his own gets PyTorch's error for tensors that were modified in place.
* There is one backward pass, and no gradient of the gradient; a second one is an error too.
* The scale belongs into the call. A gradient other than 1 that comes into the loss costs one more pass over the logits.
* fp16 has no room for a scale of one over the number of tokens: there the scale is multiplied in on the way back.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import increment_version

from megatron_ttl.kernels import build

IGNORED_LABEL = -100


def cross_entropy_reference(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum logsumexp(logits) - logits[label] over the labels that count, in fp32, written out."""
    wide, labels = logits.float().flatten(0, -2), labels.flatten()
    counts = labels != IGNORED_LABEL
    picked = wide.gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    return torch.where(counts, wide.logsumexp(-1) - picked, 0.0).sum()


def cross_entropy(logits: Tensor, labels: Tensor, scale: float | Tensor = 1.0, path: str = "torch") -> Tensor:
    """Sum the losses of a micro batch.

    Args:
        logits: [b, s, v], fp32, bf16 or fp16; the softmax is computed in fp32. On the path "cuda" they must be contiguous,
            and the gradient takes their place if they require one.
        labels: [b, s] int64, already shifted; -100 is ignored. On the path "cuda" any other label outside of the
            vocabulary makes loss and gradient NaN.
        scale: a factor on the sum; a tensor is fp32 with one element, on the device of the logits.
        path: from `KernelPaths`.

    Returns:
        fp32 scalar, nats times the scale.

    Raises:
        TypeError: the path "cuda" does not take such tensors.
    """
    if path == "cuda":
        return _cross_entropy(logits, labels, scale)
    total = F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum")
    return total if isinstance(scale, float) and scale == 1.0 else total * scale


def partial_cross_entropy(logits: Tensor, labels: Tensor, first: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Say what a part of the vocabulary knows of each token, in one read; for the path "cuda".

    Args:
        logits: [..., v], the columns `first` to `first + columns` of all, and then filler.
        labels: [...] int64, as for `cross_entropy`.
        first: id of the first column.
        columns: how many there are without the filler; may be 0.

    Returns:
        fp32 [tokens] each: the largest logit (minus infinity without columns), the sum of exp(logit - largest), and the
        label's logit (0 if another part has it); 0, 1 and 0 where the label is ignored.
    """
    labels = _checked(logits, labels)
    largest, total, picked = torch.empty(3, labels.numel(), dtype=torch.float32, device=logits.device)
    build.require_kernels(logits.device).call(
        "cross_entropy_partial", logits, labels, largest, total, picked, labels.numel(), first, columns, logits.shape[-1],
        build.DTYPES[logits.dtype], device=logits.device)
    return largest, total, picked


def finish_cross_entropy_(logits: Tensor, labels: Tensor, first: int, columns: int, largest: Tensor, total: Tensor,
                          scale: float | Tensor = 1.0) -> None:
    """Put the gradient in the place of a part of the logits; `with_gradient_in_place` hands it out.

    Args:
        logits, labels, first, columns: as for `partial_cross_entropy`; the filler's gradient is 0.
        largest, total: fp32 [tokens], of all parts together.
        scale: as for `cross_entropy`.
    """
    labels = _checked(logits, labels)
    build.require_kernels(logits.device).call(
        "cross_entropy_finish", logits, labels, largest.contiguous(), total.contiguous(), *_factor(scale, logits),
        labels.numel(), first, columns, logits.shape[-1], build.DTYPES[logits.dtype], device=logits.device)


def with_gradient_in_place(logits: Tensor, loss: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """Return a loss whose backward pass hands out what now stands in the place of the logits.

    Args:
        logits: overwritten by the gradient.
        loss: fp32 scalar.
        scale: as for `cross_entropy`.
    """
    return _GradientInPlace.apply(logits, loss, scale)  # type: ignore[no-any-return,no-untyped-call]


def _cross_entropy(logits: Tensor, labels: Tensor, scale: float | Tensor) -> Tensor:
    wanted = torch.is_grad_enabled() and logits.requires_grad
    if torch.compiler.is_compiling():
        tensor, number = (scale, 1.0) if isinstance(scale, Tensor) else (None, scale)
        return _operator(logits, labels, tensor, number, wanted)[0]  # type: ignore[no-any-return]
    loss = _forward(logits, labels, scale, logits if wanted else None)
    return with_gradient_in_place(logits, loss, scale) if wanted else loss


def _forward(logits: Tensor, labels: Tensor, scale: float | Tensor, gradient: Tensor | None) -> Tensor:
    """Return the loss, times the scale; write the gradient if there is a place for it."""
    labels = _checked(logits, labels)
    losses = torch.empty(labels.numel(), dtype=torch.float32, device=logits.device)
    loss = torch.empty((), dtype=torch.float32, device=logits.device)
    build.require_kernels(logits.device).call(
        "cross_entropy", logits, gradient, labels, losses, loss, *_factor(scale, logits), labels.numel(), logits.shape[-1],
        build.DTYPES[logits.dtype], device=logits.device)
    return loss


def _factor(scale: float | Tensor, logits: Tensor) -> tuple[Tensor | None, float]:
    """A scale as the kernels take it."""
    if not isinstance(scale, Tensor):
        return None, float(scale)
    if scale.dtype != torch.float32 or scale.numel() != 1 or scale.device != logits.device:
        raise TypeError(f"cross_entropy: the scale is {scale.dtype} {tuple(scale.shape)} on {scale.device}; it must be a "
                        f"number or one fp32 element on {logits.device}")
    return scale, 1.0


def _checked(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the labels in one piece of memory."""
    if logits.dtype not in build.DTYPES or not logits.is_contiguous():
        raise TypeError(f"cross_entropy: logits {logits.dtype} {tuple(logits.shape)} with strides {logits.stride()}; they "
                        "must be fp32, bf16 or fp16 and contiguous")
    if labels.dtype != torch.int64 or labels.numel() != logits.shape[:-1].numel() or labels.device != logits.device:
        raise TypeError(f"cross_entropy: labels {labels.dtype} {tuple(labels.shape)} on {labels.device} for logits "
                        f"{tuple(logits.shape)} on {logits.device}; there must be one int64 label per row, on one device")
    return labels.contiguous()


class _GradientInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, loss: Tensor, scale: float | Tensor) -> Tensor:
        increment_version(logits)  # the kernel wrote behind autograd's back
        # Not the logits themselves, which would keep alive what made them: the memory, with their count of versions.
        ctx.save_for_backward(logits.detach())
        ctx.scale = scale
        return loss

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor, None, None]:
        if torch.is_grad_enabled():  # create_graph=True; `once_differentiable` would take the gradient for a constant
            raise RuntimeError("cross_entropy: the path \"cuda\" has no gradient of the gradient; use the path \"torch\"")
        (gradient,) = ctx.saved_tensors
        build.require_kernels(gradient.device).call(
            "cross_entropy_backward", gradient, incoming, *_factor(ctx.scale, gradient), gradient.numel(),
            build.DTYPES[gradient.dtype], device=gradient.device)
        increment_version(gradient)  # a second backward pass would hand it out again, scaled twice
        return gradient, None, None


# The same for torch.compile, which sees an operator with shapes and a backward pass. It may not write over what it is given:
# the gradient has memory of its own there.
@torch.library.custom_op("megatron_ttl::cross_entropy", mutates_args=(), schema=(
    "(Tensor logits, Tensor labels, Tensor? scale, float factor, bool wanted) -> (Tensor, Tensor)"))
def _operator(logits: Tensor, labels: Tensor, scale: Tensor | None, factor: float, wanted: bool) -> tuple[Tensor, Tensor]:
    gradient = torch.empty_like(logits) if wanted else logits.new_empty(0)
    if wanted and (logits.data_ptr() - gradient.data_ptr()) % 16:
        logits = logits.clone()  # rows of both must be aligned alike
    return _forward(logits, labels, factor if scale is None else scale, gradient if wanted else None), gradient


@_operator.register_fake
def _(logits: Tensor, labels: Tensor, scale: Tensor | None, factor: float, wanted: bool) -> tuple[Tensor, Tensor]:
    return logits.new_empty((), dtype=torch.float32), torch.empty_like(logits) if wanted else logits.new_empty(0)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, float, bool], output: tuple[Tensor, Tensor]) -> None:
    _, _, scale, factor, _ = inputs
    ctx.save_for_backward(output[1], scale)
    ctx.factor = factor


def _differentiate(ctx: Any, incoming: Tensor, _: Tensor | None) -> tuple[Tensor, None, None, None, None]:
    gradient, scale = ctx.saved_tensors
    if gradient.dtype == torch.float16:
        incoming = incoming * (ctx.factor if scale is None else scale)
    return (gradient.float() * incoming).to(gradient.dtype), None, None, None, None


_operator.register_autograd(_differentiate, setup_context=_keep)
