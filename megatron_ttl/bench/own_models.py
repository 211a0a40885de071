"""What runs our model: the engine, the same model in a plain loop, and its PyTorch paths under torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ttl.bench.own_engine import (
    build_engine,
    engine_paths,
    engine_words,
    prefer_attention,
)
from megatron_ttl.bench.training_loop import TrainingLoop
from megatron_ttl.bench.workload import Workload
from megatron_ttl.checkpoint.names import split_to_hf
from megatron_ttl.config.schema import ModelConfig
from megatron_ttl.errors import ConfigError
from megatron_ttl.kernels.cross_entropy import IGNORED_LABEL, cross_entropy
from megatron_ttl.model.llama import build_model, use_paths
from megatron_ttl.parallel.build import build_part
from megatron_ttl.parallel.pipeline import MicroBatches
from megatron_ttl.train.engine import Engine
from megatron_ttl.train.engine_options import DTYPES


class EngineContender:
    """The engine of a run, called as the training loop calls it."""

    def __init__(self, workload: Workload) -> None:
        self._engine: Engine | None = build_engine(workload)
        self._lr = workload.run.optimizer.lr
        self._skipped: Any = False  # read one step late, as the training loop does, so that it runs no further ahead
        self._labels = workload.run.train.tokens_per_step if workload.all_labelled else None
        self.note = engine_words(workload)

    def step(self, micro_batches: MicroBatches) -> Tensor:
        """Take one optimizer step and return its mean loss, still on the device."""
        assert self._engine is not None
        result = self._engine.train_step(micro_batches, self._lr, self._labels)
        bool(self._skipped)
        self._skipped = result.skipped
        return result.loss

    def evaluate(self, input_ids: Tensor, labels: Tensor) -> float:
        """Return the nats of a micro batch, as an evaluation during training does."""
        assert self._engine is not None
        return self._engine.held_out_nats(input_ids, labels)

    def close(self) -> None:
        """Give the memory back."""
        if self._engine is not None:
            self._engine.close()
        self._engine = None


def bare_loop(workload: Workload) -> TrainingLoop:
    """Build the engine's model, on the same paths, in a plain loop."""
    precision = _precision(workload)
    paths = engine_paths(workload)
    model = build_part(workload.run, workload.mesh, workload.settings.profile.recompute, _no_pipeline, workload.eos_id)
    model = model.to(workload.device, DTYPES[precision])
    use_paths(model, paths)
    prefer_attention(workload)
    return TrainingLoop(model, mean_loss_of(model, paths.cross_entropy, workload.all_labelled), workload,
                        f"the engine's model, {precision}, PyTorch's AdamW", masters=precision != "fp32")


def plain_loop(workload: Workload) -> TrainingLoop:
    """Build a packed Llama of plain PyTorch; compiled, on a GPU, with the attention backend that is fastest there."""
    refuse_documents(workload)
    precision, device = _precision(workload), workload.device
    model = build_model(workload.run.model, workload.run.run.seed, device, DTYPES[precision])
    prefer_cudnn_attention(device)
    with torch.no_grad():  # the rotary tables are made now, and not by what is compiled
        model(torch.zeros((1, workload.run.train.sequence_length), dtype=torch.int64, device=device))
    called, how, undo = compiled_on_a_gpu(model, device)
    return TrainingLoop(model, mean_loss_of(called, "torch", workload.all_labelled), workload,
                        f"PyTorch, {precision}, fused AdamW, {how}", masters=precision != "fp32", undo=undo)


def mean_loss_of(model: Callable[[Tensor], Tensor], path: str, all_labelled: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the mean loss of a micro batch, over the labels that count."""
    if all_labelled:
        return lambda input_ids, labels: cross_entropy(model(input_ids), labels, 1.0 / labels.numel(), path=path)
    return lambda input_ids, labels: (cross_entropy(model(input_ids), labels, path=path)
                                      / (labels != IGNORED_LABEL).sum().clamp(min=1))


def prefer_cudnn_attention(device: torch.device) -> None:
    """Leave cuDNN alone among PyTorch's fused attention backends on Hopper, where it is the fastest.

    By the global switches, which every turn of a measurement finds as they were: inside a compiled region a surrounding
    `sdpa_kernel` is not honoured by every version.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9:
        torch.backends.cuda.enable_cudnn_sdp(True)
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)


def compiled_on_a_gpu(model: nn.Module, device: torch.device) -> tuple[Callable[..., Any], str, Callable[[], None] | None]:
    """Return what calls a model, what to say of it, and what forgets it again; a CPU compiles too long."""
    if device.type != "cuda":
        return model, "not compiled on a CPU", None
    return torch.compile(model, dynamic=False), "torch.compile", torch.compiler.reset


def refuse_documents(workload: Workload) -> None:
    """Let peers be compared in what they can do.

    Raises:
        ConfigError: the run keeps attention within documents.
    """
    if workload.eos_id is not None:
        raise ConfigError("data.document_mask: is true; this peer attends across documents; compare with it false")


@lru_cache(maxsize=1)
def initial_weights(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """Return the weights that a run begins with, on the host, by Hugging Face's names: all contenders begin alike."""
    found: dict[str, Tensor] = {}
    for name, tensor in build_model(config, seed).state_dict().items():
        found |= split_to_hf(name, tensor, config)
    return found


def _precision(workload: Workload) -> str:
    precision = workload.settings.profile.precision
    if precision == "fp16":
        raise ConfigError("fp16: the plain loops have no loss scale; they take bf16 or fp32; compare in bf16")
    return precision


def _no_pipeline(logits: Tensor, labels: Tensor) -> Tensor:
    raise AssertionError("one process has no stages")

