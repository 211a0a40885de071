"""What a layout costs each process: weights, states, operations, and the bytes it sends in an optimizer step.

Bytes are those that leave one GPU, by ring algorithms: an all-reduce of V bytes over n ranks sends 2 (n - 1) / n V, a
gather or a reduce-scatter half of that. The formulas count what this program and DeepSpeed 0.19.8 do, not what would
be least; a test counts the collectives of real steps and compares. No torch: `--dry-run` must be quick.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from megatron_ttl.config.checks import accumulation
from megatron_ttl.config.degrees import data_parallel_size_of
from megatron_ttl.config.engine import engine_kind
from megatron_ttl.config.load import Settings
from megatron_ttl.config.schema import ModelConfig
from megatron_ttl.parallel.plan import TENSOR_PLAN, Layout, layer_costs, parts_of, stage_bounds

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_FIRST, _LAST = ("embed_tokens",), ("norm", "lm_head")
_BLOCK = tuple(module for module in TENSOR_PLAN if module not in (*_FIRST, *_LAST))

_SUM, _MASTERS = 4, 12  # bytes per parameter: gradients added up in fp32; fp32 master and two moments


@dataclass(frozen=True)
class StageCost:
    """One pipeline stage, as each of its processes sees it."""

    layers: range
    """Numbers of its layers: 0 is the embedding, L + 1 norm and head."""
    share_of_operations: float
    """Of the whole model's."""
    parameters: int
    """On one process, padding of the vocabulary included."""
    device_bytes: int
    """Weights, summed gradients, masters and moments on one GPU, between steps."""
    host_bytes: int
    """What of these is offloaded."""
    sent_bytes: dict[str, int]
    """By one process in an optimizer step, to its tensor, pipeline and data neighbours."""


def layout_for(settings: Settings, world_size: int) -> Layout:
    """Return the layout of so many processes.

    Raises:
        ConfigError: the degrees do not divide them.
    """
    cut = settings.profile.cut
    return Layout(cut.tensor, cut.pipeline, data_parallel_size_of(settings, world_size), cut.sequence)


def stage_costs(settings: Settings, layout: Layout) -> list[StageCost]:
    """Return what each pipeline stage costs.

    Raises:
        ConfigError: tokens_per_step cannot be shared out so.
    """
    model, sequence_length = settings.run.model, settings.run.train.sequence_length
    operations = layer_costs(model, sequence_length)
    costs = []
    for layers in stage_bounds(model, sequence_length, layout.pipeline):
        parameters = parameters_on(model, layout, layers)
        device, host = state_bytes(settings, parameters, layout.data, runs_flat(settings, layout))
        sent = {"tensor": tensor_bytes(settings, layout, layers), "pipeline": pipeline_bytes(settings, layout, layers),
                "data": data_bytes(settings, layout, parameters)}
        costs.append(StageCost(layers, sum(operations[i] for i in layers) / sum(operations), parameters, device, host,
                               {link: round(volume) for link, volume in sent.items()}))
    return costs


def parameters_on(model: ModelConfig, layout: Layout, layers: range) -> int:
    """Count the weights of some layers on one tensor rank; all ranks have equally many."""
    last = model.num_hidden_layers + 1
    modules = [module for layer in layers for module in {0: _FIRST, last: _LAST}.get(layer, _BLOCK)]
    return sum(part.rows * prod(part.extent[1:]) for module in modules for part in parts_of(module, model, layout, 0))


def runs_flat(settings: Settings, layout: Layout) -> bool:
    """Return whether a process on a GPU trains with the flat engine."""
    return engine_kind(settings.profile, layout.world_size, cuda=True) == "flat"


def state_bytes(settings: Settings, parameters: int, data: int, flat: bool = False) -> tuple[int, int]:
    """Return the bytes of a process's states on the GPU and on the host.

    Per parameter, with weights of w bytes (2, or 4 in fp32) and d data-parallel copies:

    - stage 0: w + 4 + 8, the weights being their own masters
    - stage 1: w + 4 + 12/d
    - stage 2: w + (4 + 12)/d
    - stage 3: (w + 4 + 12)/d, and on top the weights that are gathered for use

    4 is the fp32 sum of gradients. Offloading takes the 12/d to the host, at stages 2 and 3 the gradients' 4/d too.
    The flat engine of a GPU's only process keeps w + 4 + 12, and in fp32, the weights being their own masters, w + 4 + 8.
    """
    zero = settings.profile.zero_optimization
    weight = BYTES[settings.profile.precision]
    if flat:
        return parameters * (weight + _SUM + (_MASTERS if weight < BYTES["fp32"] else 8)), 0
    if zero.stage == 0:
        return parameters * (weight + _SUM + 8), 0
    whole = {1: weight + _SUM, 2: weight, 3: 0}[zero.stage]
    spread = {1: 0, 2: 0, 3: weight}[zero.stage]
    offloadable = {1: _MASTERS, 2: _MASTERS + _SUM, 3: _MASTERS + _SUM}[zero.stage]
    if zero.offload_optimizer is None:
        return parameters * whole + parameters * (spread + offloadable) // data, 0
    return parameters * whole + parameters * spread // data, parameters * offloadable // data


