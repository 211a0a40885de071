"""One optimizer step through DeepSpeed."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_ttl.checkpoint.state import restore_weights
from megatron_ttl.config.schema import RunFile
from megatron_ttl.model.llama import build_model
from megatron_ttl.parallel.door import deepspeed
from megatron_ttl.parallel.loss import backward_scale, loss_sum, valid_tokens
from megatron_ttl.parallel.mesh import Mesh
from megatron_ttl.train.optimizer import build_optimizer, parameter_groups

MicroBatches = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did; the tensors stay where they were computed until somebody reads them."""

    loss: Tensor
    """Mean nats per valid token of the global batch, before the update."""
    grad_norm: Tensor | float
    """Global norm of the gradient, before clipping."""


class Engine:
    """The model, its optimizer and DeepSpeed around them."""

    def __init__(self, run: RunFile, deepspeed_settings: dict[str, Any], mesh: Mesh) -> None:
        """Build the model from the run's seed and hand it to DeepSpeed.

        Args:
            run: the checked run file.
            deepspeed_settings: from `resolve_deepspeed`.
            mesh: from `join`.
        """
        self.mesh = mesh
        if not deepspeed_settings.get("bf16", {}).get("enabled"):
            torch.backends.cuda.matmul.allow_tf32 = False  # fp32 means fp32
        model = build_model(run.model, run.run.seed)
        initial = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.decay_groups = parameter_groups(model, run.optimizer)
        self.optimizer = build_optimizer(self.decay_groups, run.optimizer, mesh.device)
        with contextlib.redirect_stdout(io.StringIO()):  # memory reports that DeepSpeed prints unasked
            self.deepspeed, *_ = deepspeed.initialize(model=model, optimizer=self.optimizer,
                                                      config=deepspeed_settings, dist_init_required=False)
        # DeepSpeed makes its fp32 masters from bf16 copies; give them the bits that were drawn, so that the initial
        # weights are the same in every dtype.
        restore_weights(self.deepspeed, initial)
        self.accumulation = deepspeed_settings["gradient_accumulation_steps"]

    @property
    def device(self) -> torch.device:
        """Where the micro batches must be."""
        return self.mesh.device

    def logits(self, input_ids: Tensor) -> Tensor:
        """Evaluate the model: [b, s] -> [b, s, v], without gradients."""
        self.deepspeed.eval()
        with torch.no_grad():
            logits = self.deepspeed(input_ids.to(self.device, non_blocking=True))
        self.deepspeed.train()
        return logits

    def train_step(self, micro_batches: MicroBatches, lr: float, global_tokens: int | None = None) -> StepResult:
        """Do one optimizer step.

        Args:
            micro_batches: this process's `accumulation` pairs of input ids and labels, [b, s] each.
            lr: learning rate of this step.
            global_tokens: valid labels over all processes where that is known without asking them.
        """
        assert len(micro_batches) == self.accumulation
        if global_tokens is None:
            global_tokens = int(self.mesh.sum_data_parallel(valid_tokens(micro_batches))[0])
        scale = backward_scale(global_tokens, self.accumulation, self.mesh.data_parallel_size)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        total = torch.zeros((), device=self.device)
        for input_ids, labels in micro_batches:
            logits = self.deepspeed(input_ids.to(self.device, non_blocking=True))
            nats = loss_sum(logits, labels.to(self.device, non_blocking=True))
            self.deepspeed.backward(nats * scale)
            grad_norm = self._unwrapped_norm()
            self.deepspeed.step()
            total += nats.detach()
        if grad_norm is None:
            grad_norm = self.deepspeed.get_global_grad_norm()
        return StepResult(self.mesh.sum_tensor_data_parallel(total) / global_tokens, grad_norm)

    def _unwrapped_norm(self) -> Tensor | None:
        """Measure the gradient at stage 0, where DeepSpeed clips but does not tell; elsewhere it tells."""
        if self.deepspeed.zero_optimization_stage() > 0 or not self.deepspeed.is_gradient_accumulation_boundary():
            return None
        return torch.nn.utils.get_total_norm([p.grad for p in self.deepspeed.module.parameters()])

    def close(self) -> None:
        """Take DeepSpeed's hooks off the model and free its buffers."""
        self.deepspeed.destroy()
