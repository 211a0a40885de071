"""The rotary embedding's kernels against a turn of complex numbers in fp64, and what autograd makes of the turn in place."""

from __future__ import annotations

import pytest
import torch
from cuda_emulation import in_both_orders
from gpu import gpu_test, needs_gpu
from kernel_errors import assert_guards_hold, assert_no_worse, guarded, poisoned_memory

from megatron_ttl.kernels import build
from megatron_ttl.kernels.attention import attention_reference
from megatron_ttl.kernels.rotary import rotary_heads, rotary_tables

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CPU = torch.device("cpu")
# b, s, n, k, d: nothing; one of each; half a head that is no vector; the models' heads (24 turned, 36 turned, size 128);
# more positions than a block takes; more heads and channels than a block takes; more samples than a grid is high.
SHAPES = [(0, 3, 2, 1, 8), (1, 0, 2, 1, 8), (1, 1, 1, 1, 2), (2, 5, 3, 1, 6), (2, 3, 12, 12, 64), (1, 2, 32, 4, 64),
          (2, 3, 5, 2, 128), (1, 70, 1, 1, 16), (1, 2, 33, 2, 512), (65537, 1, 1, 1, 2)]


def tables(batch, length, channels, per_sample, device="cpu"):
    """Angles of the first positions, or of random ones in every sample."""
    cos, sin = rotary_tables(2048, channels, 10_000.0, device)
    if not per_sample:
        return cos[:length], sin[:length]
    positions = torch.randint(2048, (batch, length), device=device)
    return cos[positions], sin[positions]


def turn(x, cos, sin, direction=1):
    """Turn [b, s, heads, d] as complex numbers, in fp64."""
    first, second = x.double().chunk(2, dim=-1)
    angles = torch.complex(cos.double(), direction * sin.double())[..., None, :]
    turned = torch.complex(first, second) * angles
    return torch.cat((turned.real, turned.imag), dim=-1)


def assert_rounded_once(value, exact):
    """Check that a value is what is exact, to the last bit or nearly so where two numbers cancel."""
    eps = torch.finfo(value.dtype).eps
    torch.testing.assert_close(value, exact.to(value.dtype), rtol=eps, atol=max(1e-6, eps / 64))


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_forward(emulated_kernels, dtype, shape, per_sample, offset):
    """In place and into memory of their own: turned to rounding, values bit for bit, nothing written beside."""
    batch, length, query_heads, kv_heads, channels = shape
    heads = query_heads + 2 * kv_heads
    packed = torch.randn(batch, length, heads, channels, dtype=dtype)
    cos, sin = tables(batch, length, channels, per_sample)
    arguments = (cos, sin, cos[0].numel() if per_sample and batch else 0, *shape, build.DTYPES[dtype])

    def run():
        whole, inside = guarded(tuple(packed.shape), dtype, offset)
        inside.copy_(packed)
        apart = [guarded((batch, length, count, channels), dtype, offset) for count in (query_heads, kv_heads, kv_heads)]
        emulated_kernels.call("rotary_apart", inside, *(t for _, t in apart), *arguments, device=CPU)
        assert torch.equal(inside, packed)
        emulated_kernels.call("rotary_in_place", inside, *arguments, device=CPU)
        for memory, tensor in ((whole, inside), *apart):
            assert_guards_hold(memory, tensor)
        return inside, torch.cat([t for _, t in apart], dim=2)

    in_place, apart = in_both_orders(run)
    assert torch.equal(in_place, apart)
    turned, value = packed.split((query_heads + kv_heads, kv_heads), dim=2)
    exact, pytorchs = turn(turned, cos, sin), rotary_heads(packed, cos, sin, kv_heads)
    assert_rounded_once(in_place[:, :, :-kv_heads], exact)
    assert_no_worse(in_place[:, :, :-kv_heads], torch.cat(pytorchs[:2], dim=1).transpose(1, 2), exact)
    assert torch.equal(in_place[:, :, -kv_heads:], value)


