"""One optimizer step through DeepSpeed, whatever the layout."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_ttl.checkpoint.state import restore_weights
from megatron_ttl.config.schema import RunFile
from megatron_ttl.kernels.cross_entropy import IGNORED_LABEL
from megatron_ttl.parallel.build import build_part
from megatron_ttl.parallel.door import deepspeed
from megatron_ttl.parallel.loss import (
    backward_scale,
    exact_nats,
    loss_sum,
    most_probable,
    valid_tokens,
    whole_vocabulary,
)
from megatron_ttl.parallel.mesh import Mesh
from megatron_ttl.parallel.norm import clip_gradients
from megatron_ttl.parallel.pipeline import LossFunction, MicroBatches, evaluate_pipeline
from megatron_ttl.parallel.recompute import Recompute
from megatron_ttl.parallel.shard import tensor_parallel_of
from megatron_ttl.train.optimizer import build_optimizer, parameter_groups

_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did; the tensors stay where they were computed until somebody reads them."""

    loss: Tensor
    """Mean nats per valid token of the global batch, before the update."""
    grad_norm: Tensor | float
    """Global norm of the gradient, before clipping."""
    skipped: bool = False
    """The gradient was not finite on some process, so no weight moved on any; in fp16 the scale was lowered as well."""


class Engine:
    """This process's part of the model, its optimizer and DeepSpeed around them."""

    def __init__(self, run: RunFile, deepspeed_settings: dict[str, Any], mesh: Mesh,
                 recompute: Recompute = "none", eos_id: int | None = None) -> None:
        """Build this process's part from the run's seed and hand it to DeepSpeed.

        Args:
            run: the checked run file.
            deepspeed_settings: from `resolve_deepspeed`.
            mesh: from `join`, cut.
            recompute: what blocks forget and compute again.
            eos_id: what ends a document, if attention is to stay within documents.
        """
        self.mesh = mesh
        self.beat: Callable[[], None] = lambda: None  # called before every micro batch: this process moves
        self.accumulation = deepspeed_settings["gradient_accumulation_steps"]
        self._vocab_size = run.model.vocab_size
        self._tensor_parallel = tensor_parallel_of(mesh)
        self._scale = 1.0
        self._grad_norm: Tensor | None = None
        self._stage = deepspeed_settings["zero_optimization"]["stage"]
        self._fp16 = bool(deepspeed_settings.get("fp16", {}).get("enabled"))
        if not self._fp16 and not deepspeed_settings.get("bf16", {}).get("enabled"):
            torch.backends.cuda.matmul.allow_tf32 = False  # fp32 means fp32
        model = build_part(run, mesh, recompute, self._scaled_loss, eos_id)
        initial = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
        self.decay_groups = parameter_groups(model, run.optimizer)
        offload = "offload_optimizer" in deepspeed_settings["zero_optimization"]
        self.optimizer = build_optimizer(self.decay_groups, run.optimizer, mesh.device, offload)
        settings = dict(deepspeed_settings)
        if self._stage == 0:
            # DeepSpeed does not tell the norm at stage 0, and leaves out of it what other stages and ranks hold.
            clipping, settings["gradient_clipping"] = settings["gradient_clipping"], 0.0
            self.optimizer.register_step_pre_hook(lambda *_: self._clip(clipping))
        if mesh.layout.pipeline > 1:
            # Left to itself DeepSpeed sends each tensor rank's part of what it takes for one tensor on all of them;
            # with sequence parallelism they hold different tokens.
            settings["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False}
        with contextlib.redirect_stdout(io.StringIO()):  # memory reports that DeepSpeed prints unasked
            mpu = {} if mesh.layout.pipeline > 1 else {"mpu": mesh.grid}  # a pipeline stage brings its own
            self.deepspeed, *_ = deepspeed.initialize(model=model, optimizer=self.optimizer, config=settings,
                                                      dist_init_required=False, **mpu)
        # DeepSpeed makes its fp32 masters from bf16 copies; give them the bits that were drawn, so that the initial
        # weights are the same in every dtype.
        restore_weights(self.deepspeed, mesh, initial)

    @property
    def device(self) -> torch.device:
        """Where the micro batches must be."""
        return self.mesh.device

    def held_out_nats(self, input_ids: Tensor, labels: Tensor) -> float:
        """Sum the nats of held-out windows, [b, s] both, in fp64 and without gradients.

        The ranks of one data-parallel slice, which must all call with the same windows, return the same.
        """
        def measure(logits: Tensor, labels: Tensor) -> Tensor:
            return exact_nats(logits, labels, self._vocab_size, self._tensor_parallel).sum(-1, keepdim=True)

        return float(self._measured(input_ids, labels, measure, 1).sum())

    def row_scores(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Return the nats of each row, and how many of its labels are not the most probable id: [b, s] twice -> [b, 2].

        As for `held_out_nats`, whose sum theirs is; fp64, on the host.
        """
        def measure(logits: Tensor, labels: Tensor) -> Tensor:
            nats = exact_nats(logits, labels, self._vocab_size, self._tensor_parallel).sum(-1)
            best = most_probable(logits, self._vocab_size, self._tensor_parallel)
            return torch.stack((nats, ((best != labels) & (labels != IGNORED_LABEL)).sum(-1)), -1)

        return self._measured(input_ids, labels, measure, 2)

    def logits_at(self, input_ids: Tensor, places: Tensor) -> Tensor:
        """Return what is predicted after one place of each row: [b, s], [b] -> [b, v] fp64, on the host.

        The ranks of one data-parallel slice, which must all call alike, return the same.
        """
        def measure(logits: Tensor, labels: Tensor) -> Tensor:
            at = (labels != IGNORED_LABEL).int().argmax(-1)
            return whole_vocabulary(logits[torch.arange(len(at), device=at.device), at].double(), self._vocab_size,
                                    self._tensor_parallel)

        labels = torch.full_like(input_ids, IGNORED_LABEL)  # a pipeline's last stage receives labels and nothing else
        labels[torch.arange(len(places)), places] = 0
        return self._measured(input_ids, labels, measure, self._vocab_size)

    def _measured(self, input_ids: Tensor, labels: Tensor, measure: LossFunction, width: int) -> Tensor:
        """Compute numbers of each row from its logits, without gradients: [b, s], [b, s] -> [b, width]."""
        self.beat()
        if self.mesh.layout.pipeline > 1:
            rows = evaluate_pipeline(self.deepspeed, input_ids, labels, measure)
        else:
            self.deepspeed.eval()
            with torch.no_grad():
                logits = self.deepspeed(input_ids.to(self.device, non_blocking=True))
                rows = measure(logits, labels.to(self.device, non_blocking=True))
            self.deepspeed.train()
        return self.mesh.from_last_stage(rows, (len(input_ids), width))

    def train_step(self, micro_batches: MicroBatches, lr: float, global_tokens: int | None = None) -> StepResult:
        """Do one optimizer step.

        Args:
            micro_batches: this process's `accumulation` pairs of input ids and labels, [b, s] each.
            lr: learning rate of this step.
            global_tokens: valid labels over all processes where that is known without asking them.
        """
        assert len(micro_batches) == self.accumulation
        if global_tokens is None:
            # A step without a single label has no gradient; it is no fault.
            global_tokens = int(self.mesh.sum_data_parallel(valid_tokens(micro_batches))[0]) or 1
        self._scale = backward_scale(global_tokens, self.accumulation, self.mesh.data_parallel_size)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.mesh.layout.pipeline > 1:
            # Its mean over micro batches and data parallel undoes the scale: it is the global mean.
            loss = self.deepspeed.train_batch(self._moving(micro_batches))
        else:
            loss = self._accumulate(micro_batches)
        if self._stage == 0:
            assert self._grad_norm is not None
            return StepResult(loss, self._grad_norm, not bool(self._grad_norm.isfinite()))
        # DeepSpeed's own stages agree on it over all processes, and leave weights, moments and masters as they are.
        skipped = bool(self.deepspeed.optimizer.overflow)
        return StepResult(loss, math.inf if skipped else self.deepspeed.get_global_grad_norm(), skipped)

    def loss_scale_row(self, skipped: int) -> dict[str, float]:
        """Return what fp16 adds to a row of metrics; nothing in other precisions."""
        return {"loss_scale": float(self.deepspeed.optimizer.cur_scale), "skipped_steps": skipped} if self._fp16 else {}

    @property
    def scales_loss(self) -> bool:
        """Whether skipped steps are how the loss scale is found, and no fault."""
        return self._fp16

    @property
    def loss_scaler(self) -> dict[str, float] | None:
        """State of fp16's loss scale, which a resumed run goes on with; None in other precisions."""
        if not self._fp16:
            return None
        return {key: getattr(self.deepspeed.optimizer.loss_scaler, key) for key in _SCALER_STATE}

    @loss_scaler.setter
    def loss_scaler(self, state: dict[str, float] | None) -> None:
        for key, value in (state or {}).items() if self._fp16 else ():
            setattr(self.deepspeed.optimizer.loss_scaler, key, value)

    def _accumulate(self, micro_batches: MicroBatches) -> Tensor:
        total = torch.zeros((), device=self.device)
        for input_ids, labels in self._moving(micro_batches):
            logits = self.deepspeed(input_ids.to(self.device, non_blocking=True))
            loss = self._scaled_loss(logits, labels.to(self.device, non_blocking=True))
            self.deepspeed.backward(loss)
            self.deepspeed.step()
            total += loss.detach()
        return self.mesh.sum_tensor_data_parallel(total) / (self.accumulation * self.mesh.data_parallel_size)

    def _moving(self, micro_batches: MicroBatches) -> Iterator[tuple[Tensor, Tensor]]:
        for micro_batch in micro_batches:
            self.beat()
            yield micro_batch

    def _scaled_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return loss_sum(logits, labels, self._vocab_size, self._tensor_parallel) * self._scale

    def _clip(self, clipping: float) -> None:
        self._grad_norm = clip_gradients(self.deepspeed.module.parameters(), clipping, self.mesh)
        if not self._grad_norm.isfinite():
            for parameter in self.deepspeed.module.parameters():
                parameter.grad = None  # which is how torch's optimizers leave a parameter and its moments alone

    def close(self) -> None:
        """Take DeepSpeed's hooks off the model and free its buffers."""
        self.deepspeed.destroy()
