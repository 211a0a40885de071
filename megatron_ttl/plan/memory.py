"""How much GPU memory a process needs at the worst moment of a step, and the largest micro batch that fits.

A step is followed from moment to moment: the loss, the backward pass of the head and of each block, the end of the backward
pass, the update. At each there are

- states: weights, fp32 gradient sums, masters and moments;
- gradients of one micro batch, in the precision of the weights, until they are added to the sums;
- activations that are still needed, of all micro batches that are under way in a pipeline;
- logits, and their gradient where it does not take their place;
- what the operation at work takes beyond that ("transient");
- buffers: rotary tables, document mask, ZeRO's buckets and gathered weights, tensors between stages, cuBLAS's workspace;

and beside PyTorch's peak a reserve: CUDA context, NCCL, what lies idle between blocks of the allocator or in recorded CUDA
graphs. No torch: `--dry-run` must be quick.

The forecast is for eager mode; `torch.compile` may keep more or less. Activations, logits, gradients and transients are
compared with counted storages of real steps by the tests, reserve and workspaces are assumptions (named below).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from megatron_ttl.config.engine import records_graphs
from megatron_ttl.config.load import Settings
from megatron_ttl.config.schema import ModelConfig
from megatron_ttl.parallel.plan import Layout, stage_bounds
from megatron_ttl.plan import activations
from megatron_ttl.plan.activations import FUSED, IDS, Paths
from megatron_ttl.plan.layout_costs import BYTES, layout_for, parameters_on, runs_flat, state_bytes

CUBLAS_WORKSPACE = 32 * 2**20
"""On Hopper, 8 MiB and less before. Source: cuBLAS' documentation of cublasSetWorkspace, whose advice PyTorch takes."""
CUDA_CONTEXT = 600 * 2**20
"""Driver and loaded kernels, which PyTorch does not count: an assumption. Its reports of exhausted memory show 0.4 to
0.5 GiB of "non-PyTorch memory"."""
NCCL_BUFFERS = 512 * 2**20
"""Where there is more than one process: an assumption."""
FRAGMENTATION = 0.03
"""Share of everything but the states that the allocator cannot use: an assumption."""

_BUCKET = 500_000_000  # elements: DeepSpeed's default of reduce_bucket_size, and of its plain all-reduce
_LIVE = 1_000_000_000  # elements: DeepSpeed's default of stage3_max_live_parameters
_UPDATED = 2**24  # elements that kernels/adamw.py updates at a time in PyTorch on a GPU
_MOST_SAMPLES = 2**20


@dataclass(frozen=True)
class MemoryForecast:
    """One process at the worst moment of a step, in bytes."""

    stage: int
    """Of the pipeline."""
    moment: str
    states: int
    gradients: int
    activations: int
    logits: int
    transient: int
    buffers: int
    reserve: int

    @property
    def allocated(self) -> int:
        """What PyTorch's allocator hands out: `torch.cuda.max_memory_allocated()`."""
        return self.needed - self.reserve

    @property
    def needed(self) -> int:
        """What the device must have for the process."""
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, int]:
        """Every part by its name."""
        return {name: getattr(self, name) for name in
                ("states", "gradients", "activations", "logits", "transient", "buffers", "reserve")}


def peak_memory(settings: Settings, world_size: int, paths: Paths | None = None) -> MemoryForecast:
    """Return the forecast of the process that needs most.

    Args:
        settings: from `load_settings`; their tokens per step need not be a multiple of the micro batch.
        world_size: number of processes, one per GPU.
        paths: which implementations run; without it those that the profile asks for, and for "auto" the CUDA kernels.

    Raises:
        ConfigError: the degrees do not divide the processes.
    """
    return max(memory_of_stages(settings, world_size, paths), key=lambda forecast: forecast.needed)


def fits(settings: Settings, world_size: int, device_memory_bytes: int, paths: Paths | None = None) -> bool:
    """Return whether every process is forecast to fit into its GPU; arguments as for `peak_memory`."""
    return peak_memory(settings, world_size, paths).needed <= device_memory_bytes


