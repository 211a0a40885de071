"""RMSNorm's CUDA kernels, on the host by the emulator and on a GPU where there is one, against fp64 and PyTorch."""

from __future__ import annotations

import pytest
import torch
from cuda_emulation import emulated_library, emulation, in_both_orders
from gpu import gpu_test, needs_gpu
from kernel_errors import assert_guards_hold, assert_no_worse, guarded, poisoned_memory

from megatron_ttl.kernels import build, rms_norm
from megatron_ttl.kernels.rms_norm import add_rms_norm
from megatron_ttl.kernels.rms_norm import rms_norm as norm

EPS = 1e-5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
# Every layout of the vector kernels (one to sixteen warps, two to four vectors), their ragged ends, and what they leave.
SHAPES = [(33, 1), (33, 7), (33, 64), (1, 768), (300, 768), (33, 1000), (70, 1024), (2, 2048), (9, 2056), (9, 4104),
          (3, 8192), (3, 8193)]


@pytest.fixture(params=DEVICES)
def device(request):
    """Where kernels run: a GPU, or the CPU by the emulator."""
    if request.param == "cuda":
        yield torch.device("cuda")
        return
    with emulation():
        yield torch.device("cpu")


def random_inputs(rows, width, dtype, device="cpu"):
    """Return x, delta, weight and gradients of both outputs."""
    shapes = ((rows, width), (rows, width), (width,), (rows, width), (rows, width))
    return [torch.randn(shape, device=device).to(dtype) for shape in shapes]


def computed(inputs, path, add=True):
    """Return outputs and gradients: total, y, dx, ddelta, dweight; or y, dx, dweight."""
    x, delta, weight = (tensor.clone().requires_grad_() for tensor in inputs[:3])
    if add:
        outputs, leaves = add_rms_norm(x, delta, weight, EPS, path=path), (x, delta, weight)
    else:
        outputs, leaves = (norm(x, weight, EPS, path=path),), (x, weight)
    return [out.detach() for out in outputs] + list(torch.autograd.grad(outputs, leaves, inputs[5 - len(outputs):]))


def exactly(inputs, add=True):
    """Return the same in fp64, of the sum as it is rounded."""
    x, delta, weight = inputs[:3]
    total = (x + delta if add else x).double().requires_grad_()
    scale = weight.double().requires_grad_()
    y = total * (total.square().mean(-1, keepdim=True) + EPS).rsqrt() * scale
    dtotal, dweight = torch.autograd.grad(y, (total, scale), inputs[4].double())
    dtotal = dtotal + inputs[3].double() if add else dtotal
    return [(x.double() + delta.double()), y.detach(), dtotal, dtotal, dweight] if add else [y.detach(), dtotal, dweight]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("add", [False, True], ids=["alone", "added"])
def test_no_worse_than_pytorch(device, dtype, shape, add):
    """Outputs and gradients have at most twice PyTorch's own error, and nothing is left unwritten."""
    inputs = random_inputs(*shape, dtype, device)
    with poisoned_memory():
        ours, torchs = (computed(inputs, path, add) for path in ("cuda", "torch"))
    names = ("total", "y", "dx", "ddelta", "dweight") if add else ("y", "dx", "dweight")
    for name, *values in zip(names, ours, torchs, exactly(inputs, add), strict=True):
        # Few sums or differences, or few roundings of 1/rms: chance decides whose are the luckier ones.
        allowed = (64 * torch.finfo(dtype).eps if shape[1] < 8 and name[0] == "d" else
                   torch.finfo(torch.float32).eps if shape[0] < 10 else None)
        if shape[1] > 1 or name == "dweight" or name[0] != "d":  # at width 1 dx is the difference of two equal numbers
            assert_no_worse(*values, what=name, allowed=allowed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "offset"), [(64, 0), (64, 1), (63, 0), (1000, 0), (2056, 0)])
@pytest.mark.parametrize("rows", [0, 1, 37])
def test_writes_its_outputs_and_nothing_else(dtype, width, offset, rows):
    """Rows that begin anywhere in memory, an empty batch, ragged ends: the neighbours stay what they are."""
    x, delta, weight, dtotal, dy = random_inputs(rows, width, dtype)
    outputs = {name: guarded(shape, kind, offset) for name, shape, kind in (
        ("total", (rows, width), dtype), ("y", (rows, width), dtype), ("rstd", (rows,), torch.float32),
        ("dx", (rows, width), dtype), ("partials", (5, width), torch.float32), ("dweight", (width,), dtype))}
    total, y, rstd, dx, partials, dweight = (inside for _, inside in outputs.values())
    library, code = emulated_library(), build.DTYPES[dtype]
    library.call("rms_norm_forward", x, delta, weight, total, y, rstd, rows, width, EPS, code, device=x.device)
    library.call("rms_norm_backward", dy, dtotal, total, weight, rstd, dx, partials, dweight, rows, width, 5, code,
                 device=x.device)
    partials.nan_to_num_(0.0)  # memory to work in: what no block needed stays poisoned
    for whole, inside in outputs.values():
        assert_guards_hold(whole, inside)
    if not rows:
        assert (dweight == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [768, 2048, 257])
