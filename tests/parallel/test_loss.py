"""Cross-entropy over a cut vocabulary against torch's over the whole, forward and backward."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from cuda_emulation import emulation

from megatron_ttl.parallel.loss import exact_loss_sum, loss_sum, most_probable, whole_vocabulary
from megatron_ttl.parallel.shard import tensor_parallel_of
from megatron_ttl.testing import run_distributed


def batch(vocab_size, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 7, vocab_size, generator=generator) * 4
    logits[0, 0] += 500.0  # a softmax without its maximum would overflow
    logits[0, 1, :-1] = -900.0
    logits[1, 3] = 1.0  # all alike: the lowest id is the most probable
    labels = torch.randint(vocab_size, (2, 7), generator=generator)
    labels[0, 3] = labels[1, 0] = -100
    labels[1, 1], labels[1, 2] = 0, vocab_size - 1
    return logits.to(dtype), labels


def cut_losses(mesh, vocab_size, share, dtype, path, scale):
    """Return loss, the gradient of this rank's logits, whose padding is poisoned; exact loss, best ids, all logits.

    And whether labels outside of the vocabulary are seen.
    """
    logits, labels = batch(vocab_size, dtype)
    parallel = tensor_parallel_of(mesh.cut(tensor=mesh.world_size))
    padded = F.pad(logits, (0, share * mesh.world_size - vocab_size), value=1e4)
    own = padded[..., share * mesh.rank : share * (mesh.rank + 1)].clone().requires_grad_()
    with torch.no_grad():  # before a gradient takes the place of the logits
        rest = (exact_loss_sum(own, labels, vocab_size, parallel), most_probable(own, vocab_size, parallel),
                whole_vocabulary(own[:, 2], vocab_size, parallel))
    with emulation() if path == "cuda" else nullcontext():
        with torch.no_grad():
            alone = loss_sum(own, labels, vocab_size, parallel, torch.tensor(scale), path)
        loss = loss_sum(own, labels, vocab_size, parallel, scale, path)
        (loss * 0.25).backward()
        assert torch.equal(loss.detach(), alone)
        outside = loss_sum(own.detach(), labels + vocab_size, vocab_size, parallel, path=path) if path == "cuda" else loss
    return loss.detach(), own.grad, *rest, outside.isnan().item()


@pytest.mark.parametrize(("world_size", "vocab_size", "share", "path"), [
    (2, 96, 48, "torch"), (2, 97, 56, "torch"), (4, 97, 32, "torch"), (4, 17, 8, "torch"),
    (2, 97, 56, "cuda"), (4, 17, 8, "cuda")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vocabulary_parallel_loss(world_size, vocab_size, share, path, dtype):
    """Also where a rank has padding alone (17 pieces on 4 ranks of 8)."""
    scale = 1.0 if path == "torch" else 0.5
    results = run_distributed(cut_losses, world_size, vocab_size, share, dtype, path, scale)
    logits, labels = batch(vocab_size, dtype)
    whole = logits.clone().requires_grad_()
    expected = F.cross_entropy(whole.flatten(0, 1).float(), labels.flatten(), reduction="sum") * scale
    (expected * 0.25).backward()
    exact = F.cross_entropy(logits.flatten(0, 1).double(), labels.flatten(), reduction="sum")
    gradient = torch.cat([gradient for _, gradient, *_ in results], dim=-1)
    for loss, _, precise, best, last, outside_seen in results:
        assert torch.equal(best, logits.argmax(-1)) and best[1, 3] == 0
        assert torch.equal(last, logits[:, 2])
        assert torch.equal(loss, results[0][0]) and loss.dtype == torch.float32
        assert outside_seen == (path == "cuda")
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=0)
        torch.testing.assert_close(precise, exact, rtol=1e-7, atol=0)
    torch.testing.assert_close(gradient[..., :vocab_size], whole.grad, rtol=0 if dtype == torch.float32 else 8e-3,
                               atol=1e-6)
    assert gradient[..., vocab_size:].abs().sum() == 0


def test_exact_loss_alone_equals_fp64():
    logits, labels = batch(97)
    expected = F.cross_entropy(logits.flatten(0, 1).double(), labels.flatten(), reduction="sum")
    torch.testing.assert_close(exact_loss_sum(logits, labels, 97), expected, rtol=1e-7, atol=0)