def largest_micro_batch(settings: Settings, world_size: int, device_memory_bytes: int, recompute: str | None = None,
                        paths: Paths | None = None) -> int:
    """Return how many samples a micro batch can have, 0 if not even one fits.

    Args:
        settings, world_size, paths: as for `peak_memory`; their micro batch does not matter.
        device_memory_bytes: what the GPU has.
        recompute: "none", "selective" or "full"; without it the profile's.
    """
    def enough(samples: int) -> bool:
        return fits(with_profile(settings, train_micro_batch_size_per_gpu=samples,
                                 recompute=recompute or settings.profile.recompute), world_size, device_memory_bytes, paths)

    low, high = 0, 1
    while high < _MOST_SAMPLES and enough(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if enough(middle) else (low, middle)
    return low


def with_profile(settings: Settings, **keys: object) -> Settings:
    """Return the settings with other values in the machine profile."""
    return replace(settings, profile=settings.profile.model_copy(update=keys))


def paths_of(settings: Settings) -> Paths:
    """Return the implementations that the profile asks for; "auto" is what runs where our kernels are compiled."""
    named = {name: path for name, path in settings.profile.kernels.model_dump().items() if path != "auto"}
    if settings.run.data.document_mask:
        named["attention"] = "efficient"  # the one that masks
    elif settings.profile.precision == "fp32":
        named.setdefault("attention", "efficient")
    return {name: named.get(name, path) for name, path in FUSED.items()}


def memory_of_stages(settings: Settings, world_size: int, paths: Paths | None = None) -> list[MemoryForecast]:
    """Return the forecast of one process of each pipeline stage; arguments as for `peak_memory`."""
    layout = layout_for(settings, world_size)
    bounds = _bounds(settings.run.model, settings.run.train.sequence_length, layout.pipeline)
    return [max(_Stage(settings, layout, paths or paths_of(settings), number, layers).moments(),
                key=lambda forecast: forecast.needed) for number, layers in enumerate(bounds)]


@lru_cache(maxsize=4)
def _bounds(model: ModelConfig, sequence_length: int, stages: int) -> list[range]:
    """Return `stage_bounds`, which the search for a micro batch asks for a hundred times."""
    return stage_bounds(model, sequence_length, stages)


class _Stage:
    """One process of a stage, followed through a step."""

    def __init__(self, settings: Settings, layout: Layout, paths: Paths, number: int, layers: range) -> None:
        profile, run = settings.profile, settings.run
        self.settings, self.layout, self.paths, self.number, self.layers = settings, layout, paths, number, layers
        self.last = run.model.num_hidden_layers + 1
        self.blocks = [layer for layer in layers if 0 < layer < self.last]
        self.weight = BYTES[profile.precision]
        self.samples, self.sequence = profile.train_micro_batch_size_per_gpu, run.train.sequence_length
        self.tokens = self.samples * self.sequence
        self.micro_batches = max(1, run.samples_per_step // (self.samples * layout.data))
        self.under_way = min(layout.pipeline - number, self.micro_batches)
        self.parameters = parameters_on(run.model, layout, layers)
        self.parameters_of = {0: 0, self.last: 0} | {layer: parameters_on(run.model, layout, range(layer, layer + 1))
                                                     for layer in layers if layer in (0, *self.blocks[:1], self.last)}
        self.flat = runs_flat(settings, layout)
        self.recorded = self.flat and records_graphs(profile, run, "flat", cuda=True)
        stage = profile.zero_optimization.stage
        offloaded = profile.zero_optimization.offload_optimizer is not None
        self.engine = ("flat" if self.flat else "plain" if stage == 0 else
                       "bf16" if profile.precision == "bf16" and stage == 1 and not offloaded else "zero")
        x = activations.token_of(run.model, layout, self.weight, self.sequence)
        self.token, documents = x, run.data.document_mask
        self.block = activations.kept_by_block(x, paths, profile.recompute, documents)
        self.block_adds = activations.added_by_block(x, paths, profile.recompute, documents)

    def moments(self) -> Iterator[MemoryForecast]:
        """Yield the moments at which a step can need most."""
        x, gradient = self.token, self.token.residual * self.token.number
        has_head, kept = self.last in self.layers, self.block * len(self.blocks) + (IDS if 0 in self.layers else 0)
        others = (self.under_way - 1) * kept  # micro batches whose backward pass has not begun
        held, done = 0.0, 0
        if has_head:
            in_loss = activations.kept_by_head(x, self.paths, self.layout.tensor > 1)
            after = activations.kept_by_head(x, {**self.paths, "cross_entropy": "cuda"})
            done, held = self.parameters_of[self.last], 0.0 if self.flat else activations.logits(x)  # by a variable's name
            logits = activations.logits(x) if self.paths["cross_entropy"] == "cuda" else held
            yield self._at("the loss", 0, others + kept + in_loss, logits, activations.added_by_loss(x, self.paths))
            yield self._at("the head's backward pass", done, others + kept + after,
                           logits + activations.gradient_of_logits(x, self.paths), gradient)
        for index in {0, len(self.blocks) - 1} if self.blocks else ():  # what lies between them grows or falls evenly
            above = len(self.blocks) - 1 - index
            # of its own weight gradients, that of the last product is there while those of gate and up are not
            gradients = done + above * self.parameters_of[self.blocks[0]] + x.wide * x.hidden
            yield self._at(f"block {self.blocks[index] - 1}'s backward pass", gradients, others + kept - above * self.block,
                           held, self.block_adds)
        yield self._at("the end of the backward pass", self.parameters, others, held, self._reduction() / self.tokens)
        if update := self._update():
            yield self._at("the update", 0, 0.0, 0.0, update / self.tokens, in_backward=False)

    def _at(self, moment: str, done: int, kept: float, logits: float, transient: float,
            in_backward: bool = True) -> MemoryForecast:
        """Return a moment at which so many parameters have gradients; `kept` and the others are bytes per token."""
        states, _ = state_bytes(self.settings, self.parameters, self.layout.data, self.flat)
        parts = [round(part * self.tokens) for part in (kept, logits, transient)]
        gradients, buffers = self._gradients(done), self._buffers(in_backward)
        reserve = CUDA_CONTEXT + (NCCL_BUFFERS if self.layout.world_size > 1 else 0)
        reserve += round(FRAGMENTATION * (gradients + sum(parts) + buffers))
        if self.recorded:  # a forward pass that evaluates cannot use the memory of the recording
            x = self.token
            reserve += round(self.tokens * (activations.logits(x) + (x.packed + 3 * x.hidden + 3 * x.wide) * x.number))
        return MemoryForecast(self.number, moment, states, gradients, *parts, buffers, reserve)

    def _gradients(self, done: int) -> int:
        """Bytes of the gradients of one micro batch, once so many parameters have theirs."""
        if self.engine == "flat" or (self.engine == "bf16" and self.micro_batches == 1):
            return self.weight * done
        if self.engine == "bf16":  # DeepSpeed zeroes them and keeps their memory from micro batch to micro batch
            return self.weight * self.parameters
        if self.weight == BYTES["fp32"] and self.settings.profile.zero_optimization.stage < 2:
            return 0  # they are the sums
        return self.weight * max(self.parameters_of.values()) if done else 0

    def _reduction(self) -> int:
        """Bytes of the flat copy that DeepSpeed's plain all-reduce makes; a single large buffer needs none."""
        if self.engine == "plain" or (self.engine == "bf16" and self.parameters <= _BUCKET):
            travel = BYTES[self.settings.profile.communication_data_type]
            return min(self.parameters, _BUCKET) * (4 + (travel if travel < 4 else 0))
        return 0

    def _update(self) -> float:
        """Bytes that the optimizer takes: DeepSpeed's flat copy of the gradients, or six copies of a chunk."""
        if self.engine == "zero" and self.settings.profile.zero_optimization.offload_optimizer is None:
            return 4 * self.parameters / self.layout.data
        if self.flat and self.paths["adamw"] == "torch":
            return 6 * 4 * min(self.parameters, _UPDATED)
        return 0

    def _between_stages(self) -> float:
        """Bytes per token of what DeepSpeed's pipeline holds: tensors that came and go, of each micro batch under way.

        The last stage also keeps the logits of the micro batch before.
        """
        x = self.token
        if self.last in self.layers:
            return 3 * x.residual * x.number + activations.logits(x)
        return ((1 if 0 in self.layers else 2) * self.under_way - 1) * x.residual * x.number

    def _buffers(self, in_backward: bool) -> int:
        """Bytes of what is neither state nor activation."""
        zero, run, x = self.settings.profile.zero_optimization, self.settings.run, self.token
        total = CUBLAS_WORKSPACE + len(self.blocks) * self.sequence * x.head_dim * 4  # cos and sin in fp32
        if run.data.document_mask:
            total += self.tokens * self.sequence * self.weight
        if self.layout.pipeline > 1:
            total += round(self._between_stages() * self.tokens)
        if self.engine == "zero" and in_backward:
            number = 4 if zero.stage == 1 else self.weight
            twice = bool(zero.overlap_comm) and zero.stage < 3 and zero.contiguous_gradients is not False
            if zero.contiguous_gradients is not False or zero.offload_optimizer is not None:
                total += (zero.reduce_bucket_size or _BUCKET) * number * (1 + twice)
        if zero.stage == 3:
            total += min(self.parameters, zero.stage3_max_live_parameters or _LIVE) * self.weight
        return total
