"""A training step in plain PyTorch around any model: what the engine is compared with, and how peers are trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from megatron_ttl.bench.workload import Workload
from megatron_ttl.config.schema import OptimizerConfig
from megatron_ttl.kernels.cross_entropy import IGNORED_LABEL
from megatron_ttl.parallel.pipeline import MicroBatches

MeanLoss = Callable[[Tensor, Tensor], Tensor]
"""(input ids, labels) of a micro batch, [b, s] each -> its mean loss, with a graph."""


class TrainingLoop:
    """Forward, loss, backward, clipping and AdamW, micro batch after micro batch, with nothing around it."""

    def __init__(self, model: nn.Module, mean_loss: MeanLoss, workload: Workload, note: str, *, masters: bool = False,
                 fused: bool = True, autocast: torch.dtype | None = None, undo: Callable[[], None] | None = None) -> None:
        """Take a model that is on its device, in the dtype it computes in.

        Args:
            model: whose parameters are trained.
            mean_loss: calls the model.
            workload: the optimizer's settings.
            note: for the row.
            masters: keep fp32 copies of the weights, which AdamW moves.
            fused: PyTorch's fused AdamW; the one of lists of tensors (`foreach`) otherwise.
            autocast: dtype in which matrix products of fp32 weights are computed.
            undo: called by `close`.
        """
        self.note = note
        self._mean_loss, self._device, self._undo = mean_loss, workload.device, undo
        self._all_labelled = workload.all_labelled
        self._autocast, self._clipping = autocast, workload.run.train.gradient_clipping
        self._weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._moved: Sequence[Tensor] = self._weights
        if masters:
            self._moved = [weight.detach().float().clone() for weight in self._weights]
        self._optimizer = _adamw(self._moved, workload.run.optimizer, fused and self._device.type == "cuda")

    def step(self, micro_batches: MicroBatches) -> Tensor:
        """Take one optimizer step and return its mean loss, still on the device."""
        total = torch.zeros((), device=self._device)
        for (input_ids, labels), share in zip(micro_batches, self._shares(micro_batches), strict=True):
            loss = self._loss(input_ids, labels) * share
            loss.backward()
            total += loss.detach()
            if self._moved is not self._weights:
                self._add_to_masters()
        self._update()
        return total

    def _shares(self, micro_batches: MicroBatches) -> list[float]:
        """Return the share of each micro batch in the labels of the step."""
        if self._all_labelled:
            return [1 / len(micro_batches)] * len(micro_batches)
        counts = [int((labels != IGNORED_LABEL).sum()) for _, labels in micro_batches]  # they are on the host still
        return [count / max(1, sum(counts)) for count in counts]

    @torch.no_grad()
    def evaluate(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss of a micro batch, without gradients."""
        return self._loss(input_ids, labels)

    def _loss(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        input_ids, labels = (t.to(self._device, non_blocking=True) for t in (input_ids, labels))
        with torch.autocast(self._device.type, self._autocast, enabled=self._autocast is not None):
            return self._mean_loss(input_ids, labels)

    def _add_to_masters(self) -> None:
        """Add the gradients of a micro batch up in fp32."""
        for master, weight in zip(self._moved, self._weights, strict=True):
            if master.grad is None:
                master.grad = weight.grad.float()
            else:
                master.grad.add_(weight.grad)
            weight.grad = None

    @torch.no_grad()
    def _update(self) -> None:
        if self._clipping:
            nn.utils.clip_grad_norm_(self._moved, self._clipping, foreach=True)
        self._optimizer.step()
        if self._moved is not self._weights:
            torch._foreach_copy_(self._weights, self._moved)
        for tensor in (*self._weights, *self._moved):
            tensor.grad = None

    def close(self) -> None:
        """Give the memory back."""
        self._weights = self._moved = []
        self._optimizer.param_groups.clear()
        self._optimizer.state.clear()
        self._mean_loss = _closed
        if self._undo:
            self._undo()


def _closed(input_ids: Tensor, labels: Tensor) -> Tensor:
    raise AssertionError("the loop is closed")


def _adamw(weights: Sequence[Tensor], config: OptimizerConfig, fused: bool) -> torch.optim.AdamW:
    groups = [{"params": [w for w in weights if (w.dim() == 1) == norms], "weight_decay": decay}
              for norms, decay in ((False, config.weight_decay), (True, config.weight_decay * config.decay_norms))]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps,
                             **({"fused": True} if fused else {"foreach": True}))
