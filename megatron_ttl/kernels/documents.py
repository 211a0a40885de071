"""Where documents lie in a sample: the position of each token in its own, and a mask that keeps attention inside."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Documents = tuple[Tensor, Tensor]
"""Positions [b, s] and mask [b, 1, s, s] of a micro batch; made once and used by all blocks."""


def documents_of(input_ids: Tensor, eos_id: int, dtype: torch.dtype) -> Documents:
    """Return the positions and the mask of samples whose documents end with `eos_id`.  # [b, s]

    Args:
        input_ids: [b, s]; a document begins a sample, and after every EOS.
        eos_id: the id that ends a document and stands nowhere else.
        dtype: of queries and keys.
    """
    positions = document_positions(input_ids, eos_id)
    return positions, document_mask(positions, dtype)


def document_positions(input_ids: Tensor, eos_id: int) -> Tensor:
    """Count from 0 in each document: [b, s] -> [b, s] int64."""
    begins = F.pad(input_ids[:, :-1] == eos_id, (1, 0), value=True)
    place = torch.arange(input_ids.shape[1], device=input_ids.device)
    return place - (place * begins).cummax(dim=1).values


def document_mask(positions: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what is added to the scores: 0 where query i sees key j, -inf elsewhere.  # [b, s] -> [b, 1, s, s]

    A number and not a truth value: PyTorch would turn that into one again in every block, and keep each for the
    backward pass. It takes b s^2 numbers: 8 MiB per sample of 2,048 tokens in bf16.
    """
    place = torch.arange(positions.shape[1], device=positions.device)
    first = (place - positions)[:, :, None]  # where the document of query i begins
    seen = (place >= first) & (place <= place[:, None])  # [b, s, s]
    return added_mask(seen, dtype)


def added_mask(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0 where query i sees key j, -inf elsewhere: [b, s_q, s_k] bool -> [b, 1, s_q, s_k]."""
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, -math.inf)[:, None]
