"""The cross-entropy kernels against fp64 and PyTorch, what they may not touch, and the contract of a gradient in place."""

from __future__ import annotations

import math

import pytest
import torch
from cuda_emulation import emulation, set_order
from gpu import gpu_test, needs_gpu
from kernel_errors import assert_guards_hold, assert_no_worse, guarded

from megatron_ttl.kernels.cross_entropy import (
    cross_entropy,
    finish_cross_entropy_,
    partial_cross_entropy,
    with_gradient_in_place,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_gpu)])
def device(request):
    if request.param == "cuda":
        yield request.param
    else:
        with emulation():
            yield request.param


def batch(rows, width, dtype):
    """Return logits with rows that are hard to get right, and labels, one of them ignored."""
    logits = torch.randn(rows, width) * torch.rand(rows, 1) * 8
    labels = torch.randint(width, (rows,))
    logits[0] += 1e4
    logits[1] *= 1e3
    logits[2] = -3.25  # all alike
    logits[3, torch.rand(width) < 0.3] = -math.inf
    logits[3, labels[3]] = 2.0
    logits[4, labels[4]] = logits[4].max() + 12  # nearly certain
    labels[5] = -100
    return logits.to(dtype), labels


def differentiated(logits, labels, scale=1.0, path="torch", incoming=1.0):
    """Return the loss and the gradient of the logits."""
    logits = logits.clone().requires_grad_()
    loss = cross_entropy(logits, labels, scale, path)
    (loss * incoming).backward()
    return loss.detach(), logits.grad


def exact(logits, labels, scale=1.0):
    wide = logits.double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(wide, labels, reduction="sum") * scale
    loss.backward()
    return loss.detach(), wide.grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [2, 13, 1000, 4101, 25_013], ids=str)
def test_loss_and_gradient(device, dtype, width):
    """Also rows that begin anywhere, rows too long to keep, and the same bits whichever thread runs first."""
    logits, labels = (tensor.to(device) for tensor in batch(7, width, dtype))
    expected, torchs = exact(logits, labels, 0.125), differentiated(logits, labels, 0.125)
    results = []
    for offset, backwards in ((0, False), (0, True), (3, False)):
        if device == "cpu":
            set_order(backwards)
        whole, inside = (tensor.to(device) for tensor in guarded(logits.shape, dtype, offset))
        inside = whole[64 + offset:64 + offset + logits.numel()].view(logits.shape).copy_(logits)
        places = inside.detach().requires_grad_()
        loss = cross_entropy(places, labels, 0.125, "cuda")
        assert_guards_hold(whole, inside)  # the gradient, unless it is fp16's, is already there
        loss.backward()
        for ours, theirs, wanted, what in zip((loss.detach(), inside), torchs, expected, ("loss", "gradient"), strict=True):
            assert_no_worse(ours, theirs, wanted, f"{what} {width} {dtype} {offset}")
        assert torch.equal(places.grad, inside) and not inside[5].any()
        results.append((loss.detach(), inside))
    set_order(False)
    for one, other in zip(results[0], results[1], strict=True):
        assert torch.equal(one, other)


def test_a_forward_pass_alone_leaves_the_logits(device):
    logits, labels = (tensor.to(device) for tensor in batch(7, 1003, torch.bfloat16))
    before = logits.clone()
    loss = cross_entropy(logits, labels, 0.5, "cuda")
    with torch.no_grad():
        again = cross_entropy(logits.requires_grad_(), labels, torch.tensor(0.5, device=device), "cuda")
    assert torch.equal(logits, before) and torch.equal(loss, again) and not again.requires_grad
    assert torch.equal(loss, differentiated(logits.detach(), labels, 0.5, "cuda")[0])


