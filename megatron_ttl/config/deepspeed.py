"""The machine profile (DeepSpeed JSON): the keys we honour, who owns the others, what DeepSpeed receives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from megatron_ttl.config.checks import Fault, accumulation
from megatron_ttl.config.kernels import KernelsConfig
from megatron_ttl.config.schema import Section

if TYPE_CHECKING:
    from megatron_ttl.config.load import Settings

_NEVER = 2**31 - 1  # steps_per_print: the lines of a run are ours


class OffloadConfig(Section):
    """Keep the optimizer's state in host memory, and update it there."""

    device: Literal["cpu"]
    """The host's memory."""
    pin_memory: bool = False
    """Page-locked: copies are quicker, and the host cannot use the memory for anything else."""


class ZeroConfig(Section):
    """How the state of the training is spread over the processes. Left out: DeepSpeed's own default."""

    stage: int = Field(ge=0, le=3)
    """0 nothing, 1 moments, 2 gradients too, 3 weights too. Use 1 on one process as well."""
    overlap_comm: bool | None = None
    """Reduce gradients while the backward pass is still running."""
    contiguous_gradients: bool | None = None
    """Copy gradients into one buffer as they appear."""
    reduce_scatter: bool | None = None
    """Stage 3: reduce-scatter instead of all-reduce; DeepSpeed 0.19.8 all-reduces at stages 1 and 2 either way."""
    reduce_bucket_size: int | None = Field(default=None, gt=0, le=2**40)
    """Elements reduced at a time."""
    allgather_bucket_size: int | None = Field(default=None, gt=0, le=2**40)
    """Elements gathered at a time."""
    stage3_prefetch_bucket_size: int | None = Field(default=None, ge=0, le=2**40)
    """Stage 3: elements fetched ahead of use."""
    stage3_param_persistence_threshold: int | None = Field(default=None, ge=0, le=2**40)
    """Stage 3: weights smaller than this stay whole on every process."""
    stage3_max_live_parameters: int | None = Field(default=None, ge=0, le=2**40)
    """Stage 3: elements that may be whole at a time."""
    offload_optimizer: OffloadConfig | None = None
    """Masters and moments on the host, 12 bytes per parameter; at stages 2 and 3 the sums of gradients too, 4 more."""


class Bf16Config(Section):
    """bfloat16 weights and activations over fp32 master weights."""

    enabled: bool
    """true: bf16; false, or no such section: fp32."""


class Fp16Config(Section):
    """fp16 weights and activations over fp32 master weights, for GPUs older than A100; the loss is scaled up so that
    small gradients survive, and a step whose gradients overflow is skipped and lowers the scale.
    """

    enabled: bool
    """true: fp16; false, or no such section: bf16 or fp32."""
    initial_scale_power: int = Field(default=16, ge=0, le=32)
    """The scale begins at 2 to this power."""
    loss_scale_window: int = Field(default=1000, gt=0)
    """Steps without overflow after which the scale is doubled."""
    hysteresis: int = Field(default=2, gt=0)
    """Overflows that are let pass before the scale is halved."""
    min_loss_scale: float = Field(default=1.0, gt=0)
    """Below this the run ends: the gradients overflow by themselves."""


class DataTypesConfig(Section):
    """Number formats inside the engine."""

    grad_accum_dtype: Literal["fp32"] = "fp32"
    """Gradients are added up in fp32; sums in bf16 or fp16 lose the small ones."""


class ParallelConfig(Section):
    """How the machine is cut; read and removed before DeepSpeed sees the file."""

    tensor: int = Field(default=1, gt=0)
    """Processes that share every layer; they should share a machine. What both degrees leave is data parallel."""
    pipeline: int = Field(default=1, gt=0)
    """Stages of consecutive layers, through which micro batches flow."""
    sequence: bool = False
    """Share out the tokens of norms and residual stream among tensor-parallel ranks: less memory, same traffic."""
    replica_check_steps: int | None = Field(default=1000, gt=0)
    """Compare the copies of weights by checksum after every so many steps and before every save; null: never."""


