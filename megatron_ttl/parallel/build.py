"""The part of the model that one process computes: as a plain sequence, or as a stage of DeepSpeed's pipeline."""

from __future__ import annotations

import contextlib
import io

from torch import nn

from megatron_ttl.config.schema import RunFile
from megatron_ttl.model.llama import Llama, LlamaWithinDocuments, layer_classes
from megatron_ttl.parallel.mesh import Mesh
from megatron_ttl.parallel.pipeline import LossFunction, PipelineStage
from megatron_ttl.parallel.recompute import Recompute, recompute_in
from megatron_ttl.parallel.shard import build_layer


def build_part(run: RunFile, mesh: Mesh, recompute: Recompute, loss: LossFunction,
               eos_id: int | None = None) -> nn.Module:
    """Build what this process owns, from the run's seed, on the host.

    Args:
        run: the model, the seed, and the sequence length by which stages are balanced.
        mesh: where this process stands.
        recompute: what blocks forget.
        loss: (logits, labels) -> scalar; the pipeline's last stage calls it, elsewhere the caller does.
        eos_id: what ends a document, if documents that share a sample are not to see each other; not with a pipeline.

    Returns:
        A module whose parameters have the same names under every layout: `<layer>.<weight>`.
    """
    def layer(index: int) -> nn.Module:
        return recompute_in(build_layer(run.model, index, run.run.seed, mesh), recompute)

    if mesh.layout.pipeline == 1:
        layers = [layer(index) for index in range(len(layer_classes(run.model)))]
        return Llama(*layers) if eos_id is None else LlamaWithinDocuments(*layers, eos_id=eos_id)
    assert eos_id is None, "stages behind the first have no ids"
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its partition
        return PipelineStage(run.model, run.train.sequence_length, mesh, layer, loss)
