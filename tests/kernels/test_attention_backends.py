"""Backends of attention: each computes the formula, the one that was asked for runs, and what is not here says so."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from gpu import gpu_test, needs_gpu
from test_kernels import relative_error

from megatron_ttl.errors import ConfigError
from megatron_ttl.kernels.attention import BACKENDS, attention, attention_reference
from megatron_ttl.kernels.attention_backend import (
    attention_refusal,
    attention_that_runs,
    backend_named_by,
    prefer_attention_backend,
    profiled_kernels,
)
from megatron_ttl.kernels.documents import document_mask
from megatron_ttl.kernels.flash_attn import flash_attn_refusal

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SWITCHES = {"cudnn": "cudnn_sdp", "flash": "flash_sdp", "efficient": "mem_efficient_sdp", "math": "math_sdp"}


def stored_as_in_the_model(heads, kv_heads, tokens=64, channels=64, device=CPU, dtype=torch.float32):
    """Return query, key, value as views of one packed projection, [b, s, n + 2k, d], that requires gradients."""
    packed = torch.randn(2, tokens, heads + 2 * kv_heads, channels, device=device, dtype=dtype).requires_grad_()
    return packed, [part.transpose(1, 2) for part in packed.split((heads, kv_heads, kv_heads), dim=2)]


def forward_and_backward(function, packed, parts, gradient):
    out = function(*parts)
    return out, torch.autograd.grad(out, packed, gradient.to(out.dtype))[0]


@pytest.fixture
def switches_as_before():
    """Put PyTorch's switches back, which are the process's."""
    yield
    for name in SWITCHES.values():
        getattr(torch.backends.cuda, f"enable_{name}")(True)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("path", ["auto", "flash", "math"])
def test_a_path_by_name_computes_and_runs(path, heads):
    """The formula to rounding, forward and backward, with groups; the profile shows that path and no other."""
    packed, parts = stored_as_in_the_model(*heads, tokens=16, channels=8)
    gradient = torch.randn(2, heads[0], 16, 8)
    for ours, exact in zip(forward_and_backward(lambda *t: attention(*t, path=path), packed, parts, gradient),
                           forward_and_backward(attention_reference, packed, parts, gradient), strict=True):
        assert relative_error(ours, exact) < 2e-6
    assert attention_that_runs(CPU, path, shape=(*heads, 16, 8)) == {"auto": "flash"}.get(path, path)


def test_a_backend_that_is_not_here_is_not_replaced():
    """Asked for by name, it fails rather than another running in its place; the reason is known before."""
    _, parts = stored_as_in_the_model(4, 4, 8, 8)
    for path in ("cudnn", "efficient"):
        assert f"{path} computes on a GPU and not on cpu" in attention_refusal(path, CPU)
        with pytest.raises(RuntimeError, match="No viable backend"):
            attention(*parts, path=path)
    assert [attention_refusal(path, CPU) for path in ("auto", "flash", "math")] == [None] * 3
    assert prefer_attention_backend("auto", CPU) == "auto" and torch.backends.cuda.math_sdp_enabled()


@pytest.mark.parametrize(("name", "backend"), [
    ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_6_64x128x64_4x1x1_kernel0_0", "cudnn"),
    ("void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<64, 128, 128, 4>>", "flash"),
    ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<64>", "flash"),
    ("fmha_cutlassB_bf16_aligned_64x64_k64_sm80(PyTorchMemEffAttention::AttentionBackwardKernel)", "efficient"),
    ("void flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4>>", "flash_attn"),
    ("void (anonymous namespace)::softmax_warp_forward<c10::BFloat16, float>", "math"),
    ("void at::native::(anonymous namespace)::cunn_SoftMaxForward<4, c10::BFloat16, float>", "math"),
    ("triton_poi_fused__scaled_dot_product_flash_attention_0", "unknown"),
    ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "unknown")])
def test_names_of_kernels_give_the_backend_away(name, backend):
    """One name among others that say nothing."""
    assert backend_named_by(["void at::native::vectorized_elementwise_kernel<4>", name]) == backend


def test_the_package_is_named_where_it_is_missing():
    """Each reason by itself, and as an error that says what to do."""
    assert "not installed; install it" in flash_attn_refusal(GPU)
    _, parts = stored_as_in_the_model(4, 4, 8, 8)
    with pytest.raises(ConfigError, match=r'attention: "flash_attn"; .*not installed.*take attention "auto"'):
        attention(*parts, path="flash_attn")


def test_the_package_gets_its_own_layout(monkeypatch):
    """[b, s, n, d], groups unrepeated, causal; its output is stored that way and not copied. Masks are not for it."""
    calls = []

    def flash_attn_func(query, key, value, causal=False):
        calls.append((query.shape, key.shape, causal))
        return attention_reference(*(t.transpose(1, 2) for t in (query, key, value))).transpose(1, 2).contiguous()

    module = types.ModuleType("flash_attn")
    module.__spec__ = types.SimpleNamespace()
    module.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    assert "on a GPU and not on cpu" in flash_attn_refusal(CPU)
    assert "bf16 and fp16, not in torch.float32" in flash_attn_refusal(GPU, torch.float32)
    assert flash_attn_refusal(GPU) is None
    monkeypatch.setattr("megatron_ttl.kernels.flash_attn.flash_attn_refusal", lambda *_: None)
    _, parts = stored_as_in_the_model(4, 2, 16, 8)
    out = attention(*parts, path="flash_attn")
    assert calls == [((2, 16, 4, 8), (2, 16, 2, 8), True)]
    assert out.transpose(1, 2).is_contiguous()
    assert relative_error(out, attention_reference(*parts)) < 2e-6
    mask = torch.zeros(2, 1, 16, 16).masked_fill_(torch.ones(16, 16).triu(1).bool(), -torch.inf)
    assert relative_error(attention(*parts, mask, path="flash_attn"), out) < 2e-6 and len(calls) == 1


def test_one_backend_left_on_still_serves_a_cache(switches_as_before):
    """A process that trains may write text in between: what stands on a cache has every backend again."""
    torch.backends.cuda.enable_math_sdp(False)
    torch.backends.cuda.enable_flash_sdp(False)
    _, (query, key, value) = stored_as_in_the_model(4, 2, 16, 8)
    for new in (1, 3):
        ours = attention(query[:, :, -new:], key, value)
        assert relative_error(ours, attention_reference(query, key, value)[:, :, -new:]) < 2e-6
    assert not torch.backends.cuda.math_sdp_enabled()
    assert relative_error(attention(query, key, value), attention_reference(query, key, value)) < 2e-6


def best_here():
    return "cudnn" if torch.cuda.get_device_capability()[0] == 9 else "flash"


@gpu_test
@pytest.mark.parametrize("compiled", [False, True])
def test_the_architectures_backend_runs(compiled, switches_as_before):
    """By the profile of the device: cuDNN on Hopper, flash elsewhere; also where a compiled region was traced."""
    assert attention_that_runs(GPU) == best_here()
    shape = (12, 12, 512, 64)
    assert prefer_attention_backend("auto", GPU, torch.bfloat16, shape) == best_here()
    assert [getattr(torch.backends.cuda, f"{switch}_enabled")() for switch in SWITCHES.values()] == [
        name == best_here() for name in SWITCHES]
    packed, _ = stored_as_in_the_model(12, 12, 512, 64, GPU, torch.bfloat16)

    def loss(packed):
        return attention(*(part.transpose(1, 2) for part in packed.split((12, 12, 12), dim=2))).sum()

    run = torch.compile(loss, fullgraph=True, dynamic=False) if compiled else loss
    run(packed).backward()
    names = profiled_kernels(lambda: run(packed).backward(), GPU)
    assert backend_named_by(names) == best_here(), names
    assert attention_that_runs(GPU, dtype=torch.float32) == "efficient"


@gpu_test
@pytest.mark.parametrize("compiled", [False, True])
def test_masks_are_for_efficient_whatever_is_left_on(compiled, switches_as_before):
    """A switch that leaves one backend alone must not send masks to it, nor to the written-out formula."""
    prefer_attention_backend("auto", GPU, torch.bfloat16, (4, 2, 128, 64))
    packed, parts = stored_as_in_the_model(4, 2, 128, 64, GPU, torch.bfloat16)
    mask = document_mask(torch.arange(128, device=GPU)[None].expand(2, -1) % 50, torch.bfloat16)

    def masked(packed):
        return attention(*(part.transpose(1, 2) for part in packed.split((4, 2, 2), dim=2)), mask)

    run = torch.compile(masked, fullgraph=True, dynamic=False) if compiled else masked
    run(packed).sum().backward()
    names = profiled_kernels(lambda: run(packed).sum().backward(), GPU)
    assert backend_named_by(names) == "efficient", names
    assert relative_error(run(packed), attention_reference(*(part.float() for part in parts), mask)) < 1e-2


@gpu_test
@pytest.mark.parametrize("path", ["cudnn", "flash", "efficient", "math", "flash_attn"])
def test_a_backend_by_name_runs_on_a_gpu(path):
    """Or says beforehand why it does not."""
    if (refusal := attention_refusal(path, GPU)) is not None:
        pytest.skip(refusal)
    assert attention_that_runs(GPU, path) == path
    assert attention_that_runs(GPU, path, shape=(8, 2, 256, 64)) == path


@pytest.mark.parametrize("path", [pytest.param(name, marks=needs_gpu) for name in ("auto", *BACKENDS, "flash_attn")])
@pytest.mark.parametrize("heads", [(12, 12), (32, 4)])
def test_bf16_errs_at_most_twice_what_the_formula_does(path, heads):
    """Forward and backward against fp32, at the sizes of training; groups equal repeated heads."""
    if (refusal := attention_refusal(path, GPU)) is not None:
        pytest.skip(refusal)
    packed, parts = stored_as_in_the_model(*heads, 1024, 64, GPU, torch.bfloat16)
    wide = packed.detach().float().requires_grad_()
    exact_parts = [part.transpose(1, 2) for part in wide.split((heads[0], heads[1], heads[1]), dim=2)]
    gradient = torch.randn(2, 1024, heads[0], 64, device=GPU, dtype=torch.bfloat16).transpose(1, 2)
    ours = forward_and_backward(lambda *t: attention(*t, path=path), packed, parts, gradient)
    formula = forward_and_backward(lambda *t: attention(*t, path="math"), packed, parts, gradient)
    exact = forward_and_backward(attention_reference, wide, exact_parts, gradient)
    for one, math, reference in zip(ours, formula, exact, strict=True):
        assert relative_error(one, reference) <= 2 * relative_error(math, reference)
    assert path == "math" or ours[0].transpose(1, 2).is_contiguous()
    repeated = [parts[0], *(part.repeat_interleave(heads[0] // heads[1], dim=1) for part in parts[1:])]
    assert relative_error(ours[0], attention(*repeated, path=path)) < 1e-2