def test_ignored_rows_are_not_read(device):
    logits, labels = torch.randn(2, 3, 70, device=device), torch.randint(70, (2, 3), device=device)
    labels[0, 1] = labels[1, 2] = -100
    expected = exact(logits.flatten(0, 1), labels.flatten())[0]
    logits[labels == -100] = math.nan
    loss, gradient = differentiated(logits, labels, path="cuda")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6) and not gradient[labels == -100].any()
    assert cross_entropy(logits, torch.full_like(labels, -100), path="cuda") == 0
    assert cross_entropy(logits[:0], labels[:0], path="cuda") == 0


@pytest.mark.parametrize("label", [70, -1, -101, 2**40, -2**63])
def test_a_label_outside_of_the_vocabulary_is_seen_and_harmless(device, label):
    whole, inside = (tensor.to(device) for tensor in guarded((3, 70), torch.float32))
    inside = whole[64:64 + 210].view(3, 70).normal_()
    labels = torch.tensor([5, label, 69], device=device)
    expected = exact(inside, torch.tensor([5, -100, 69], device=device))[1]
    loss = cross_entropy(inside.requires_grad_(), labels, path="cuda")
    assert loss.isnan() and inside[1].isnan().all()
    with torch.no_grad():
        inside[1] = 0
        assert_guards_hold(whole, inside)
        torch.testing.assert_close(inside.double(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_what_is_not_finite_stays_not_finite(device, poison):
    logits = torch.randn(2, 300, device=device)
    logits[0, 123] = poison
    loss, gradient = differentiated(logits, torch.tensor([7, 8], device=device), path="cuda")
    assert loss.isnan() and gradient[0].isnan().any() and gradient[1].isfinite().all()
    nothing = torch.full((1, 300), -math.inf, device=device)
    assert cross_entropy(nothing, torch.tensor([3], device=device), path="cuda").isnan()
    nothing[0, 4] = 1.0
    assert cross_entropy(nothing, torch.tensor([3], device=device), path="cuda") == math.inf


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_and_gradients_that_come_in(device, dtype):
    """A number and a tensor are the same; fp16 loses nothing to a small scale that the loss scale makes up for."""
    logits, labels = (tensor.to(device) for tensor in batch(9, 1003, dtype))
    scale, incoming = 13 * 2.0**-22, 32768.0
    ours = differentiated(logits, labels, scale, "cuda", incoming)
    by_tensor = differentiated(logits, labels, torch.tensor(scale, device=device), "cuda", incoming)
    torchs = differentiated(logits, labels, scale, incoming=incoming)
    assert torch.equal(ours[0], by_tensor[0]) and torch.equal(ours[1], by_tensor[1])
    wanted = exact(logits, labels, scale)
    assert_no_worse(ours[0], torchs[0], wanted[0], "loss")
    twice_rounded = torch.finfo(dtype).eps / 2 if dtype == torch.float16 else None
    assert_no_worse(ours[1], torchs[1], wanted[1] * incoming, "gradient", allowed=twice_rounded)


def test_one_backward_pass_and_nobody_else():
    """Who kept the logits for a backward pass of his own, or asks twice, is told so."""
    with emulation():
        made, labels = torch.randn(2, 64, requires_grad=True), torch.tensor([3, 4])
        logits = made * 2
        other = logits.square().sum()
        loss = cross_entropy(logits, labels, path="cuda")
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            other.backward()
        loss.backward(retain_graph=True)
        expected = exact(made.detach() * 2, labels)[1] * 2
        torch.testing.assert_close(made.grad.double(), expected, atol=1e-6, rtol=1e-5)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        logits = made * 2
        loss = cross_entropy(logits, labels, path="cuda")
        with torch.no_grad():
            logits.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        loss = cross_entropy(made * 2, labels, path="cuda")
        with pytest.raises(RuntimeError, match="no gradient of the gradient"):
            torch.autograd.grad(loss, made, create_graph=True)


def test_what_the_kernels_do_not_take():
    logits, labels = torch.randn(4, 6), torch.zeros(4, dtype=torch.int64)
    with emulation():
        for arguments, message in (
                ((logits.t(), labels[:1].expand(6)), "contiguous"), ((logits.double(), labels), "fp32, bf16 or fp16"),
                ((logits, labels.int()), "int64 label per row"), ((logits, labels[:3]), "int64 label per row"),
                ((logits, labels, torch.ones(2)), "one fp32 element"),
                ((logits, labels, torch.ones((), dtype=torch.float64)), "one fp32 element")):
            with pytest.raises(TypeError, match=message):
                cross_entropy(*arguments, path="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("parts", "share"), [(2, 600), (3, 341), (3, 504)])  # padding in the last; it may have nothing else
def test_parts_of_the_vocabulary(device, dtype, parts, share):
    """Together they know what the whole knows; filler is neither read nor left."""
    width = 1003
    logits, labels = (tensor.to(device) for tensor in batch(8, width, dtype))
    padded = torch.nn.functional.pad(logits, (0, parts * share - width), value=math.nan)
    cuts = [(padded[:, share * part:share * (part + 1)].contiguous(), share * part, min(share, max(0, width - share * part)))
            for part in range(parts)]
    known = [partial_cross_entropy(own, labels, first, columns) for own, first, columns in cuts]
    largest = torch.stack([most for most, _, _ in known]).amax(0)
    total = sum(total * (most - largest).exp() for most, total, _ in known)
    picked = sum(picked for _, _, picked in known)
    loss = torch.where(labels != -100, total.log() - (picked - largest), 0.0).double().sum().float() * 0.25
    gradients = []
    for own, first, columns in cuts:
        own.requires_grad_()
        finish_cross_entropy_(own, labels, first, columns, largest, total, 0.25)
        with_gradient_in_place(own, loss, 0.25).backward()
        gradients.append(own.grad)
    gradient = torch.cat(gradients, dim=1)
    wanted, torchs = exact(logits, labels, 0.25), differentiated(logits, labels, 0.25)
    assert_no_worse(loss, torchs[0], wanted[0], "loss")
    assert_no_worse(gradient[:, :width], torchs[1], wanted[1], "gradient")
    assert not gradient[:, width:].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_under_torch_compile(device, dtype):
    """The operator keeps what torch.library promises, does not touch the logits, and gives the same numbers."""
    logits, labels = (tensor.to(device) for tensor in batch(7, 133, dtype))
    for scale, wanted in ((None, True), (torch.tensor(0.7, device=device), True), (None, False)):
        arguments = logits.clone().requires_grad_(wanted), labels, scale, 0.3 if scale is None else 1.0, wanted
        torch.library.opcheck(torch.ops.megatron_ttl.cross_entropy.default, arguments)
    compiled = torch.compile(lambda x: cross_entropy(x * 1.0, labels, 0.3, "cuda"), backend="aot_eager", fullgraph=True)
    x = logits.clone().requires_grad_()
    loss = compiled(x)
    loss.backward()
    eager = differentiated(logits, labels, 0.3, "cuda")
    assert torch.equal(x.detach(), logits) and torch.equal(loss, eager[0])
    assert torch.equal(x.grad, eager[1])
    misaligned = torch.cat((logits.new_zeros(1), logits.flatten()))[1:].view(logits.shape).requires_grad_()
    assert torch.equal(torch.ops.megatron_ttl.cross_entropy(misaligned, labels, None, 0.3, True)[0], eager[0])


@gpu_test
def test_more_elements_than_32_bits_count():
    """70,000 rows of 32,000: the last ones lie 4.5 GB behind the first."""
    logits = torch.randn(70_000, 32_000, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(32_000, (70_000,), device="cuda")
    labels[:-5] = -100
    wanted = exact(logits[-5:], labels[-5:])
    torchs = differentiated(logits[-5:], labels[-5:])
    loss = cross_entropy(logits.requires_grad_(), labels, path="cuda")
    assert_no_worse(loss.detach(), torchs[0], wanted[0])
    assert_no_worse(logits.detach()[-5:], torchs[1], wanted[1])
    assert not logits.detach()[:-5].any()
