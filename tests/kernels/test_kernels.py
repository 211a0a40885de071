"""Every operation the model calls against its written-out reference and against torch."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_ttl.kernels.attention import attention, attention_reference
from megatron_ttl.kernels.cross_entropy import cross_entropy, cross_entropy_reference
from megatron_ttl.kernels.rms_norm import rms_norm, rms_norm_reference
from megatron_ttl.kernels.rotary import rotary, rotary_tables
from megatron_ttl.kernels.swiglu import swiglu, swiglu_reference

DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device")])]
DTYPES = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


def relative_error(value, reference):
    return ((value.double() - reference.double()).norm() / reference.double().norm()).item()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 64, 768])
def test_rms_norm(device, dtype, width):
    """Forward and backward, odd widths too."""
    x = torch.randn(3, 5, width, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(width, device=device, dtype=dtype, requires_grad=True)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    gradient = torch.randn_like(x)
    out = rms_norm(x, weight, 1e-6)
    exact = wide[0] / (wide[0].square().mean(-1, keepdim=True) + 1e-6).sqrt() * wide[1]
    out.backward(gradient)
    exact.backward(gradient.double())
    assert out.dtype == dtype
    for ours, reference in ((out, exact), (x.grad, wide[0].grad), (weight.grad, wide[1].grad)):
        # at width 1 the gradient of x is a difference of equal numbers
        if width > 1 or ours is not x.grad:
            assert relative_error(ours, reference) < DTYPES[dtype] * 2
    assert relative_error(rms_norm_reference(x, weight, 1e-6), exact) < DTYPES[dtype]


def test_rotary_turns_pairs_by_their_position():
    """Norms stay, position 0 is the identity, and scores depend on the distance alone."""
    cos, sin = rotary_tables(64, 16, 10_000.0, "cpu")
    x = torch.randn(1, 64, 2, 16)
    turned = rotary(x, cos, sin)
    assert torch.equal(turned[:, 0], x[:, 0])
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    same = x[:, :1].expand_as(x)
    scores = torch.einsum("bshd,bthd->bhst", rotary(same, cos, sin), rotary(same, cos, sin))
    torch.testing.assert_close(scores[..., 0, 5], scores[..., 20, 25], atol=1e-4, rtol=1e-4)
    angle = 10.0 * 10_000.0 ** (-2 * 3 / 16)
    torch.testing.assert_close(cos[10, 3], torch.tensor(math.cos(angle)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(device, dtype):
    """Gate first, up second."""
    packed = torch.randn(4, 6, 22, device=device, dtype=dtype)
    exact = torch.nn.functional.silu(packed[..., :11].double()) * packed[..., 11:].double()
    assert relative_error(swiglu(packed), exact) < DTYPES[dtype]
    assert relative_error(swiglu_reference(packed), exact) < DTYPES[dtype]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("lengths", [(16, 16), (1, 9), (3, 9), (1, 1)])
def test_attention(device, heads, lengths):
    """All head groupings; whole sequences, one new token and several new tokens on top of a cache."""
    query = torch.randn(2, heads[0], lengths[0], 8, device=device, requires_grad=True)
    key, value = (torch.randn(2, heads[1], lengths[1], 8, device=device, requires_grad=True) for _ in range(2))
    ours, reference = attention(query, key, value), attention_reference(query, key, value)
    torch.testing.assert_close(ours, reference, atol=2e-6, rtol=1e-5)
    gradient = torch.randn_like(ours)
    for a, b in zip(torch.autograd.grad(ours, (query, key, value), gradient),
                    torch.autograd.grad(reference, (query, key, value), gradient), strict=True):
        torch.testing.assert_close(a, b, atol=5e-6, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_attention_in_bfloat16_on_a_gpu():
    """The backend that training uses, against fp32."""
    tensors = [torch.randn(2, n, 256, 64, device="cuda", dtype=torch.bfloat16) for n in (8, 2, 2)]
    assert relative_error(attention(*tensors), attention_reference(*(t.float() for t in tensors))) < 1e-2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy_sums_what_counts(device, dtype):
    """Ignored labels add nothing; the sum is fp32 in both dtypes."""
    logits = torch.randn(2, 5, 13, device=device, dtype=dtype)
    labels = torch.randint(13, (2, 5), device=device)
    labels[0, :3] = -100
    exact = torch.nn.functional.cross_entropy(logits.double().flatten(0, 1), labels.flatten(), reduction="none").sum()
    for function in (cross_entropy, cross_entropy_reference):
        total = function(logits, labels)
        assert total.dtype == torch.float32
        torch.testing.assert_close(total.double(), exact, rtol=1e-6, atol=0)
    assert cross_entropy(logits, torch.full_like(labels, -100)) == 0


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary():
    """ln v nats per token, exactly."""
    assert cross_entropy(torch.zeros(1, 4, 512), torch.arange(4)[None]).item() == pytest.approx(4 * math.log(512))
