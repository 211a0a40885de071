"""What runs our model: the engine, the same model in a plain loop, and its PyTorch paths under torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from megatron_ttl.bench.own_engine import build_engine, engine_paths, engine_words
from megatron_ttl.bench.training_loop import TrainingLoop
from megatron_ttl.bench.workload import Workload
from megatron_ttl.checkpoint.names import split_to_hf
from megatron_ttl.config.schema import ModelConfig
from megatron_ttl.errors import ConfigError
from megatron_ttl.kernels.cross_entropy import cross_entropy
from megatron_ttl.model import llama
from megatron_ttl.model.llama import build_model
from megatron_ttl.parallel.build import build_part
from megatron_ttl.parallel.pipeline import MicroBatches
from megatron_ttl.train.engine import Engine

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class EngineContender:
    """The engine of a run, called as the training loop calls it."""

    def __init__(self, workload: Workload) -> None:
        self._engine: Engine | None = build_engine(workload)
        self._lr = workload.run.optimizer.lr
        self._labels = workload.run.train.tokens_per_step if workload.all_labelled else None
        self.note = engine_words(workload)

    def step(self, micro_batches: MicroBatches) -> Tensor:
        """Take one optimizer step and return its mean loss, still on the device."""
        assert self._engine is not None
        return self._engine.train_step(micro_batches, self._lr, self._labels).loss

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
    if use_paths := getattr(llama, "use_paths", None):
        use_paths(model, paths)
    return TrainingLoop(model, mean_loss_of(model, paths.cross_entropy), workload,
                        f"the engine's model, {precision}, PyTorch's AdamW", masters=precision != "fp32")


def plain_loop(workload: Workload) -> TrainingLoop:
    """Build a packed Llama of plain PyTorch; compiled, on a GPU, with the attention backend that is fastest there."""
    precision, cuda = _precision(workload), workload.device.type == "cuda"
    model = build_model(workload.run.model, workload.run.run.seed, workload.device, DTYPES[precision])
    undo = prefer_cudnn_attention(workload.device)
    note = f"PyTorch, {precision}, fused AdamW, {'torch.compile' if cuda else 'not compiled on a CPU'}"
    called = torch.compile(model, dynamic=False) if cuda else model
    return TrainingLoop(model, mean_loss_of(called, "torch"), workload, note, masters=precision != "fp32", undo=undo)


def mean_loss_of(model: Callable[[Tensor], Tensor], path: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the mean loss of a micro batch whose labels all count."""
    return lambda input_ids, labels: cross_entropy(model(input_ids), labels, 1.0 / labels.numel(), path=path)


def prefer_cudnn_attention(device: torch.device) -> Callable[[], None]:
    """Leave cuDNN alone among PyTorch's attention backends on Hopper; return what takes it back.

    By the global switches: inside a compiled region a surrounding `sdpa_kernel` is not honoured by every version.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return lambda: None
    switches = torch.backends.cuda
    before = (switches.flash_sdp_enabled(), switches.mem_efficient_sdp_enabled(), switches.cudnn_sdp_enabled())

    def switch(flash: bool, efficient: bool, cudnn: bool) -> None:
        switches.enable_flash_sdp(flash)
        switches.enable_mem_efficient_sdp(efficient)
        switches.enable_cudnn_sdp(cudnn)

    switch(False, False, True)
    return partial(switch, *before)


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

