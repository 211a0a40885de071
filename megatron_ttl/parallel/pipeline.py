"""Pipeline parallelism: consecutive layers on consecutive stages, micro batches flowing through them (1F1B).

DeepSpeed's engine runs the schedule; this file says which stage has which layers and what goes in and comes out.

Source: Narayanan et al. 2019 (PipeDream, 1F1B); deepspeed/runtime/pipe.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ttl.config.schema import ModelConfig
from megatron_ttl.kernels.cross_entropy import IGNORED_LABEL
from megatron_ttl.model.llama import layer_classes
from megatron_ttl.parallel.door import LayerSpec, PipelineModule
from megatron_ttl.parallel.mesh import Mesh
from megatron_ttl.parallel.plan import stage_bounds

LossFunction = Callable[[Tensor, Tensor], Tensor]
MicroBatches = list[tuple[Tensor, Tensor]]


class _DeferredLayer(LayerSpec):
    """A layer that is built on the stage that owns it, and nowhere else."""

    def __init__(self, kind: type[nn.Module], index: int, build: Callable[[int], nn.Module]) -> None:
        super().__init__(kind)
        self._index = index
        self._build = build

    def build(self, log: bool = False) -> nn.Module:
        """Build the layer."""
        return self._build(self._index)


class PipelineStage(PipelineModule):
    """This process's layers, named as they are named without a pipeline."""

    def __init__(self, config: ModelConfig, sequence_length: int, mesh: Mesh, build: Callable[[int], nn.Module],
                 loss: LossFunction) -> None:
        """Build the layers of this stage; every process must call.

        Args:
            config: the whole model.
            sequence_length: for the operations of attention, by which stages are balanced.
            mesh: where this process stands.
            build: index -> layer.
            loss: (logits, labels) -> scalar, on the last stage.
        """
        self._bounds = stage_bounds(config, sequence_length, mesh.layout.pipeline)
        layers = [_DeferredLayer(kind, index, build) for index, kind in enumerate(layer_classes(config))]
        super().__init__(layers=layers, topology=mesh.grid.topology(), loss_fn=loss)

    def _partition_layers(self, method: str = "uniform") -> None:
        """Take the plan's stages; DeepSpeed knows layers and parameters as measures, but no operations."""
        self.parts = [bound.start for bound in self._bounds] + [self._bounds[-1].stop]
        mine = self._bounds[self._topo.get_coord(self.global_rank).pipe]
        self._set_bounds(start=mine.start, stop=mine.stop)


def evaluate_pipeline(engine: Any, input_ids: Tensor, labels: Tensor, measure: LossFunction) -> Tensor | None:
    """Send windows forward through the stages, a micro batch after the other; every process must call.

    Args:
        engine: DeepSpeed's pipeline engine.
        input_ids, labels: [b, s]; b need be no multiple of anything, and s need not be the training's.
        measure: (logits, labels) of a micro batch -> a tensor with a row for each of its rows.

    Returns:
        The rows of all windows, [b, ...], on the last stage; None on the others.
    """
    count = len(input_ids)
    rows = min(len(input_ids), engine.micro_batch_size)
    missing = -len(input_ids) % rows  # all micro batches must have one shape; rows without labels count nothing
    input_ids = F.pad(input_ids, (0, 0, 0, missing))
    labels = F.pad(labels, (0, 0, 0, missing), value=IGNORED_LABEL)
    micro_batches = list(zip(input_ids.split(rows), labels.split(rows), strict=True))
    stage: PipelineStage = engine.module
    training_loss, stage.loss_fn = stage.loss_fn, measure
    engine.total_loss = None  # it adds up, and the loss of the last step has another shape
    # Buffers between stages have the shape of the last micro batch, which may be another one.
    engine.reset_activation_shape()
    losses = engine.eval_batch(iter(micro_batches), reduce_output=None, bcast_loss=False,
                               num_micro_batches=len(micro_batches))
    engine.reset_activation_shape()
    stage.loss_fn, engine.total_loss = training_loss, None
    stage.train()
    return torch.cat(losses)[:count] if engine.is_last_stage() else None
