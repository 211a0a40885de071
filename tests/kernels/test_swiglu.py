"""SwiGLU's kernels against fp64 and against what PyTorch's own operations make of the same numbers."""

from __future__ import annotations

import pytest
import torch
from cuda_emulation import in_both_orders
from gpu import gpu_test, needs_gpu
from kernel_errors import assert_guards_hold, assert_no_worse, guarded, poisoned_memory

from megatron_ttl.kernels import build
from megatron_ttl.kernels.swiglu import swiglu, swiglu_linear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CPU = torch.device("cpu")
# Rows: none, one, fewer and more than a block takes. Widths: by vectors, with a ragged second tile; and by elements.
SHAPES = [(0, 8), (1, 8), (9, 520), (19, 264), (17, 1), (3, 7), (5, 131), (8, 12)]


def drawn(shape, dtype, device="cpu"):
    """Draw a projection [.., 2f] whose gates reach far to both sides, and a gradient [.., f]."""
    gate, up, dy = (torch.randn(shape, device=device) for _ in range(3))
    return torch.cat((8 * gate, up), dim=-1).to(dtype), dy.to(dtype)


def forward_and_backward(function, gate_up, dy):
    gate_up = gate_up.clone().requires_grad_()
    y = function(gate_up)
    return y.detach(), *torch.autograd.grad(y, gate_up, dy)


