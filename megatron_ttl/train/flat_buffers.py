"""The state of one process in flat buffers: one kernel passes over all weights, and no launch is paid per tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from megatron_ttl.checkpoint.state import WEIGHTS

_ALIGNMENT = 128  # elements: every weight begins on a boundary of 256 bytes in bf16, as freshly allocated memory does


class FlatBuffers:
    """Weights, fp32 masters, moments and sums of gradients, one buffer each; a `TrainedState`.

    Between the weights lie a few elements that belong to none: their gradients are zero, and so they stay.

    Attributes:
        weights: [N] in the training's dtype; the module's parameters are views of it.
        master: [N] fp32; in fp32 the weights themselves.
        gradient, exp_avg, exp_avg_sq: [N] fp32.
        updates: [] fp32, on the device: updates that moved the weights.
        parameters, offsets: the module's parameters, and where each begins.
        groups: (range, weight decay) of the elements that decay alike; together they are everything.
    """

    def __init__(self, module: nn.Module, decay_groups: list[dict], dtype: torch.dtype, device: torch.device) -> None:
        """Move a module's fp32 parameters into buffers on a device, and make them views.

        Args:
            module: freshly drawn, on the host.
            decay_groups: from `parameter_groups`.
            dtype: of weights and activations.
            device: where the buffers lie.
        """
        self.parameters: list[Tensor] = []
        self.offsets: list[int] = []
        self.groups: list[tuple[slice, float]] = []
        end = 0
        for group in decay_groups:
            start = end
            for parameter in group["params"]:
                self.parameters.append(parameter)
                self.offsets.append(end)
                end += -(-parameter.numel() // _ALIGNMENT) * _ALIGNMENT
            self.groups.append((slice(start, end), group["weight_decay"]))
        self.master, self.gradient, self.exp_avg, self.exp_avg_sq = (torch.zeros(end, device=device) for _ in range(4))
        self.weights = self.master if dtype == torch.float32 else torch.zeros(end, dtype=dtype, device=device)
        self.updates = torch.zeros((), device=device)
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        self._places = {names[id(parameter)]: (offset, parameter.shape)
                        for parameter, offset in zip(self.parameters, self.offsets, strict=True)}
        drawn = {name: parameter.detach() for name, parameter in module.named_parameters()}
        assert drawn.keys() == self._places.keys()
        self.write(WEIGHTS, drawn.__getitem__)
        for name, parameter in module.named_parameters():
            parameter.data = self._view(self.weights, name)

    @property
    def low_precision(self) -> Tensor | None:
        """The rounded copy of the masters that forward and backward pass read; None in fp32."""
        return None if self.weights is self.master else self.weights

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every weight by the model's own name."""
        return {name: tuple(shape) for name, (_, shape) in self._places.items()}

    def read(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """Yield name and fp32 copy, on the host, of every weight or moment."""
        for name in self._places:
            yield name, self._view(self._buffer(kind), name).to("cpu", copy=True)

    @torch.no_grad()
    def write(self, kind: str, tensor_of: Callable[[str], Tensor]) -> None:
        """Set every weight, masters and rounded copies, or moment."""
        for name in self._places:
            wide = self._view(self._buffer(kind), name)
            wide.copy_(tensor_of(name))
            if kind == WEIGHTS and self.low_precision is not None:
                self._view(self.weights, name).copy_(wide)

    def set_step(self, step: int) -> None:
        """Say how many updates the moments have seen."""
        self.updates.fill_(step)

    def _buffer(self, kind: str) -> Tensor:
        return {WEIGHTS: self.master, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}[kind]

    def _view(self, buffer: Tensor, name: str) -> Tensor:
        offset, shape = self._places[name]
        return buffer[offset : offset + shape.numel()].view(shape)
