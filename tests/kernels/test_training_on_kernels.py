"""A small model trained on the kernels: the losses of PyTorch's own optimizer, step by step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from megatron_ttl.kernels.adamw import accumulate_, accumulate_and_square_, adamw_, squared_norm
from megatron_ttl.kernels.build import KernelLibrary
from megatron_ttl.kernels.cross_entropy import cross_entropy
from megatron_ttl.model.llama import build_model
from megatron_ttl.testing import tiny_model

LR, CLIPPING, DECAY = 3e-3, 0.5, 0.1
HYPER = {"betas": (0.9, 0.95), "eps": 1e-8}


def batches(steps: int, seed: int) -> Tensor:
    """Return [steps, 2 micro batches, 2, 33] ids with something to learn: each is the one before plus a few."""
    source = torch.Generator().manual_seed(seed)
    jumps = torch.randint(1, 4, (steps, 2, 2, 33), generator=source)
    return jumps.cumsum(-1) % tiny_model().vocab_size


def backward(model: nn.Module, ids: Tensor) -> Tensor:
    """Return a micro batch's share of the loss; its gradients are in the parameters."""
    loss = cross_entropy(model(ids[:, :-1]), ids[:, 1:], scale=1 / (2 * ids[:, 1:].numel()))
    loss.backward()
    return loss.detach()


def in_groups(model: nn.Module) -> list[tuple[list[nn.Parameter], float]]:
    """Return matrices, which decay, and norms, which do not."""
    return [([p for p in model.parameters() if p.dim() > 1], DECAY), ([p for p in model.parameters() if p.dim() == 1], 0.0)]


def losses_of_pytorch(ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Train with torch.optim.AdamW."""
    model = build_model(tiny_model(), seed=5).to(dtype)
    optimizer = torch.optim.AdamW([{"params": params, "weight_decay": decay} for params, decay in in_groups(model)],
                                  lr=torch.tensor(LR).item(), **HYPER)
    losses = []
    for step in ids:
        losses.append(sum(backward(model, micro_batch) for micro_batch in step))
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIPPING)
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(losses)


def losses_over_flat_buffers(ids: Tensor, dtype: torch.dtype, path: str) -> Tensor:
    """Train with fp32 masters and gradients in flat buffers."""
    model = build_model(tiny_model(), seed=5)
    groups = in_groups(model)
    parameters = [parameter for group, _ in groups for parameter in group]
    sizes = [parameter.numel() for parameter in parameters]
    offsets = [sum(sizes[:place]) for place in range(len(sizes))]
    master = torch.cat([parameter.detach().flatten() for parameter in parameters])
    weights = master if dtype == torch.float32 else master.to(dtype)
    for parameter, offset, size in zip(parameters, offsets, sizes, strict=True):
        parameter.data = weights[offset : offset + size].view(parameter.shape)
    gradient, average, square = torch.full_like(master, float("nan")), torch.zeros_like(master), torch.zeros_like(master)
    losses, lr = [], torch.tensor(LR)
    for number, step in enumerate(ids, 1):
        total = torch.zeros(())
        for place, micro_batch in enumerate(step):
            total += backward(model, micro_batch)
            accumulate = accumulate_and_square_ if place else accumulate_
            squares = accumulate(gradient, [parameter.grad for parameter in parameters], offsets, place == 0, path)
            model.zero_grad()
        torch.testing.assert_close(squares, squared_norm(gradient, path), rtol=3e-7, atol=0)
        begin = 0
        for group, decay in groups:
            part = slice(begin, begin := begin + sum(parameter.numel() for parameter in group))
            adamw_(*(buffer[part] for buffer in (master, gradient, average, square)),
                   None if weights is master else weights[part], lr=lr, step=torch.tensor(float(number)),
                   squared_norm=squares, clipping=CLIPPING, **HYPER, weight_decay=decay, path=path)
        losses.append(total)
    return torch.stack(losses)


@pytest.mark.parametrize("path", ["torch", "cuda"])
@pytest.mark.parametrize("steps", [8, pytest.param(200, marks=pytest.mark.long)])
def test_losses_are_those_of_pytorchs_optimizer(path: str, steps: int, emulated_kernels: KernelLibrary) -> None:
    """In fp32 only the order differs in which squares are summed."""
    ids = batches(steps, seed=1)
    expected = losses_of_pytorch(ids, torch.float32)
    assert expected[-1] < 0.95 * expected[0]
    torch.testing.assert_close(losses_over_flat_buffers(ids, torch.float32, path), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("steps", [8, pytest.param(200, marks=pytest.mark.long)])
def test_masters_keep_bf16_near_fp32(steps: int, emulated_kernels: KernelLibrary) -> None:
    """bf16 weights with fp32 masters follow fp32; bf16 weights that are updated themselves lose what is small."""
    ids = batches(steps, seed=1)
    expected = losses_of_pytorch(ids, torch.float32)
    found = {path: losses_over_flat_buffers(ids, torch.bfloat16, path) for path in ("torch", "cuda")}
    torch.testing.assert_close(found["cuda"], found["torch"], rtol=1e-2, atol=0)
    torch.testing.assert_close(found["cuda"], expected, rtol=1e-2, atol=0)
    if steps > 100:
        without = losses_of_pytorch(ids, torch.bfloat16)[-20:].float().mean() - expected[-20:].mean()
        assert without > 5 * (found["cuda"][-20:].mean() - expected[-20:].mean()).abs()
