"""The model in training: one optimizer step, and measurements between two steps, whatever the layout and the engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ttl.checkpoint.state import TrainedState
from megatron_ttl.config.schema import RunFile
from megatron_ttl.kernels.attention_backend import prefer_attention_backend
from megatron_ttl.kernels.cross_entropy import IGNORED_LABEL
from megatron_ttl.model.llama import use_paths
from megatron_ttl.parallel.build import build_part
from megatron_ttl.parallel.compiled import compile_model
from megatron_ttl.parallel.loss import exact_nats, loss_sum, most_probable, valid_tokens, whole_vocabulary
from megatron_ttl.parallel.mesh import Mesh
from megatron_ttl.parallel.pipeline import LossFunction, MicroBatches
from megatron_ttl.parallel.recompute import Recompute
from megatron_ttl.parallel.shard import tensor_parallel_of
from megatron_ttl.train.deepspeed_drive import DeepSpeedDrive
from megatron_ttl.train.engine_options import EngineOptions
from megatron_ttl.train.flat_drive import FlatDrive
from megatron_ttl.train.optimizer import build_optimizer, parameter_groups
from megatron_ttl.train.step_result import StepResult

__all__ = ["Engine", "EngineOptions", "StepResult"]


class Engine:
    """This process's part of the model, its optimizer, and one of two drives: DeepSpeed's engine, or flat buffers."""

    def __init__(self, run: RunFile, deepspeed_settings: dict[str, Any], mesh: Mesh, recompute: Recompute = "none",
                 eos_id: int | None = None, options: EngineOptions = EngineOptions()) -> None:
        """Build this process's part from the run's seed and make it ready to train.

        Args:
            run: the checked run file.
            deepspeed_settings: from `resolve_deepspeed`; the flat drive takes clipping, accumulation and precision from it.
            mesh: from `join`, cut.
            recompute: what blocks forget and compute again.
            eos_id: what ends a document, if attention is to stay within documents.
            options: the drive, and the implementations of operations.
        """
        self.mesh = mesh
        self.beat: Callable[[], None] = lambda: None  # called before every micro batch: this process moves
        self.accumulation = deepspeed_settings["gradient_accumulation_steps"]
        self._vocab_size = run.model.vocab_size
        self._tensor_parallel = tensor_parallel_of(mesh)
        self._fp16 = bool(deepspeed_settings.get("fp16", {}).get("enabled"))
        bf16 = bool(deepspeed_settings.get("bf16", {}).get("enabled"))
        if not self._fp16 and not bf16:
            torch.backends.cuda.matmul.allow_tf32 = False  # fp32 means fp32
        self.options = options
        model = build_part(run, mesh, recompute, self._loss, eos_id)
        use_paths(model, options.paths)
        heads = (run.model.num_attention_heads, run.model.num_key_value_heads, run.train.sequence_length, run.model.head_dim)
        dtype = torch.bfloat16 if bf16 else torch.float16 if self._fp16 else torch.float32
        prefer_attention_backend(options.paths.attention, mesh.device, dtype, heads)
        if options.compile:
            compile_model(model)
        self.decay_groups = parameter_groups(model, run.optimizer)
        self._drive: DeepSpeedDrive | FlatDrive
        if options.kind == "flat":
            assert mesh.world_size == 1 and not self._fp16
            self._drive = FlatDrive(model, self.decay_groups, run.optimizer, deepspeed_settings["gradient_clipping"],
                                    dtype, mesh.device, self._loss, options)
        else:
            offload = "offload_optimizer" in deepspeed_settings["zero_optimization"]
            optimizer = build_optimizer(self.decay_groups, run.optimizer, mesh.device, offload)
            self._drive = DeepSpeedDrive(model, optimizer, deepspeed_settings, mesh, self._loss)

    @property
    def module(self) -> nn.Module:
        """This process's part of the model, as it trains: weights in the training's dtype, maybe partitioned."""
        return self._drive.module

    @property
    def state(self) -> TrainedState:
        """Masters and moments, to be captured and restored."""
        return self._drive.state

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
            assert isinstance(self._drive, DeepSpeedDrive)
            rows = self._drive.pipeline_rows(input_ids, labels, measure)
        else:
            with torch.no_grad():
                logits = self._drive.logits(input_ids.to(self.device, non_blocking=True))
                rows = measure(logits, labels.to(self.device, non_blocking=True))
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
        return self._drive.step(micro_batches, lr, global_tokens, lambda: self.beat())

    def loss_scale_row(self, skipped: int) -> dict[str, float]:
        """Return what fp16 adds to a row of metrics; nothing in other precisions."""
        if not self._fp16:
            return {}
        assert isinstance(self._drive, DeepSpeedDrive)
        return {"loss_scale": self._drive.loss_scale, "skipped_steps": skipped}

    @property
    def scales_loss(self) -> bool:
        """Whether skipped steps are how the loss scale is found, and no fault."""
        return self._fp16

    @property
    def loss_scaler(self) -> dict[str, float] | None:
        """State of fp16's loss scale, which a resumed run goes on with; None in other precisions."""
        return self._drive.loss_scaler if isinstance(self._drive, DeepSpeedDrive) else None

    @loss_scaler.setter
    def loss_scaler(self, state: dict[str, float] | None) -> None:
        if isinstance(self._drive, DeepSpeedDrive):
            self._drive.loss_scaler = state

    def close(self) -> None:
        """Take hooks off the model and free what is freed by hand."""
        self._drive.close()

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self._scaled_loss(logits, labels)  # looked up at each call: a trial may put another in its place

    def _scaled_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return loss_sum(logits, labels, self._vocab_size, self._tensor_parallel, self._drive.scale,
                        self.options.paths.cross_entropy)