class WatchdogConfig(Section):
    """When a run that no longer moves is ended, status 70, with the stacks of all processes; null: never."""

    set_up_s: float | None = Field(default=1800, gt=0)
    """Seconds from the start to the first step, and from the last one to the end."""
    step_s: float | None = Field(default=1800, gt=0)
    """Seconds of one micro batch with its data; with a pipeline of one step."""
    save_s: float | None = Field(default=1800, gt=0)
    """Seconds that the training waits for a checkpoint."""
    evaluate_s: float | None = Field(default=1800, gt=0)
    """Seconds of one batch of held-out text."""

    @property
    def longest_s(self) -> float:
        """The longest limit: collectives wait a little longer, so that the watchdog speaks first."""
        limits = (self.set_up_s, self.step_s, self.save_s, self.evaluate_s)
        return 30 * 86_400 if None in limits else max(limit for limit in limits if limit is not None)


class DataLoaderConfig(Section):
    """How the training data are read: the same samples in the same order, whatever stands here."""

    preload: bool = False
    """Read all training data into memory first, for slow disks: on every process as many bytes as the `.bin` files have."""
    verify: bool = True
    """Compare data above 256 MiB with their checksums in the background; smaller ones always are, when opened."""


def _no_number(value: Any) -> Any:
    """Return 1 and 0 as texts, for they are equal to true and false and no choice."""
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


class DeepSpeedProfile(Section):
    """The keys of the DeepSpeed JSON that we honour: what changes speed and memory, never the loss curve."""

    train_micro_batch_size_per_gpu: int = Field(gt=0)
    """Sequences that one process computes at a time."""
    zero_optimization: ZeroConfig
    bf16: Bf16Config | None = None
    data_types: DataTypesConfig | None = None
    fp16: Fp16Config | None = None
    communication_data_type: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format in which gradients travel between processes."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in the backward pass to save memory: outputs of norms and SwiGLU, or whole blocks."""
    wall_clock_breakdown: bool = False
    """Time the parts of a step; it waits for the device, so the run is slower."""
    engine: Literal["auto", "deepspeed", "flat"] = "auto"
    """Who steps: `flat` keeps the state of one process in flat buffers and never waits for the device; `auto` is flat on
    one GPU with bf16 or fp32 and without offloading or wall_clock_breakdown, DeepSpeed otherwise."""
    compile: bool = False
    """Compile the blocks with torch.compile; the first step takes minutes."""
    cuda_graphs: Annotated[Literal["auto", True, False], BeforeValidator(_no_number)] = "auto"
    """Record the flat engine's step once and replay it; `auto` does on a GPU where a micro batch has at most 16,384
    tokens and data.document_mask is false, and goes on without where it fails."""
    kernels: KernelsConfig = Field(default_factory=KernelsConfig)
    parallel: ParallelConfig | None = None
    watchdog: WatchdogConfig | None = None
    data_loader: DataLoaderConfig | None = None

    @property
    def precision(self) -> Literal["bf16", "fp16", "fp32"]:
        """Number format of weights and activations in the forward and backward pass."""
        if self.bf16 is not None and self.bf16.enabled:
            return "bf16"
        return "fp16" if self.fp16 is not None and self.fp16.enabled else "fp32"

    @property
    def cut(self) -> ParallelConfig:
        """The degrees, given or not."""
        return self.parallel or ParallelConfig()

    @property
    def time_limits(self) -> WatchdogConfig:
        """When a run that hangs is ended, given or not."""
        return self.watchdog or WatchdogConfig()

    @property
    def reading(self) -> DataLoaderConfig:
        """How the training data are read, given or not."""
        return self.data_loader or DataLoaderConfig()


