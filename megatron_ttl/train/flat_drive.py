"""One optimizer step on one process, over flat buffers: nothing in it waits for the device.

Learning rate, loss scale, number of the update, norm, clip factor and the decision to skip a step stay on the device. The
host launches, and reads what came of a step when the next one is on its way (`RunAhead`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from megatron_ttl.config.schema import OptimizerConfig
from megatron_ttl.kernels.adamw import accumulate_, accumulate_and_square_, adamw_
from megatron_ttl.parallel.pipeline import LossFunction
from megatron_ttl.train.cuda_graphs import GraphedCalls, GraphRecorder
from megatron_ttl.train.engine_options import EngineOptions
from megatron_ttl.train.flat_buffers import FlatBuffers
from megatron_ttl.train.input_buffers import InputBuffers, Pair
from megatron_ttl.train.step_result import DelayedFlag, StepResult


class FlatDrive:
    """A module whose state lies in flat buffers, and the step that trains it."""

    def __init__(self, module: nn.Module, decay_groups: list[dict], optimizer: OptimizerConfig, clipping: float,
                 dtype: torch.dtype, device: torch.device, loss: LossFunction, options: EngineOptions) -> None:
        """Move the module into flat buffers.

        Args:
            module: freshly drawn, in fp32 on the host.
            decay_groups: from `parameter_groups`.
            optimizer: AdamW's settings.
            clipping: largest norm of the gradient; 0: any.
            dtype: of weights and activations.
            device: where the training runs.
            loss: (logits, labels) -> scalar, with `scale` in it.
            options: kernels and recording.
        """
        self.module = module
        self.state = FlatBuffers(module, decay_groups, dtype, device)
        self.scale = torch.ones((), device=device)
        self._optimizer, self._clipping, self._path = optimizer, clipping, options.paths.adamw
        self._loss_of = loss
        self._inputs = InputBuffers(device)
        self._lr, self._total, self._norm, self._squares = (torch.zeros((), device=device) for _ in range(4))
        self._skipped = torch.zeros((), dtype=torch.bool, device=device)
        recorder = None if options.graphs == "off" else GraphRecorder(module)
        graphs = GraphedCalls(recorder, options.graphs == "require", _warn)
        self._micro_steps = {(first, last): graphs.wrap(partial(self._micro_step, first, last))
                             for first in (True, False) for last in (True, False)}
        self._update = graphs.wrap(self._move_weights)

    def logits(self, input_ids: Tensor) -> Tensor:
        """Compute logits for a measurement: [b, s] -> [b, s, v]."""
        self.module.eval()
        logits = self.module(input_ids)
        self.module.train()
        return logits

    def step(self, micro_batches: Sequence[Pair], lr: float, global_tokens: int, beat: Callable[[], None]) -> StepResult:
        """Launch one optimizer step.

        Args:
            micro_batches: input ids and labels on the host, [b, s] each.
            lr: learning rate.
            global_tokens: labels that count in this step.
            beat: called before every micro batch.
        """
        self._lr.fill_(lr)  # a number in the launch itself: nothing is copied, nothing waits
        self.scale.fill_(1 / global_tokens)
        beat()
        for number, _ in enumerate(self._inputs.fed(micro_batches), 1):
            if number > 1:
                beat()
            self._micro_steps[number == 1, number == len(micro_batches)]()
        self._update()
        # The next step writes into the same tensors.
        return StepResult(self._total.clone(), self._norm.clone(), DelayedFlag(self._skipped))

    def close(self) -> None:
        """Give nothing back: the buffers go with this object."""

    def _micro_step(self, first: bool, last: bool) -> None:
        """Forward, loss, backward, and the gradients into the flat sum; the last one brings the norm along."""
        try:
            loss = self._loss_of(self.module(self._inputs.input_ids), self._inputs.labels)
            loss.backward()
            gradients = [parameter.grad for parameter in self.state.parameters]
            assert all(gradient is not None for gradient in gradients), "every weight takes part in every step"
            where = (self.state.gradient, gradients, self.state.offsets, first, self._path)
            with torch.no_grad():
                self._squares.copy_(accumulate_and_square_(*where)) if last else accumulate_(*where)
                self._total.copy_(loss) if first else self._total.add_(loss)
        finally:
            for parameter in self.state.parameters:
                parameter.grad = None

    @torch.no_grad()
    def _move_weights(self) -> None:
        """Clip, and update weights and moments where the gradient is finite."""
        state, chosen = self.state, self._optimizer
        update = state.updates + 1
        for part, weight_decay in state.groups:
            low = state.low_precision
            adamw_(state.master[part], state.gradient[part], state.exp_avg[part], state.exp_avg_sq[part],
                   None if low is None else low[part], lr=self._lr, step=update, squared_norm=self._squares,
                   clipping=self._clipping, betas=chosen.betas, eps=chosen.eps, weight_decay=weight_decay, path=self._path)
        finite = self._squares.isfinite()
        state.updates.add_(finite)
        self._skipped.copy_(~finite)
        self._norm.copy_(self._squares.sqrt())


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr, flush=True)
