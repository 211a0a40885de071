"""Pipeline parallelism: consecutive layers on consecutive stages, micro batches flowing through them (1F1B).

DeepSpeed's engine runs the schedule; this file says which stage has which layers and what goes in and comes out.

Source: Narayanan et al. 2019 (PipeDream, 1F1B); deepspeed/runtime/pipe.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ttl.config.schema import ModelConfig
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


def evaluate_pipeline(engine: Any, micro_batches: MicroBatches, loss: LossFunction) -> Tensor | None:
    """Send micro batches forward through the stages; every process must call, with micro batches of one shape.

    Returns:
        The losses, added up, on the last stage; None on the others.
    """
    stage: PipelineStage = engine.module
    training_loss, stage.loss_fn = stage.loss_fn, loss
    # Buffers between stages have the shape of the last micro batch; evaluation may use another.
    engine.reset_activation_shape()
    losses = engine.eval_batch(iter(micro_batches), reduce_output=None, bcast_loss=False,
                               num_micro_batches=len(micro_batches))
    engine.reset_activation_shape()
    stage.loss_fn = training_loss
    stage.train()
    return torch.stack(losses).sum() if engine.is_last_stage() else None