_AUTO = "absent or \"auto\""
_RUN_OWNED = {
    "optimizer": "[optimizer] of the run file owns it",
    "scheduler": "[schedule] of the run file owns it",
    "gradient_clipping": "train.gradient_clipping of the run file owns it",
    "train_batch_size": "train.tokens_per_step of the run file owns it",
    "gradient_accumulation_steps": "it is derived from train.tokens_per_step of the run file",
    "steps_per_print": "log.every_steps of the run file owns it",
}
_NOT_OFFERED = {
    "torch_autocast": "bf16 with fp32 master weights is offered instead: {\"bf16\": {\"enabled\": true}}",
    "activation_checkpointing": "\"recompute\": \"selective\" or \"full\" does it, with any layout",
    "tensor_parallel": "the degrees stand in \"parallel\": {\"tensor\": 2, \"pipeline\": 1}",
    "pipeline": "the degrees stand in \"parallel\": {\"tensor\": 1, \"pipeline\": 2}",
    "sequence_parallel_size": "sequence parallelism is \"parallel\": {\"tensor\": 2, \"sequence\": true}",
    "parallel.data": "the processes that tensor and pipeline leave are data parallel",
    "checkpoint": "[checkpoint] of the run file and our own store keep the run",
    "wandb": "log.wandb of the run file owns it",
    "tensorboard": "log.tensorboard of the run file owns it",
    "csv_monitor": "metrics.jsonl in the run folder has every figure",
    "comet": "metrics.jsonl in the run folder has every figure",
    "flops_profiler": "the log line and metrics.jsonl give the MFU, from counted matrix products",
    "comms_logger": "it is not offered in this release",
    "autotuning": "it is not offered in this release",
    "data_efficiency": "the order of the data is a function of run.seed of the run file",
    "seed": "run.seed of the run file owns it",
    "timers": "DeepSpeed's throughput timer waits for the device in every micro step and is always off",
    "zero_allow_untested_optimizer": "it is set by us",
    "prescale_gradients": "it is not offered in this release",
    "gradient_predivide_factor": "it is not offered in this release",
    "gradient_allreduce_op": "gradients are averaged",
    "dump_state": "`tools/show_config.py` prints the settings",
    "memory_breakdown": "the log line and metrics.jsonl give the memory",
    "dataloader_drop_last": "the samples of a step are a function of run.seed of the run file",
    "aio": "offloading to disks is not offered",
    "zero_optimization.offload_param": "only the optimizer is offloaded; stage 3 spreads the weights",
    "zero_optimization.cpu_offload": "it is called zero_optimization.offload_optimizer today",
    "zero_optimization.compute_grad_norm": "the norm is logged and clipped, so it is always computed",
    "zero_optimization.allgather_partitions": "it stays at DeepSpeed's default",
    "zero_optimization.round_robin_gradients": "it is not offered in this release",
    "zero_optimization.sub_group_size": "it is not offered in this release",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save":
        "our own checkpoint store gathers the weights",
    "data_types.param_dtype": "\"bf16\" and \"fp16\" decide it",
}
_REMOVED = (
    "nebula", "compression_training", "amp", "quantize_training", "sparse_gradients", "eigenvalue",
    "sparse_attention", "elasticity", "graph_harvesting", "curriculum_learning", "progressive_layer_drop",
    "zero_optimization.mics_shard_size", "zero_optimization.mics_hierarchical_params_gather",
    "zero_optimization.zeropp_loco_param",
)
OWNED_KEYS = tuple(_RUN_OWNED)
NOTES = ("_comment", "_device")


def take_notes_and_owned(raw: dict[str, Any]) -> tuple[dict[str, Any], list[Fault]]:
    """Return the JSON without its notes and without the keys of others, and the faults these have."""
    kept, faults = dict(raw), []
    for key, value in raw.items():
        section = isinstance(value, dict)
        if key in _RUN_OWNED:
            del kept[key]
            if value != "auto":
                faults.append((key, f"has a value; must be {_AUTO}: {_RUN_OWNED[key]}; remove it here and "
                               "set it there"))
        elif key == "_comment":
            del kept[key]
            if any(not isinstance(text, str) for text in (value if isinstance(value, list) else [value])):
                faults.append((key, "is neither text nor a list of texts; must be one of them; rewrite it"))
        elif key == "_device":
            del kept[key]
            if not isinstance(value, str):
                faults.append((key, "is no text; must name the accelerator; e.g. \"A100\""))
        elif (sentence := _refusal(key)):
            del kept[key]
            faults.append((key, sentence))
        elif section:
            kept[key] = dict(value)
            for inner in value:
                if (sentence := _refusal(f"{key}.{inner}")):
                    del kept[key][inner]
                    faults.append((f"{key}.{inner}", sentence))
    return kept, faults


def _refusal(key: str) -> str:
    if key in _REMOVED:
        return "was removed from DeepSpeed in 0.19.8; must be absent; remove it"
    why = _NOT_OFFERED.get(key)
    return f"is not available here; must be absent: {why}; remove it" if why else ""