@pytest.mark.parametrize("layouts", ["shs", "hsh", "xsh"])
@pytest.mark.parametrize("shape", SHAPES[:-1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_sample", [False, True])
def test_kernels_backward(emulated_kernels, dtype, shape, layouts, per_sample):
    """Gradients by position, by head, or with rows that begin anywhere, into one packed gradient."""
    batch, length, query_heads, kv_heads, channels = shape
    cos, sin = tables(batch, length, channels, per_sample)
    gradients = []
    for layout, heads in zip(layouts, (query_heads, kv_heads, kv_heads), strict=True):
        gradient = torch.randn(batch, heads, length, channels, dtype=dtype)
        gradients.append({"h": gradient, "s": gradient.transpose(1, 2).contiguous().transpose(1, 2),
                          "x": torch.nn.functional.pad(gradient, (1, 2))[..., 1:-2]}[layout])
    by_strides = [argument for t in gradients for argument in (t, *t.stride()[:3])]
    arguments = (cos, sin, cos[0].numel() if per_sample and batch else 0, *shape, build.DTYPES[dtype])

    def run():
        whole, inside = guarded((batch, length, query_heads + 2 * kv_heads, channels), dtype)
        emulated_kernels.call("rotary_backward", *by_strides, inside, *arguments, device=CPU)
        assert_guards_hold(whole, inside)
        return (inside,)

    (packed,) = in_both_orders(run)
    back = torch.cat(gradients[:2], dim=1).transpose(1, 2)
    assert_rounded_once(packed[:, :, :-kv_heads], turn(back, cos, sin, direction=-1))
    assert torch.equal(packed[:, :, -kv_heads:], gradients[2].transpose(1, 2))


class Projection(torch.nn.Module):
    """A packed projection, its heads, and attention over them."""

    def __init__(self, device="cpu", dtype=torch.float32, channels=16):
        super().__init__()
        self.linear = torch.nn.Linear(24, 8 * channels, bias=False, device=device, dtype=dtype)
        self.channels = channels
        self.cos, self.sin = rotary_tables(7, channels, 10_000.0, device)

    def heads(self, x, path):
        packed = self.linear(x).view(*x.shape[:2], 8, self.channels)
        return rotary_heads(packed, self.cos, self.sin, 2, path)

    def forward(self, x, path):
        return attention_reference(*self.heads(x, path))


def with_gradients(function, module, x, path):
    out = function(x, path)
    loss = (out * torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)).sum()
    return out, *torch.autograd.grad(loss, (x, module.linear.weight))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.usefixtures("emulated_kernels")
def test_attention_over_turned_heads(compiled):
    """Outputs and gradients of a projection are those of PyTorch's path, in eager mode and through one compiled graph."""
    module, x = Projection(), torch.randn(3, 7, 24, requires_grad=True)
    function = torch.compile(module, fullgraph=True, backend="aot_eager") if compiled else module
    with poisoned_memory():
        ours = with_gradients(function, module, x, "cuda")
    for value, pytorchs in zip(ours, with_gradients(module, module, x, "torch"), strict=True):
        torch.testing.assert_close(value, pytorchs)


@pytest.mark.parametrize("used", [0, 1, 2])
@pytest.mark.usefixtures("emulated_kernels")
def test_gradients_that_are_missing_or_strided(used):
    """What nobody used adds nothing; a gradient whose channels do not lie side by side is copied first."""
    module, x = Projection(), torch.randn(2, 7, 24, requires_grad=True)
    ours, theirs = module.heads(x, "cuda")[used], module.heads(x, "torch")[used]
    gradient = torch.randn(*ours.shape[:-2], ours.shape[-1], ours.shape[-2]).transpose(-1, -2)
    torch.testing.assert_close(*(torch.autograd.grad(t, x, gradient)[0] for t in (ours, theirs)))


@pytest.mark.usefixtures("emulated_kernels")
def test_the_turn_happens_in_place_and_autograd_knows():
    """No copy of the projection; whoever kept it fails in the backward pass; a leaf is not overwritten."""
    module, x = Projection(), torch.randn(2, 7, 24)
    cos, sin = module.cos, module.sin
    packed = module.linear(x).view(2, 7, 8, 16)
    before = packed.detach().clone()
    kept = packed.square().sum()
    heads = rotary_heads(packed, cos, sin, 2, "cuda")
    assert {t.untyped_storage().data_ptr() for t in heads} == {packed.untyped_storage().data_ptr()}
    assert torch.equal(heads[2], before[:, :, 6:].transpose(1, 2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (kept + sum(t.sum() for t in heads)).backward()
    with pytest.raises(ValueError, match="packed is a leaf.*would be overwritten"):
        rotary_heads(before.requires_grad_(), cos, sin, 2, "cuda")
    strided = torch.randn(2, 7, 8, 32)[..., ::2]
    copy = strided.clone()
    for ours, theirs in zip(rotary_heads(strided, cos, sin, 2, "cuda"), rotary_heads(copy, cos, sin, 2), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("emulated_kernels")
def test_the_operator_is_registered_as_torch_compile_wants_it():
    """Schema, fake tensors with their strides, autograd, and static and dynamic shapes."""
    for dtype, per_sample in ((torch.float32, False), (torch.bfloat16, True)):
        cos, sin = tables(2, 5, 6, per_sample)
        packed = torch.randn(2, 5, 7, 6, dtype=dtype, requires_grad=True)
        torch.library.opcheck(torch.ops.megatron_ttl.rotary_heads.default, (packed, cos, sin, 2))
        gradients = [torch.randn(2, heads, 5, 6, dtype=dtype) for heads in (3, 2, 2)]
        torch.library.opcheck(torch.ops.megatron_ttl.rotary_backward.default, (*gradients, cos, sin))


@pytest.mark.parametrize("change", [
    {"packed": torch.zeros(2, 5, 6, 8, dtype=torch.float64)}, {"packed": torch.zeros(2, 5, 6, 7)}, {"kv_heads": 3},
    {"kv_heads": 0}, {"cos": torch.zeros(4, 4)}, {"cos": torch.zeros(5, 4, dtype=torch.bfloat16)},
    {"sin": torch.zeros(2, 5, 4)}, {"cos": torch.zeros(5, 4, device="meta")}])
@pytest.mark.usefixtures("emulated_kernels")
def test_what_the_kernel_does_not_take_is_refused(change):
    """Before anything is read beside a table or written beside the projection."""
    arguments = {"packed": torch.zeros(2, 5, 6, 8), "cos": torch.zeros(5, 4), "sin": torch.zeros(5, 4), "kv_heads": 2}
    with pytest.raises(TypeError, match=r"rotary_heads: packed .*; the kernel takes .* with even d, and fp32 tables"):
        rotary_heads(**arguments | change, path="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 2048, 12, 12, 64), (2, 2048, 32, 4, 64), (2, 1031, 8, 2, 128), (3, 77, 3, 1, 6)])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])
def test_on_a_gpu(device, shape, dtype):
    """The same at lengths that train, twice to the same bits."""
    batch, length, query_heads, kv_heads, channels = shape
    cos, sin = tables(batch, length, channels, True, device)
    packed = torch.randn(batch, length, query_heads + 2 * kv_heads, channels, device=device, dtype=dtype)
    gradients = [torch.randn(batch, heads, length, channels, device=device, dtype=dtype)
                 for heads in (query_heads, kv_heads, kv_heads)]

    def run():
        source = packed.clone().requires_grad_()
        heads = rotary_heads(source.clone(), cos, sin, kv_heads, "cuda")
        return torch.cat(heads, dim=1).detach(), *torch.autograd.grad(heads, source, gradients)

    (turned, gradient), again = run(), run()
    assert torch.equal(turned, again[0])
    assert torch.equal(gradient, again[1])
    first = query_heads + kv_heads
    assert_rounded_once(turned.transpose(1, 2)[:, :, :first], turn(packed[:, :, :first], cos, sin))
    assert_rounded_once(gradient[:, :, :first], turn(torch.cat(gradients[:2], dim=1).transpose(1, 2), cos, sin, -1))
    assert torch.equal(turned.transpose(1, 2)[:, :, first:], packed[:, :, first:])
    assert torch.equal(gradient[:, :, first:], gradients[2].transpose(1, 2))


@gpu_test
def test_places_beyond_32_bits_on_a_gpu():
    """The last positions of more than 2^31 elements are what they are alone, in both passes."""
    length = 2**31 // (36 * 64) + 7
    packed = torch.randn(1, length, 36, 64, device="cuda", dtype=torch.bfloat16)
    cos, sin = rotary_tables(length, 64, 10_000.0, "cuda")
    results = []
    for start in (0, length - 16):
        source = packed[:, start:].detach().requires_grad_()
        heads = rotary_heads(source.clone(), cos[start:], sin[start:], 2, "cuda")
        gradients = [packed[:, start:, :t.shape[1]].transpose(1, 2) for t in heads]
        (gradient,) = torch.autograd.grad(heads, source, gradients)
        results.append([*(t.transpose(1, 2)[:, -16:] for t in heads), gradient[:, -16:]])
    for value, alone in zip(*results, strict=True):
        assert torch.equal(value, alone)
