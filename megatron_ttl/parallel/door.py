"""The one door to DeepSpeed: whoever needs it takes it from here, set up the way this project needs it."""

from __future__ import annotations

import logging
import os
import warnings

import torch

# Left to itself DeepSpeed guesses, and says so in a warning on every machine without a GPU.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
# Its banners are for its developers; warnings and errors still come through.
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
# deepspeed 0.19.8 at stage 3 calls collectives that torch 2.13 has renamed; one warning per call.
warnings.filterwarnings("ignore", message=".*_tensor. is deprecated.*_single.*", category=FutureWarning)

import deepspeed  # noqa: E402
import deepspeed.ops  # noqa: E402
from deepspeed.runtime.pipe.module import LayerSpec, PipelineModule  # noqa: E402
from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology  # noqa: E402

# deepspeed 0.19.8: this op is compiled at first use, leaves 66 MiB in /dev/shm per rank and run, and only serves
# inference. Declared incompatible, it is never touched.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

__all__ = ["LayerSpec", "PipeModelDataParallelTopology", "PipelineModule", "PipelineParallelGrid", "deepspeed"]