def profile_faults(profile: DeepSpeedProfile, wrong: frozenset[str]) -> list[Fault]:
    """Return the faults between the keys of a profile; keys that are `wrong` by themselves are left out."""
    faults: list[Fault] = []
    if not wrong & {"bf16", "bf16.enabled", "fp16", "fp16.enabled"}:
        faults += _precision_faults(profile, wrong)
    if wrong & {"zero_optimization", "zero_optimization.stage"}:
        return faults
    stage, offload = profile.zero_optimization.stage, "zero_optimization.offload_optimizer"
    if stage == 0 and offload not in wrong and profile.zero_optimization.offload_optimizer is not None:
        faults.append((offload, "is given with stage 0; needs stage 1, 2 or 3: DeepSpeed ignores it otherwise; raise "
                       "zero_optimization.stage"))
    if not wrong & {"parallel", "parallel.pipeline"} and profile.cut.pipeline > 1 and stage > 1:
        faults.append(("zero_optimization.stage", f"is {stage} with parallel.pipeline {profile.cut.pipeline:,}; must "
                       "be 0 or 1 there: a stage adds up gradients over all micro batches before it reduces them, so "
                       "DeepSpeed forbids spreading them; set it to 1, or pipeline to 1"))
    return faults


def _precision_faults(profile: DeepSpeedProfile, wrong: frozenset[str]) -> list[Fault]:
    faults: list[Fault] = []
    precision = profile.precision
    stage_is_known = not wrong & {"zero_optimization", "zero_optimization.stage"}
    if precision == "bf16" and profile.fp16 is not None and profile.fp16.enabled:
        faults.append(("fp16.enabled", "is true, and so is bf16.enabled; only one may be; use bf16 on A100 and newer, "
                       "fp16 on older GPUs"))
    if precision != "fp32" and stage_is_known and profile.zero_optimization.stage == 0:
        faults.append(("zero_optimization.stage", f"is 0 with {precision}; must be 1, 2 or 3: DeepSpeed's stage 0 "
                       f"makes an empty optimizer step first in {precision}, so Adam counts its first step twice; "
                       "use stage 1, which takes the same memory on one process"))
    if "communication_data_type" in wrong:
        return faults
    travel = profile.communication_data_type
    if travel not in ("fp32", precision):
        article, also = {"bf16": ("a", ' or "bf16"'), "fp16": ("an", ' or "fp16"'), "fp32": ("an", "")}[precision]
        faults.append(("communication_data_type", f'is "{travel}" in {article} {precision} run; must be "fp32"{also} '
                       f"there, or gradients are rounded on their way; remove it or enable {travel}"))
    return faults


def resolve_deepspeed(settings: Settings, data_parallel_size: int) -> dict[str, Any]:
    """Return the one dict that `deepspeed.initialize` receives.

    Raises:
        ConfigError: tokens_per_step is no multiple of micro batch x sequence x data_parallel_size.
    """
    profile, run = settings.profile, settings.run
    passes = accumulation(settings, data_parallel_size)
    precision = profile.precision
    resolved: dict[str, Any] = {
        "train_batch_size": run.samples_per_step,
        "train_micro_batch_size_per_gpu": profile.train_micro_batch_size_per_gpu,
        "gradient_accumulation_steps": passes,
        "gradient_clipping": run.train.gradient_clipping,
        "zero_optimization": profile.zero_optimization.model_dump(exclude_none=True),
        "bf16": {"enabled": precision == "bf16"},
        "communication_data_type": profile.communication_data_type,
        "steps_per_print": _NEVER,
        "wall_clock_breakdown": profile.wall_clock_breakdown,
        "zero_allow_untested_optimizer": True,
        # DeepSpeed's throughput timer waits for the device twice in every micro step; our line needs none.
        "timers": {"throughput": {"enabled": False, "synchronized": False}},
    }
    if precision == "fp16":
        assert profile.fp16 is not None
        resolved["fp16"] = {**profile.fp16.model_dump(), "loss_scale": 0}  # 0: found and adapted
    if precision != "fp32":
        # DeepSpeed's own default adds gradients up in the precision of the weights.
        resolved["data_types"] = {"grad_accum_dtype": "fp32"}
    if profile.zero_optimization.offload_optimizer is not None:
        resolved["zero_force_ds_cpu_optimizer"] = False  # torch's AdamW needs no compiler
    return resolved
