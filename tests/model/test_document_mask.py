"""Documents that share a sample: logits, loss and gradients of each are those it has alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ttl.generate.kv_cache import build_caches
from megatron_ttl.kernels.cross_entropy import IGNORED_LABEL, cross_entropy
from megatron_ttl.kernels.documents import documents_of
from megatron_ttl.model.llama import LlamaWithinDocuments, build_model, within_documents
from megatron_ttl.testing import tiny_model

EOS, S = 2, 32


def spread_model(kv_heads=2):
    """Return a model whose attention is far from uniform."""
    model = build_model(tiny_model(num_key_value_heads=kv_heads), seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.dim() > 1 else 1.3)
    return model


def documents_of_lengths(lengths, seed=0):
    """Draw documents of so many ids, EOS last."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.cat((torch.randint(4, 96, (n - 1,), generator=generator), torch.tensor([EOS]))) for n in lengths]


def packed(documents):
    """Return one sample, padded with EOS, and its labels."""
    input_ids, labels = torch.full((1, S), EOS), torch.full((1, S), IGNORED_LABEL)
    place = 0
    for document in documents:
        input_ids[0, place : place + len(document)] = document
        labels[0, place : place + len(document) - 1] = document[1:]
        place += len(document)
    return input_ids, labels


def gradients(loss, model):
    return torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("lengths", [(32,), (5, 20, 7), (2, 3, 9, 1, 11), (4,)])
def test_packed_equals_alone(kv_heads, lengths):
    """Logits to 2e-6 relative (torch 2.11 reaches 1.2e-6), loss and gradients too; what no mask gives is far away."""
    model, documents = spread_model(kv_heads), documents_of_lengths(lengths)
    input_ids, labels = packed(documents)
    logits = within_documents(model, input_ids, EOS)
    place = 0
    for document in documents:
        alone = model(document[None])
        scale = alone.abs().max()
        assert (logits[:, place : place + len(document)] - alone).abs().max() <= 2e-6 * scale
        place += len(document)
    loss = cross_entropy(logits, labels)
    sums = sum(cross_entropy(model(document[None, :-1]), document[None, 1:]) for document in documents if len(document) > 1)
    assert loss.item() == pytest.approx(sums.item(), rel=1e-6)
    for ours, theirs in zip(gradients(loss, model), gradients(sums, model), strict=True):
        assert (ours - theirs).abs().max() <= 2e-6 * theirs.abs().max()
    if len(documents) > 1:
        assert cross_entropy(model(input_ids), labels).item() != pytest.approx(sums.item(), rel=1e-3)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(0, 11))
def test_a_document_knows_nothing_of_its_neighbours(lengths, chosen):
    """Other ids before and behind it change nothing, to the bit."""
    model = LlamaWithinDocuments(*spread_model(), eos_id=EOS)
    first, second = (documents_of_lengths(lengths, seed) for seed in (1, 2))
    chosen %= len(lengths)
    second[chosen] = first[chosen]
    begin = sum(lengths[:chosen])
    ours, theirs = (model(torch.cat(documents)[None])[:, begin : begin + lengths[chosen]] for documents in (first, second))
    assert torch.equal(ours, theirs)


def test_positions_are_those_that_are_given():
    """Scores depend on distances alone, so nothing else would show that positions begin anew."""
    model, x = spread_model(), torch.randn(1, 6, 32)
    mask = documents_of(torch.zeros(1, 6, dtype=torch.int64), EOS, torch.float32)[1]
    same, shifted, still = (model[1](x, None, (places[None], mask)) for places in (
        torch.arange(6), torch.arange(6) // 2 * 2, torch.zeros(6, dtype=torch.int64)))
    torch.testing.assert_close(same, model[1](x), atol=1e-4, rtol=1e-5)
    assert (shifted - same).abs().max() > 0.1 and (still - shifted).abs().max() > 0.1


def test_a_cache_holds_one_document():
    """Generation gives the logits of a document alone, with or without documents before it."""
    config = tiny_model()
    model, (document,) = spread_model(), documents_of_lengths((9,))
    caches = build_caches(config, 16, "cpu", torch.float32)
    embedding, *blocks, head = model
    steps = []
    for token in document:
        x = embedding(token[None, None])
        for block, cache in zip(blocks, caches, strict=True):
            x = block(x, cache)
        steps.append(head(x))
    inside = within_documents(model, torch.cat((torch.tensor([7, EOS]), document))[None], EOS)[:, 2:]
    torch.testing.assert_close(torch.cat(steps, dim=1), inside, atol=1e-4, rtol=1e-5)
    ids = document[None, :7]
    with pytest.raises(AssertionError, match="a mask is for every query and every key"):
        blocks[0](embedding(ids), caches[0], documents_of(ids, EOS, torch.float32))
