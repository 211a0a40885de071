"""The layout of a run as a picture: which ranks hold which layers and which shards, and what that costs them."""

from __future__ import annotations

from typing import Any

from megatron_ttl.config.checks import accumulation
from megatron_ttl.config.load import Settings
from megatron_ttl.config.schema import ModelConfig
from megatron_ttl.console import print_table
from megatron_ttl.files import human_bytes
from megatron_ttl.parallel.plan import Layout, Place, parts_of
from megatron_ttl.plan.layout_costs import bubble, layout_for, stage_costs
from megatron_ttl.plan.memory import memory_of_stages

_COPIES_SHOWN = 4
_LINKS = ("tensor", "pipeline", "data")


def describe_layout(settings: Settings, world_size: int) -> dict[str, Any]:
    """Return who holds what, and what each process computes, keeps and sends, as plain values.

    Raises:
        ConfigError: the degrees do not divide the processes, or micro batches the step.
    """
    model, layout = settings.run.model, layout_for(settings, world_size)
    micro_batches = accumulation(settings, layout.data)
    stages, peaks = [], memory_of_stages(settings, world_size)
    for stage, cost in enumerate(stage_costs(settings, layout)):
        copies = [[layout.rank(Place(tensor, stage, data)) for tensor in range(layout.tensor)]
                  for data in range(layout.data)]
        stages.append({"stage": stage, "holds": _layers(cost.layers, model), "ranks_of_each_copy": copies,
                       "share_of_operations": cost.share_of_operations, "parameters_per_rank": cost.parameters,
                       "state_bytes_per_rank": cost.device_bytes, "host_state_bytes_per_rank": cost.host_bytes,
                       "peak_memory_bytes_per_rank": peaks[stage].needed,
                       "sent_bytes_per_rank_and_step": cost.sent_bytes})
    processes = "1 process" if layout.world_size == 1 else f"{layout.world_size:,} processes"
    return {"summary": f"{layout} = {processes}", "tensor": layout.tensor,
            "pipeline": layout.pipeline, "data": layout.data, "sequence": layout.sequence,
            "recompute": settings.profile.recompute, "pipeline_bubble": bubble(layout.pipeline, micro_batches),
            "stages": stages, "tensor_shards": [_shard(model, layout, rank) for rank in range(layout.tensor)],
            "warnings": _warnings(settings, layout, micro_batches)}


def _layers(layers: range, model: ModelConfig) -> str:
    last = model.num_hidden_layers + 1
    blocks = [layer - 1 for layer in layers if 0 < layer < last]
    names = ["embedding"] if 0 in layers else []
    if blocks:
        names.append(f"block {blocks[0]}" if len(blocks) == 1 else f"blocks {blocks[0]} to {blocks[-1]}")
    return ", ".join([*names, "norm, head"] if last in layers else names)


def _shard(model: ModelConfig, layout: Layout, rank: int) -> dict[str, Any]:
    """Return what a tensor rank owns of every layer, as [first, how many]."""
    queries, keys, _ = parts_of("qkv_proj", model, layout, rank)
    wide, rows = parts_of("down_proj", model, layout, rank)[0], parts_of("lm_head", model, layout, rank)[0]
    heads = model.head_dim
    return {"tensor_rank": rank, "query_heads": [queries.offset[0] // heads, queries.extent[0] // heads],
            "key_value_heads": [keys.offset[0] // heads, keys.extent[0] // heads],
            "swiglu_channels": [wide.offset[1], wide.extent[1]], "vocabulary_rows": [rows.offset[0], rows.extent[0]]}


def _warnings(settings: Settings, layout: Layout, micro_batches: int) -> list[str]:
    warnings, stage = [], settings.profile.zero_optimization.stage
    if micro_batches < layout.pipeline:
        warnings.append(f"micro batches per step {micro_batches:,}, stages {layout.pipeline:,}: each waits "
                        f"{bubble(layout.pipeline, micro_batches):.0%} of the time; a smaller "
                        "train_micro_batch_size_per_gpu or fewer copies make more of them")
    if stage >= 2 and layout.data > 1 and micro_batches > 1:
        warnings.append(f"ZeRO {stage} exchanges gradients after each of the {micro_batches:,} micro batches, stage 1 "
                        "once a step; use it where memory asks for it")
    if stage == 3 and layout.data > 1:
        warnings.append("ZeRO 3 may send less than shown: weights that are small or needed again soon stay gathered")
    return warnings


def print_layout(picture: dict[str, Any]) -> None:
    """Print what `describe_layout` returned."""
    print()
    offloaded = any(stage["host_state_bytes_per_rank"] for stage in picture["stages"])
    links = [link for link in _LINKS
             if any(stage["sent_bytes_per_rank_and_step"][link] for stage in picture["stages"])]
    header = ["stage", "holds", "ranks of each copy", "operations", "parameters", "states",
              *(["on the host"] if offloaded else []), *(["peak memory"] if picture["pipeline"] > 1 else []),
              *(f"sent: {link}" for link in links)]
    rows = []
    for stage in picture["stages"]:
        sent = [human_bytes(stage["sent_bytes_per_rank_and_step"][link]) for link in links]
        host = [human_bytes(stage["host_state_bytes_per_rank"])] if offloaded else []
        peak = [human_bytes(stage["peak_memory_bytes_per_rank"])] if picture["pipeline"] > 1 else []
        rows.append([stage["stage"], stage["holds"], _copies(stage["ranks_of_each_copy"]),
                     f"{stage['share_of_operations']:.1%}", stage["parameters_per_rank"],
                     human_bytes(stage["state_bytes_per_rank"]), *host, *peak, *sent])
    print_table(header, rows, title=f"layout: {picture['summary']}; figures are per process, bytes sent per step")
    if picture["tensor"] > 1:
        print()
        columns = ("tensor_rank", "query_heads", "key_value_heads", "swiglu_channels", "vocabulary_rows")
        print_table([column.replace("_", " ") for column in columns],
                    [[shard["tensor_rank"], *(_span(*shard[column]) for column in columns[1:])]
                     for shard in picture["tensor_shards"]], title="shards of every layer")
    if picture["pipeline"] > 1:
        print(f"\neach stage waits {picture['pipeline_bubble']:.1%} of a step for the pipeline to fill and to empty")
    for warning in picture["warnings"]:
        print(f"note: {warning}")


def _copies(copies: list[list[int]]) -> str:
    """Return `[0 1] [2 3]`; of many copies the first, the last and their number."""
    texts = [f"[{' '.join(map(str, ranks))}]" for ranks in copies]
    if len(texts) <= _COPIES_SHOWN:
        return " ".join(texts)
    return f"{texts[0]} {texts[1]} .. {texts[-1]}, {len(texts):,} copies"


def _span(first: int, count: int) -> str:
    if count < 2:
        return f"{first:,}" if count else "none"
    return f"{first:,} to {first + count - 1:,}"