def test_the_order_of_threads_does_not_matter(emulated_kernels, dtype, width):
    """Where a barrier were missing, forwards and backwards would differ; and the sums are the same every time."""
    inputs = random_inputs(70, width, dtype)
    results = [in_both_orders(lambda: computed(inputs, "cuda")) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_any_strides(device):
    """What is not contiguous is copied first; a gradient may be one number, expanded."""
    x, delta = (torch.randn(24, 3, 5, device=device).transpose(0, 2).requires_grad_() for _ in range(2))
    weight = torch.randn(48, device=device)[::2].requires_grad_()
    for path in ("cuda", "torch"):
        total, y = add_rms_norm(x, delta, weight, EPS, path=path)
        grads = torch.autograd.grad(y.sum() + 2 * total.sum(), (x, delta, weight))
        if path == "cuda":
            kept = [total, y, *grads]
    for a, b in zip(kept, (total, y, *grads), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_only_what_is_wanted_is_computed(device, monkeypatch):
    """A frozen weight has no gradient; an output that nobody uses asks for none."""
    x, delta, weight, dtotal, dy = random_inputs(6, 64, torch.float32, device)
    x.requires_grad_()
    total, y = add_rms_norm(x, delta, weight, EPS, path="cuda")
    assert torch.equal(torch.autograd.grad(total, x, dtotal, retain_graph=True)[0], dtotal)
    alone = torch.autograd.grad(y, x, dy, retain_graph=True)[0]
    both = torch.autograd.grad((total, y), x, (dtotal, dy))[0]
    torch.testing.assert_close(alone + dtotal, both)
    with torch.no_grad():
        assert torch.equal(norm(total, weight, EPS, path="cuda"), y)


def test_refuses_what_does_not_fit(emulated_kernels):
    """Number formats and shapes that a kernel would read past."""
    x = torch.randn(4, 64)
    wide = x.double()
    for tensor, weight in ((x, torch.ones(64, dtype=torch.bfloat16)), (x, torch.ones(32)), (wide, wide[0])):
        with pytest.raises(TypeError, match="all must be fp32, bf16 or fp16, one of them, and the weight as wide as x"):
            norm(tensor, weight, EPS, path="cuda")
    with pytest.raises(TypeError, match="delta"):
        add_rms_norm(x, x[:2], torch.ones(64), EPS, path="cuda")


def test_without_a_library_the_path_says_why():
    """Nobody gets another path than the one asked for."""
    with pytest.raises(RuntimeError, match="no kernels for cpu: the kernels are for CUDA devices, not for cpu"):
        norm(torch.ones(2, 8), torch.ones(8), EPS, path="cuda")


def two_norms(x, delta, weight):
    """Return a number that needs both functions and both outputs."""
    total, y = add_rms_norm(x, delta, weight, EPS, path="cuda")
    return (total * y).sum() + norm(y, weight, EPS, path="cuda").square().sum()


@pytest.mark.parametrize("frozen", [False, True])
def test_compiled_like_eager(device, frozen):
    """torch.compile sees operators and breaks no graph; the same numbers come out, bit for bit."""
    leaves = [tensor.requires_grad_(not frozen or number < 2) for number, tensor in
              enumerate(random_inputs(12, 64, torch.float32, device)[:3])]
    wanted = leaves[:2] if frozen else leaves
    whole = torch.compile(two_norms, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(two_norms(*leaves), wanted), torch.autograd.grad(whole(*leaves), wanted),
                    strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("added", [False, True])
def test_operators_are_sound(device, added):
    """Schema, fake tensors, autograd registration: PyTorch's own examination of an operator."""
    x, delta, weight = (tensor.requires_grad_() for tensor in random_inputs(6, 40, torch.float32, device)[:3])
    torch.library.opcheck(rms_norm._forward_op, (x, delta if added else None, weight, EPS))
    rstd = torch.rand(6, device=device)
    plain = [tensor.detach() for tensor in (x, delta, weight)]
    torch.library.opcheck(rms_norm._backward_op, (plain[1], plain[1] if added else None, plain[0], plain[2], rstd, added))


def test_training_takes_the_same_way(device):
    """Five steps of a small residual network: losses and weights stay together."""
    def trained(path):
        torch.manual_seed(3)
        inner = torch.nn.ModuleList(torch.nn.Linear(48, 48, bias=False) for _ in range(3)).to(device)
        scales = torch.nn.ParameterList(torch.ones(48) for _ in range(4)).to(device)
        optimizer = torch.optim.AdamW([*inner.parameters(), *scales.parameters()], lr=1e-2)
        x, wanted = torch.randn(2, 10, 48, device=device), torch.randn(2, 10, 48, device=device)
        losses = []
        for _ in range(5):
            residual, y = x, norm(x, scales[0], EPS, path=path)
            for layer, scale in zip(inner, scales[1:], strict=True):
                residual, y = add_rms_norm(residual, layer(y).tanh(), scale, EPS, path=path)
            loss = (y - wanted).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses), [parameter.detach() for parameter in (*inner.parameters(), *scales.parameters())]

    losses, weights = trained("cuda")
    other_losses, other_weights = trained("torch")
    torch.testing.assert_close(losses, other_losses, rtol=1e-5, atol=1e-6)
    assert losses[-1] < losses[0]
    for a, b in zip(weights, other_weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@gpu_test
def test_more_elements_than_32_bits_count():
    """The last rows of a tensor of 2^31 elements and more, forward and backward: 4 GiB each in bf16."""
    rows, width = 2**31 // 1024 + 8, 1024
    x = torch.randn(64, width, device="cuda", dtype=torch.bfloat16).repeat(rows // 64 + 1, 1)[:rows].requires_grad_()
    weight = torch.randn(width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    y = norm(x, weight, EPS, path="cuda")
    y.backward(x.detach())
    for whole in (y, x.grad):  # rows repeat, every 64
        assert not whole[-8:].isnan().any()
        assert torch.equal(whole[-8:], whole[(rows - 8) % 64:][:8])


@gpu_test
def test_the_same_numbers_every_time_on_a_gpu():
    """No sum depends on who comes first: 16,384 rows, twice, on a stream of its own the second time."""
    inputs = random_inputs(16_384, 1024, torch.bfloat16, "cuda")
    first = computed(inputs, "cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        again = computed(inputs, "cuda")
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