def tensor_bytes(settings: Settings, layout: Layout, layers: range) -> float:
    """Return what one process sends to the ranks that share its layers, in a step of m micro batches.

    With an all-reduce of A = 2 (t - 1) / t times activations of b s h w bytes, per micro batch:

    - a block: 4 A, after each of its two halves and, backward, before each
    - embedding and head: A each
    - recomputing whole blocks: A more per block, for the attention's half is done again
    - the loss: three numbers of 4 bytes per token, 12 b s, on the last stage

    Sequence parallelism replaces each all-reduce by a gather and a reduce-scatter of together as many bytes, and adds
    up the gradients of norms: h w each. What it gathers is gathered again where it was forgotten: A more per block
    with recompute "selective", 1.5 A with "full".
    """
    profile, model = settings.profile, settings.run.model
    last = model.num_hidden_layers + 1
    blocks = sum(0 < layer < last for layer in layers)
    ends = (0 in layers) + (last in layers)
    again = {"none": 0.0, "selective": layout.sequence * 1.0, "full": 1.0 + layout.sequence * 0.5}[profile.recompute]
    tokens = profile.train_micro_batch_size_per_gpu * settings.run.train.sequence_length
    width = BYTES[profile.precision]
    volume = (blocks * (4 + again) + ends) * tokens * model.hidden_size * width
    volume += 12 * tokens * (last in layers)
    volume += layout.sequence * (2 * blocks + (last in layers)) * model.hidden_size * width
    return accumulation(settings, layout.data) * _all_reduce(layout.tensor) * volume


def pipeline_bytes(settings: Settings, layout: Layout, layers: range) -> float:
    """Return what one process sends to the neighbouring stages: b s h w per boundary and micro batch, activations
    forward or their gradients back; a t-th of it with sequence parallelism.
    """
    profile, model = settings.profile, settings.run.model
    boundaries = (0 not in layers) + (model.num_hidden_layers + 1 not in layers)
    tokens = profile.train_micro_batch_size_per_gpu * settings.run.train.sequence_length
    volume = tokens * model.hidden_size * BYTES[profile.precision] / (layout.tensor if layout.sequence else 1)
    return accumulation(settings, layout.data) * boundaries * volume


def data_bytes(settings: Settings, layout: Layout, parameters: int) -> float:
    """Return what one process sends to the ranks that hold the same weights.

    Times (d - 1) / d and parameters, with weights of w bytes, gradients travelling in c bytes, m micro batches:

    - stage 0: 2 c
    - stage 1: 2 c + w, for DeepSpeed all-reduces although each rank needs a part
    - stage 2: 2 c m + w, for it reduces after every micro batch
    - stage 3: (c + 2 w) m at most: small weights, and those needed again soon, are gathered less often
    """
    profile = settings.profile
    zero, m = profile.zero_optimization, accumulation(settings, layout.data)
    travel, weight = BYTES[profile.communication_data_type], BYTES[profile.precision]
    reduce = 2 if zero.stage < 3 or zero.reduce_scatter is False else 1
    per_parameter = {0: reduce * travel, 1: reduce * travel + weight, 2: reduce * travel * m + weight,
                     3: (reduce * travel + 2 * weight) * m}[zero.stage]
    return _all_reduce(layout.data) / 2 * parameters * per_parameter


def _all_reduce(ranks: int) -> float:
    """Return how often a ring all-reduce sends what it adds up."""
    return 2 * (ranks - 1) / ranks


def bubble(pipeline: int, micro_batches: int) -> float:
    """Return the share of a step that a stage waits: (p - 1) / (m + p - 1), for stages of equal cost."""
    return (pipeline - 1) / (micro_batches + pipeline - 1)
