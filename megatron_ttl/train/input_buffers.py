"""Micro batches on the device, in tensors that stay where they are: the next one arrives while the current one computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
_SLOTS = 2


class InputBuffers:
    """The current micro batch, and on a GPU two places where the next ones arrive on a stream of their own.

    Attributes:
        input_ids, labels: [b, s] int64; what lies in them changes with every micro batch, their place does not.
    """

    input_ids: Tensor
    labels: Tensor

    def __init__(self, device: torch.device) -> None:
        """Prepare; memory is taken when the first micro batch shows its shape."""
        self._device = device
        self._shape: torch.Size | None = None
        self._sent = 0
        self._arrivals: list[_Arrival] = []

    def fed(self, micro_batches: Sequence[Pair]) -> Iterator[None]:
        """Put one micro batch after the other into the buffers; whoever computes with one asks for the next afterwards.

        Args:
            micro_batches: input ids and labels on the host, [b, s] each, all of one shape; pinned memory is not waited for.
        """
        self._prepare(micro_batches[0][0].shape)
        if not self._arrivals:
            for input_ids, labels in micro_batches:
                self.input_ids.copy_(input_ids)
                self.labels.copy_(labels)
                yield
            return
        waiting = [self._send(micro_batches[0])]
        for following in [*micro_batches[1:], None]:
            if following is not None:
                waiting.append(self._send(following))
            waiting.pop(0).move_to(self.input_ids, self.labels)
            yield

    def _prepare(self, shape: torch.Size) -> None:
        if self._shape is not None:
            assert shape == self._shape, "what was recorded reads these very tensors"
            return
        self._shape = shape
        self.input_ids, self.labels = self._pair()
        if self._device.type == "cuda":
            stream = torch.cuda.Stream(self._device)
            self._arrivals = [_Arrival(self._pair(), stream) for _ in range(_SLOTS)]

    def _pair(self) -> Pair:
        assert self._shape is not None
        return (torch.zeros(self._shape, dtype=torch.int64, device=self._device),
                torch.zeros(self._shape, dtype=torch.int64, device=self._device))

    def _send(self, pair: Pair) -> _Arrival:
        arrival = self._arrivals[self._sent % _SLOTS]
        self._sent += 1
        arrival.send(pair)
        return arrival


class _Arrival:
    """A place on the GPU that the copying stream fills and the computing stream empties."""

    def __init__(self, tensors: Pair, stream: torch.cuda.Stream) -> None:
        self._tensors, self._stream = tensors, stream
        self._filled, self._emptied = torch.cuda.Event(), torch.cuda.Event()
        self._emptied.record()  # not before the zeros that it was made of

    def send(self, pair: Pair) -> None:
        """Begin to copy from the host, once the former micro batch has been taken out."""
        self._stream.wait_event(self._emptied)
        with torch.cuda.stream(self._stream):
            for mine, theirs in zip(self._tensors, pair, strict=True):
                mine.copy_(theirs, non_blocking=True)
            self._filled.record()

    def move_to(self, *tensors: Tensor) -> None:
        """Let the computing stream wait for the copy, and take it."""
        torch.cuda.current_stream().wait_event(self._filled)
        for mine, theirs in zip(self._tensors, tensors, strict=True):
            theirs.copy_(mine)
        self._emptied.record()
