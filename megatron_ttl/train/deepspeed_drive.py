"""One optimizer step through DeepSpeed, whatever the layout."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ttl.checkpoint.deepspeed_state import DeepSpeedState
from megatron_ttl.checkpoint.state import WEIGHTS
from megatron_ttl.parallel.door import deepspeed
from megatron_ttl.parallel.loss import backward_scale
from megatron_ttl.parallel.mesh import Mesh
from megatron_ttl.parallel.norm import clip_gradients
from megatron_ttl.parallel.pipeline import LossFunction, MicroBatches, evaluate_pipeline
from megatron_ttl.train.step_result import StepResult

_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class DeepSpeedDrive:
    """DeepSpeed's engine around this process's part of the model and torch's optimizer."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, deepspeed_settings: dict[str, Any], mesh: Mesh,
                 loss: LossFunction) -> None:
        """Hand model and optimizer to DeepSpeed.

        Args:
            module: freshly drawn, in fp32 on the host.
            optimizer: over its parameters.
            deepspeed_settings: from `resolve_deepspeed`.
            mesh: from `join`, cut.
            loss: (logits, labels) -> scalar, with `scale` in it; a pipeline's last stage has its own.
        """
        self.scale = 1.0
        self._optimizer, self._mesh, self._loss_of = optimizer, mesh, loss
        self._accumulation = deepspeed_settings["gradient_accumulation_steps"]
        self._stage = deepspeed_settings["zero_optimization"]["stage"]
        self._fp16 = bool(deepspeed_settings.get("fp16", {}).get("enabled"))
        self._grad_norm: Tensor | None = None
        initial = {name: tensor.detach().clone() for name, tensor in module.named_parameters()}
        settings = dict(deepspeed_settings)
        if self._stage == 0:
            # DeepSpeed does not tell the norm at stage 0, and leaves out of it what other stages and ranks hold.
            clipping, settings["gradient_clipping"] = settings["gradient_clipping"], 0.0
            optimizer.register_step_pre_hook(lambda *_: self._clip(clipping))
        if mesh.layout.pipeline > 1:
            # Left to itself DeepSpeed sends each tensor rank's part of what it takes for one tensor on all of them;
            # with sequence parallelism they hold different tokens.
            settings["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False}
        with contextlib.redirect_stdout(io.StringIO()):  # memory reports that DeepSpeed prints unasked
            mpu = {} if mesh.layout.pipeline > 1 else {"mpu": mesh.grid}  # a pipeline stage brings its own
            self._engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings,
                                                    dist_init_required=False, **mpu)
        self.module = self._engine.module
        self.state = DeepSpeedState(self._engine, mesh)
        # DeepSpeed makes its fp32 masters from bf16 copies; give them the bits that were drawn, so that the initial
        # weights are the same in every dtype.
        self.state.write(WEIGHTS, initial.__getitem__)

    def logits(self, input_ids: Tensor) -> Tensor:
        """Compute logits for a measurement, but not with a pipeline: [b, s] -> [b, s, v or v/t]."""
        self._engine.eval()
        logits = self._engine(input_ids)
        self._engine.train()
        return logits

    def pipeline_rows(self, input_ids: Tensor, labels: Tensor, measure: LossFunction) -> Tensor | None:
        """Measure rows with a pipeline; as `evaluate_pipeline`."""
        return evaluate_pipeline(self._engine, input_ids, labels, measure)

    def step(self, micro_batches: MicroBatches, lr: float, global_tokens: int, beat: Callable[[], None]) -> StepResult:
        """Do one optimizer step.

        Args:
            micro_batches: input ids and labels on the host, [b, s] each.
            lr: learning rate.
            global_tokens: labels that count in this step, over all processes.
            beat: called before every micro batch.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        moving, copies = _moving(micro_batches, beat), self._mesh.data_parallel_size
        if self._mesh.layout.pipeline > 1:
            # Its mean over micro batches and data parallel undoes the scale: it is the global mean.
            self.scale = backward_scale(global_tokens, self._accumulation, copies)
            loss = self._engine.train_batch(moving)
        else:
            self.scale = backward_scale(global_tokens, 1, copies)
            loss = self._accumulate(moving) / copies
        if self._stage == 0:
            assert self._grad_norm is not None
            return StepResult(loss, self._grad_norm, not bool(self._grad_norm.isfinite()))
        # DeepSpeed's own stages agree on it over all processes, and leave weights, moments and masters as they are.
        skipped = bool(self._engine.optimizer.overflow)
        return StepResult(loss, math.inf if skipped else self._engine.get_global_grad_norm(), skipped)

    @property
    def loss_scale(self) -> float:
        """The factor that fp16 computes gradients with."""
        return float(self._engine.optimizer.cur_scale)

    @property
    def loss_scaler(self) -> dict[str, float] | None:
        """State of fp16's loss scale, which a resumed run goes on with; None in other precisions."""
        if not self._fp16:
            return None
        return {key: getattr(self._engine.optimizer.loss_scaler, key) for key in _SCALER_STATE}

    @loss_scaler.setter
    def loss_scaler(self, state: dict[str, float] | None) -> None:
        for key, value in (state or {}).items() if self._fp16 else ():
            setattr(self._engine.optimizer.loss_scaler, key, value)

    def close(self) -> None:
        """Take DeepSpeed's hooks off the model and free its buffers."""
        self._engine.destroy()

    def _accumulate(self, micro_batches: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
        device = self._mesh.device
        total = torch.zeros((), device=device)
        for input_ids, labels in micro_batches:
            logits = self._engine(input_ids.to(device, non_blocking=True))
            loss = self._loss_of(logits, labels.to(device, non_blocking=True))
            # The scale is that of a sum over micro batches: DeepSpeed need not divide by their number.
            self._engine.backward(loss, scale_wrt_gas=False)
            self._engine.step()
            total += loss.detach()
        return self._mesh.sum_tensor_data_parallel(total)

    def _clip(self, clipping: float) -> None:
        self._grad_norm = clip_gradients(self.module.parameters(), clipping, self._mesh)
        if not self._grad_norm.isfinite():
            for parameter in self.module.parameters():
                parameter.grad = None  # which is how torch's optimizers leave a parameter and its moments alone


def _moving(micro_batches: MicroBatches, beat: Callable[[], None]) -> Iterator[tuple[Tensor, Tensor]]:
    for micro_batch in micro_batches:
        beat()
        yield micro_batch
