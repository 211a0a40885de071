"""Built whole, then cut: a layer as it is defined becomes the part of it that one rank owns."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ttl.config.schema import ModelConfig
from megatron_ttl.model.llama import initialize_layer, layer_classes
from megatron_ttl.parallel.mesh import Mesh
from megatron_ttl.parallel.plan import TENSOR_PLAN, Part, parts_of
from megatron_ttl.parallel.tensor import (
    ColumnParallelLinear,
    RowParallelLinear,
    SequenceParallelNorm,
    TensorParallel,
    VocabularyParallelEmbedding,
)


def tensor_parallel_of(mesh: Mesh) -> TensorParallel | None:
    """Return the ranks that share this process's layers; None where it is alone."""
    if mesh.layout.tensor == 1:
        return None
    return TensorParallel(mesh.tensor_parallel_group, mesh.layout.tensor, mesh.place.tensor, mesh.layout.sequence)


def build_layer(config: ModelConfig, index: int, seed: int | None, mesh: Mesh) -> nn.Module:
    """Build layer `index` whole on the host, draw its weights, and keep this rank's part of it.

    The drawn weights do not depend on the layout. With seed None the memory stays as it is.
    """
    with torch.device("meta"):
        layer = layer_classes(config)[index](config)
    layer = layer.to_empty(device="cpu")
    if seed is not None:
        initialize_layer(layer, config, index, seed)
    parallel = tensor_parallel_of(mesh)
    return cut_layer(layer, config, mesh, parallel) if parallel else layer


def cut_layer(layer: nn.Module, config: ModelConfig, mesh: Mesh, parallel: TensorParallel) -> nn.Module:
    """Replace every module that the plan names by the one that owns a part of its weight, under the same name."""
    for name, module in list(layer.named_modules()):
        stem, _, leaf = name.rpartition(".")
        style = TENSOR_PLAN.get(leaf)
        if style is None or (style == "norm" and not parallel.sequence):
            continue
        weight = module.weight.detach()
        if style == "norm":
            new: nn.Module = SequenceParallelNorm(weight, module.eps, parallel)
        else:
            parts = parts_of(leaf, config, mesh.layout, parallel.rank)
            own = cut(weight, parts)
            if style == "vocabulary":
                new = VocabularyParallelEmbedding(own, parallel, parts[0].rows * parallel.rank)
            else:
                new = (RowParallelLinear if style == "row" else ColumnParallelLinear)(own, parallel)
            # DeepSpeed's word for "every rank has another part": without it all but the first rank's gradients are
            # left out of the norm, and clipping goes wrong in silence.
            new.weight.tensor_model_parallel = True
        setattr(layer.get_submodule(stem), leaf, new)
    return layer


def cut(whole: Tensor, parts: list[Part]) -> Tensor:
    """Return a rank's part of a packed weight; rows of padding are zero and stay so."""
    pieces = whole.split([part.shape[0] for part in parts])
    return pack([_narrow(piece, part) for piece, part in zip(pieces, parts, strict=True)], parts)


def pack(pieces: list[Tensor], parts: list[Part]) -> Tensor:
    """Join a rank's pieces into its packed weight, adding the padding."""
    padded = [F.pad(piece, (0, 0, 0, part.rows - piece.shape[0])) if part.rows > piece.shape[0] else piece
              for piece, part in zip(pieces, parts, strict=True)]
    return torch.cat(padded)


def unpack(own: Tensor, parts: list[Part]) -> list[Tensor]:
    """Split a rank's packed weight into its pieces, without the padding; they are views."""
    pieces = own.split([part.rows for part in parts])
    return [piece[: part.extent[0]] for piece, part in zip(pieces, parts, strict=True)]


def _narrow(piece: Tensor, part: Part) -> Tensor:
    for dim, (start, length) in enumerate(zip(part.offset, part.extent, strict=True)):
        piece = piece.narrow(dim, start, length)
    return piece
