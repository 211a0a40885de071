"""AdamW by NVIDIA Apex's kernel: what it is handed. A stand-in computes what its source computes."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from megatron_ttl.kernels import adamw
from megatron_ttl.kernels.adamw import adamw_

HYPER = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "clipping": 1.0}


def multi_tensor_adam_capturable(chunk: int, noop: Tensor, lists: list[list[Tensor]], lr: Tensor, beta1: float,
                                 beta2: float, eps: float, step: Tensor, mode: int, bias_correction: int, decay: float,
                                 inv_scale: Tensor) -> None:
    """Do what the kernel of that name does, which reads these dtypes without asking."""
    assert (noop.dtype, step.dtype) == (torch.int32,) * 2 and (lr.dtype, inv_scale.dtype) == (torch.float32,) * 2
    assert chunk > 0 and mode == 1 and bias_correction == 1
    if noop.item() == 1:
        return
    corrections = 1 - beta1 ** step.item(), 1 - beta2 ** step.item()
    for gradient, weight, average, square in zip(*lists, strict=True):
        assert gradient.numel() <= 700
        gradient.mul_(inv_scale)
        average.mul_(beta1).add_(gradient, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        update = average / corrections[0] / ((square / corrections[1]).sqrt() + eps) + decay * weight
        weight.sub_(lr * update)


@pytest.mark.parametrize("squares", [9.0, 0.25, float("inf"), float("nan")])
def test_apex_gets_what_its_kernel_reads(squares: float, monkeypatch: pytest.MonkeyPatch) -> None:
    extension = ModuleType("amp_C")
    vars(extension)["multi_tensor_adam_capturable"] = multi_tensor_adam_capturable
    monkeypatch.setitem(sys.modules, "amp_C", extension)
    monkeypatch.setattr(adamw, "_APEX_ELEMENTS", 700)
    buffers = [torch.randn(2001) for _ in range(4)]
    buffers[3].abs_()
    results = {}
    for path in ("torch", "apex"):
        results[path] = [*(buffer.clone() for buffer in buffers), torch.ones(2001, dtype=torch.bfloat16)]
        adamw_(*results[path], lr=torch.tensor(1e-3), step=torch.tensor(3.0), squared_norm=torch.tensor(squares), **HYPER,
               zero=True, path=path)
    for ours, theirs in zip(results["torch"], results["apex"], strict=True):
        tolerance = 1e-2 if ours.dtype == torch.bfloat16 else 1e-6  # a rounding may go the other way
        torch.testing.assert_close(theirs, ours, rtol=tolerance, atol=tolerance)
    changed = not torch.equal(results["apex"][0], buffers[0])
    assert changed == (squares < 10) and torch.equal(
        results["apex"][4], results["apex"][0].bfloat16() if changed else torch.ones(2001, dtype=torch.bfloat16))
