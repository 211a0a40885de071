"""Positions and masks of documents, and attention under a mask, against loops and the written-out formula."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_kernels import DEVICES, relative_error
from torch.nn.attention import SDPBackend

from megatron_ttl.kernels import attention as attention_file
from megatron_ttl.kernels.attention import attention, attention_reference
from megatron_ttl.kernels.documents import document_mask, document_positions, documents_of
from megatron_ttl.kernels.rotary import rotary, rotary_tables

EOS = 2


@given(st.lists(st.lists(st.sampled_from([EOS, EOS, 5, 6]), min_size=9, max_size=9), min_size=1, max_size=3))
def test_positions_and_mask_follow_from_the_ids(rows):
    """A document begins the sample and after each EOS, also after several in a row; no query is left without a key."""
    positions, mask = documents_of(torch.tensor(rows), EOS, torch.float32)
    for row, places, seen in zip(rows, positions.tolist(), mask[:, 0], strict=True):
        begin = 0
        for i, _ in enumerate(row):
            if i and row[i - 1] == EOS:
                begin = i
            assert places[i] == i - begin
            assert seen[i].tolist() == [0.0 if begin <= j <= i else -math.inf for j in range(len(row))]


def document_ids(device):
    """Two samples of 32 ids: documents of 5, 1, 20 and 6 ids, and one of 32 that does not end."""
    ids = torch.full((2, 32), 7, device=device)
    ids[0, [4, 5, 25, 31]] = EOS
    return ids


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
def test_masked_attention_is_that_of_each_document(device, heads):
    """Forward and backward against the formula, and against plain attention on the documents alone."""
    query, key, value = (torch.randn(2, n, 32, 8, device=device, requires_grad=True) for n in (heads[0], heads[1], heads[1]))
    mask = document_mask(document_positions(document_ids(device), EOS), torch.float32)
    ours, reference = attention(query, key, value, mask), attention_reference(query, key, value, mask)
    alone = torch.cat([attention_reference(*(t[:1, :, a:b] for t in (query, key, value)))
                       for a, b in ((0, 5), (5, 6), (6, 26), (26, 32))], dim=2)
    gradient = torch.randn_like(ours)
    for a, b in ((ours, reference), (ours[:1], alone)):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)
    for a, b in zip(torch.autograd.grad(ours, (query, key, value), gradient),
                    torch.autograd.grad(reference, (query, key, value), gradient), strict=True):
        torch.testing.assert_close(a, b, atol=5e-6, rtol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_backend_masks_or_refuses(device, dtype, monkeypatch):
    """None computes as if there were no mask; those that we name compute."""
    tensors = [torch.randn(2, 4, 32, 16, device=device, dtype=dtype) for _ in range(3)]
    mask = document_mask(document_positions(document_ids(device), EOS), dtype)
    exact = attention_reference(*(t.float() for t in tensors), mask)
    named = attention_file._masking_backends(tensors[0])
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION,
                    SDPBackend.MATH):
        monkeypatch.setattr(attention_file, "_masking_backends", lambda _, one=backend: [one])
        try:
            ours = attention(*tensors, mask)
        except RuntimeError as error:
            assert backend not in named and ("No viable" in str(error) or "No available" in str(error)), error
            continue
        assert relative_error(ours, exact) < (2e-6 if dtype == torch.float32 else 1e-2), backend


def test_a_mask_is_for_all_queries_and_keys():
    """On top of a cache too; a mask of another size would be stretched."""
    query, key = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8)
    mask = torch.zeros(1, 1, 3, 5).masked_fill_(torch.ones(3, 5).triu(3).bool(), -torch.inf)
    assert relative_error(attention(query, key, key, mask), attention_reference(query, key, key)) < 2e-6
    for size in ((3, 3), (1, 5), (3, 1)):
        with pytest.raises(AssertionError, match="every query and every key"):
            attention(query, key, key, torch.zeros(1, 1, *size))


def test_rotary_takes_positions_of_each_sample():
    """Rows turned by their own positions equal rows turned alone."""
    cos, sin = rotary_tables(16, 8, 10_000.0, "cpu")
    x = torch.randn(2, 16, 3, 8)
    positions = torch.stack((torch.arange(16), torch.arange(16) % 5))
    turned = rotary(x, cos[positions], sin[positions])
    for row in (0, 1):
        assert torch.equal(turned[row : row + 1], rotary(x[row : row + 1], cos[positions[row]], sin[positions[row]]))
