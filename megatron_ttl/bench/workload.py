"""What is trained in a measurement: settings from the same files as a run's, and tokens that need no dataset."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_ttl.config.deepspeed import resolve_deepspeed
from megatron_ttl.config.degrees import device_faults
from megatron_ttl.config.load import Settings, load_settings
from megatron_ttl.config.read import parse_json, read_text
from megatron_ttl.config.schema import RunFile
from megatron_ttl.data.sampler import SampleSource, StepBatches
from megatron_ttl.errors import ConfigError, raise_faults
from megatron_ttl.model.flops import flops_per_token
from megatron_ttl.parallel.mesh import Mesh, join, leave
from megatron_ttl.runtime import Ranks
from megatron_ttl.train.device_peaks import model_flops_utilisation, peak_flops_per_s
from megatron_ttl.train.open_data import open_data, preload

SMALL_RUN = """
[run]
dir = "nothing-is-written-here"
[model]
hidden_size = 128
intermediate_size = 384
num_hidden_layers = 3
num_attention_heads = 4
num_key_value_heads = 2
vocab_size = 2048
max_position_embeddings = 128
[data]
sources = [{ prefix = "synthetic" }]
[train]
sequence_length = 128
tokens_per_step = 2048
steps = 1000
gradient_clipping = 1.0
[optimizer]
lr = 1e-3
[schedule]
kind = "cosine"
warmup_steps = 10
[checkpoint]
every_steps = 1000
[energy]
enabled = false
"""
"""A model of a second on a CPU; what is measured where no run file is given."""


@dataclass(frozen=True)
class Workload:
    """A run's settings on one process, and where its samples come from."""

    settings: Settings
    mesh: Mesh
    source: SampleSource
    eos_id: int | None = None
    """What ends a document, where the run keeps attention within documents."""
    all_labelled: bool = True

    @property
    def run(self) -> RunFile:
        """The checked run file."""
        return self.settings.run

    @property
    def micro_batch(self) -> int:
        """Sequences that are computed at a time."""
        return self.settings.profile.train_micro_batch_size_per_gpu

    @property
    def accumulation(self) -> int:
        """Micro batches of a step."""
        return self.run.samples_per_step // self.micro_batch

    @property
    def device(self) -> torch.device:
        """Where it is computed."""
        return self.mesh.device

    def batches(self) -> StepBatches:
        """Return the steps of the run from its first on, read ahead as the training does; close it."""
        return StepBatches(self.source, self.run.samples_per_step, self.micro_batch, 0, 1, 0,
                           pin_memory=self.device.type == "cuda")

    def utilisation(self, tokens_per_s: float) -> float | None:
        """Return the MFU by formula C; None where the device's peak is unknown."""
        peak = peak_flops_per_s(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else None
        return model_flops_utilisation(tokens_per_s, flops_per_token(self.run.model, self.run.train.sequence_length), peak)

    def facts(self) -> dict[str, Any]:
        """Return what a figure depends on."""
        model = self.run.model
        return {"device": device_name(self.device), "torch": torch.__version__,
                "model": f"h {model.hidden_size}, f {model.intermediate_size}, L {model.num_hidden_layers}, "
                         f"heads {model.num_attention_heads}/{model.num_key_value_heads}, v {model.vocab_size}",
                "sequence_length": self.run.train.sequence_length, "micro_batch": self.micro_batch,
                "accumulation": self.accumulation, "tokens_per_step": self.run.train.tokens_per_step,
                "precision": self.settings.profile.precision}


class SyntheticTokens:
    """Samples without a dataset: few ids are frequent, many rare, so that there is something to learn."""

    def __init__(self, vocab_size: int, sequence_length: int, seed: int = 0) -> None:
        self._vocab_size, self._length, self._seed = vocab_size, sequence_length, seed

    def samples(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (input_ids, labels), int64; a sample is a function of its number.  # [len(numbers), s] both"""
        drawn = np.stack([np.random.default_rng((self._seed, int(number))).random(self._length + 1, dtype=np.float32)
                          for number in numbers])
        ids = np.minimum((self._vocab_size * drawn**3).astype(np.int64), self._vocab_size - 1)
        return np.ascontiguousarray(ids[:, :-1]), np.ascontiguousarray(ids[:, 1:])


def device_name(device: torch.device) -> str:
    """Return what the device calls itself."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def base_profile(deepspeed_config: str | os.PathLike[str] | None, micro_batch: int | None = None) -> dict[str, Any]:
    """Return the content of a machine profile, or a plain one of this machine: bf16 on a GPU, fp32 elsewhere.

    Raises:
        ConfigError: the file cannot be read, or is no JSON object.
    """
    profile: dict[str, Any] = {"train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": 1}}
    if torch.cuda.is_available():
        profile["bf16"] = {"enabled": True}
    if deepspeed_config is not None:
        text, faults = read_text(Path(deepspeed_config), "a DeepSpeed configuration in JSON", "--deepspeed_config")
        profile, broken = parse_json(text, Path(deepspeed_config)) if text else ({}, [])
        raise_faults(ConfigError, [*faults, *broken])
    return profile | ({"train_micro_batch_size_per_gpu": micro_batch} if micro_batch is not None else {})


def load_workload_settings(profile: dict[str, Any], run_config: str | os.PathLike[str] | None = None,
                           overrides: Sequence[str] = (), name: str = "machine profile") -> Settings:
    """Return checked settings of a profile's content and a run file; without one, of a small model.

    Args:
        profile: as a DeepSpeed JSON holds it.
        run_config: run file.
        overrides: `section.key=value` of the run file.
        name: what faults call the profile.

    Raises:
        ConfigError: with every fault, or the profile is cut over several processes.
    """
    with tempfile.TemporaryDirectory() as folder:
        profile_path, run_path = Path(folder) / "profile.json", Path(folder) / "small.toml"
        profile_path.write_text(json.dumps(profile), encoding="utf-8")
        run_path.write_text(SMALL_RUN, encoding="utf-8")
        try:
            settings = load_settings(profile_path, run_config or run_path, overrides)
        except ConfigError as error:
            raise ConfigError(*(fault.replace(str(profile_path), name) for fault in error.faults)) from None
    settings = replace(settings, deepspeed_path=Path(name))
    cut = settings.profile.cut
    if cut.tensor * cut.pipeline > 1:
        raise ConfigError(f"{name}: parallel: tensor {cut.tensor}, pipeline {cut.pipeline}; both must be 1, for one process "
                          "is measured; take a profile of one device")
    resolve_deepspeed(settings, 1)  # the accumulation must come out whole
    return settings


@contextlib.contextmanager
def opened(settings: Settings, data: bool = False) -> Iterator[Workload]:
    """Join as one process, open what the samples come from, and part again.

    Args:
        settings: from `load_workload_settings`.
        data: take the run's own data instead of synthetic tokens.

    Raises:
        DataError: the run's data cannot be used.
    """
    run = settings.run
    raise_faults(ConfigError, device_faults(settings, torch.cuda.is_available()))
    mesh = join(Ranks())
    try:
        if data:
            dataset, _ = open_data(run)
            if settings.profile.reading.preload:
                preload(dataset, 1)
            yield Workload(settings, mesh, dataset, dataset.eos_id, dataset.all_labelled)
        else:
            yield Workload(settings, mesh, SyntheticTokens(run.model.vocab_size, run.train.sequence_length, run.run.seed))
    finally:
        leave()