def in_fp64(gate_up, dy):
    return forward_and_backward(lambda t: torch.nn.functional.silu(t.chunk(2, -1)[0]) * t.chunk(2, -1)[1],
                                gate_up.double(), dy.double())


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels(emulated_kernels, dtype, shape, offset):
    """Both passes in memory that is aligned and that is not: little error, every element written and none beside."""
    sizes = (*shape, build.DTYPES[dtype])
    gate_up, dy = drawn(shape, dtype)
    inputs = [guarded(tuple(t.shape), dtype, offset)[1].copy_(t) for t in (gate_up, dy)]

    def run():
        outputs = [guarded(tuple(t.shape), dtype, offset) for t in (dy, gate_up)]
        (_, y), (_, gradient) = outputs
        emulated_kernels.call("swiglu_forward", inputs[0], y, *sizes, device=CPU)
        emulated_kernels.call("swiglu_backward", inputs[1], inputs[0], gradient, None, *sizes, device=CPU)
        for whole, inside in outputs:
            assert_guards_hold(whole, inside)
        return y, gradient

    ours, exact = in_both_orders(run), in_fp64(gate_up, dy)
    # Of few elements chance decides who rounds better: fp32 is let err by all of its roundings.
    allowed = 4 * torch.finfo(dtype).eps if dtype == torch.float32 and dy.numel() < 512 else None
    for value, pytorchs, wanted in zip(ours, forward_and_backward(swiglu, gate_up, dy), exact, strict=True):
        assert_no_worse(value, pytorchs, wanted, allowed=allowed)
    if dtype != torch.float32:
        torch.testing.assert_close(ours[0], exact[0].to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_writes_the_activation_again(emulated_kernels, dtype, shape, offset):
    """To the bit what forward wrote, in dy's memory or in its own, which is aligned otherwise; the gradient stays."""
    sizes = (*shape, build.DTYPES[dtype])
    gate_up, dy = drawn(shape, dtype)
    y, gradient = torch.empty_like(dy), torch.empty_like(gate_up)
    emulated_kernels.call("swiglu_forward", gate_up, y, *sizes, device=CPU)
    emulated_kernels.call("swiglu_backward", dy, gate_up, gradient, None, *sizes, device=CPU)

    def run():
        outputs = [guarded(tuple(t.shape), dtype, place) for t, place in
                   ((gate_up, offset), (dy, offset), (gate_up, offset), (dy, 1 - offset))]
        (_, first), (_, shared), (_, second), (_, own) = outputs
        shared.copy_(dy)
        emulated_kernels.call("swiglu_backward", shared, gate_up, first, shared, *sizes, device=CPU)
        emulated_kernels.call("swiglu_backward", dy, gate_up, second, own, *sizes, device=CPU)
        for whole, inside in outputs:
            assert_guards_hold(whole, inside)
        return first, second, shared, own

    for found, expected in zip(in_both_orders(run), (gradient, gradient, y, y), strict=True):
        assert torch.equal(found, expected)


def product_and_gradients(function, gate_up, weight, dout, path="cuda"):
    """Return [.., h], both gradients, and how many numbers were kept beside the two inputs."""
    gate_up, weight = (t.detach().clone().requires_grad_() for t in (gate_up, weight))
    inputs, more = [t.untyped_storage().data_ptr() for t in (gate_up, weight)], []

    def keep(tensor):
        more.append(tensor.numel() if tensor.untyped_storage().data_ptr() not in inputs else 0)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        product = function(gate_up, weight, path)
    return [product.detach(), *torch.autograd.grad(product, (gate_up, weight), dout)], sum(more)


def in_two_operations(gate_up, weight, path):
    return torch.nn.functional.linear(swiglu(gate_up, path), weight)


def same_bits_and_less_kept(gate_up, weight, dout):
    """Compare with the two operations, which keep the activation."""
    (ours, kept), (theirs, activation) = (product_and_gradients(function, gate_up, weight, dout)
                                          for function in (swiglu_linear, in_two_operations))
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    assert (kept, activation) == (0, gate_up.numel() // 2)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("shape", [(2, 9), (7,), (0,), (2, 1, 3)])
@pytest.mark.usefixtures("emulated_kernels")
def test_the_product_that_follows_forgets_the_activation(dtype, shape):
    """Bit for bit the two operations, for gradients that are expanded and that lie otherwise, too."""
    gate_up, dy = drawn((*shape, 40), dtype)
    weight, dout = torch.randn(24, 40, dtype=dtype), dy[..., :24]
    with poisoned_memory():
        for gradient in (dout, dout.contiguous(), torch.ones((), dtype=dtype).expand_as(dout)):
            same_bits_and_less_kept(gate_up, weight, gradient)


@pytest.mark.usefixtures("emulated_kernels")
def test_the_product_that_follows_is_the_same_on_other_paths():
    """PyTorch's operations, and one graph of torch.compile."""
    (gate_up, dout), weight = drawn((3, 5, 16), torch.float32), torch.randn(16, 16)
    compiled = torch.compile(swiglu_linear, fullgraph=True, backend="aot_eager")
    for ours, path in ((compiled, "cuda"), (swiglu_linear, "torch")):
        (found, _), (expected, _) = (product_and_gradients(function, gate_up, weight, dout, path)
                                     for function in (ours, in_two_operations))
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.long
@pytest.mark.usefixtures("emulated_kernels")
def test_more_rows_than_a_grid_is_high():
    """Blocks go round."""
    gate_up, dy = drawn((65535 * 8 + 11, 1), torch.float32)
    ours = forward_and_backward(lambda t: swiglu(t, "cuda"), gate_up, dy)
    for value, exact in zip(ours, in_fp64(gate_up, dy), strict=True):
        torch.testing.assert_close(value, exact.float())


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.usefixtures("emulated_kernels")
def test_the_path_takes_views_and_expanded_gradients(compiled):
    """Gradients reach the memory behind a view, in eager mode and through one graph of torch.compile."""
    whole = torch.randn(6, 5, 2 * 24).requires_grad_()

    def loss(whole, path):
        return swiglu(whole[1:, ::2, 4:-4], path).sum()  # its gradient is one number, expanded

    function = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss
    with poisoned_memory():
        ours, theirs = function(whole, "cuda"), loss(whole, "torch")
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(*(torch.autograd.grad(value, whole)[0] for value in (ours, theirs)))


@pytest.mark.usefixtures("emulated_kernels")
def test_the_operator_is_registered_as_torch_compile_wants_it():
    """Schema, fake tensors, autograd, and static and dynamic shapes."""
    for gate_up in (torch.randn(3, 4, 12, requires_grad=True), torch.randn(8, 6, dtype=torch.bfloat16).t()):
        torch.library.opcheck(torch.ops.megatron_ttl.swiglu.default, (gate_up,))
    torch.library.opcheck(torch.ops.megatron_ttl.swiglu_backward.default, (torch.randn(6).expand(4, 6), torch.randn(4, 12)))


def test_what_the_kernel_does_not_take_is_refused(emulated_kernels):
    """Number formats, odd widths, devices without kernels; each in a sentence."""
    with pytest.raises(TypeError, match="float64.*the kernel takes torch.float32, torch.bfloat16"):
        swiglu(torch.zeros(2, 4, dtype=torch.float64), "cuda")
    with pytest.raises(TypeError, match=r"\(2, 5\).*even last dimension"):
        swiglu(torch.zeros(2, 5), "cuda")
    with pytest.raises(RuntimeError, match="no kernels for meta"):
        swiglu(torch.zeros(2, 4, device="meta"), "cuda")
    with pytest.raises(RuntimeError, match="swiglu_forward: invalid argument"):
        emulated_kernels.call("swiglu_forward", None, None, 1, 1, 7, device=CPU)


@pytest.mark.parametrize("width", [3072, 4096, 5632, 131])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])
def test_on_a_gpu(device, dtype, width):
    """The same at widths that train, with its approximate exponential."""
    gate_up, dy = drawn((2, 1031, width), dtype, device)
    ours, again = (forward_and_backward(lambda t: swiglu(t, "cuda"), gate_up, dy) for _ in range(2))
    assert torch.equal(ours[0], again[0])
    assert torch.equal(ours[1], again[1])
    for value, pytorchs, wanted in zip(ours, forward_and_backward(swiglu, gate_up, dy), in_fp64(gate_up, dy), strict=True):
        assert_no_worse(value, pytorchs, wanted)


@pytest.mark.parametrize("width", [3072, 4096, 5632, 131])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])
def test_the_product_that_follows_on_a_gpu(device, dtype, width):
    """The same bits at widths that train: its approximate exponential and division give in both passes what they give."""
    gate_up, _ = drawn((2, 1031, width), dtype, device)
    same_bits_and_less_kept(gate_up, torch.randn(768, width, device=device, dtype=dtype),
                            torch.randn(2, 1031, 768, device=device, dtype=dtype))


@gpu_test
def test_places_beyond_32_bits_on_a_gpu():
    """The last rows of more than 2^31 elements are what they are alone, in both passes."""
    rows, width = 2**31 // 8192 + 9, 4096
    gate_up = torch.randn(rows, 2 * width, device="cuda", dtype=torch.bfloat16)
    ours, alone = (forward_and_backward(lambda t: swiglu(t, "cuda"), t, t[:, :width]) for t in (gate_up, gate_up[-16:]))
    for value, last in zip(ours, alone, strict=True):
        assert torch.equal(value[-16:], last)
