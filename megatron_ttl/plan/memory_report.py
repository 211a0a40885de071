"""The forecast of memory as a dry run tells it: parts, the share of the device, what would fit, what to do."""

from __future__ import annotations

from typing import Any

from megatron_ttl.config.checks import divisors
from megatron_ttl.config.load import Settings
from megatron_ttl.console import print_table, print_warning
from megatron_ttl.files import human_bytes
from megatron_ttl.plan.activations import PLAIN
from megatron_ttl.plan.device_memory import memory_of
from megatron_ttl.plan.layout_costs import layout_for
from megatron_ttl.plan.memory import largest_micro_batch, paths_of, peak_memory

RECOMPUTE = ("none", "selective", "full")


def describe_memory(settings: Settings, world_size: int) -> dict[str, Any]:
    """Return the forecast of the process that needs most, and a verdict for every size that its device comes in.

    Raises:
        ConfigError: the degrees do not divide the processes.
    """
    forecast = peak_memory(settings, world_size)
    described = {"bytes": forecast.needed, "allocated_bytes": forecast.allocated, "stage": forecast.stage,
                 "moment": forecast.moment, "parts": forecast.parts, "paths": dict(paths_of(settings)),
                 "bytes_without_cuda_kernels": peak_memory(settings, world_size, PLAIN).needed}
    verdicts = [{"device": name, "bytes": size, "share": forecast.needed / size, "fits": forecast.needed <= size,
                 "largest_micro_batch": {kind: largest_micro_batch(settings, world_size, size, kind)
                                         for kind in RECOMPUTE}}
                for name, size in memory_of(settings.device or "").items()]
    warnings = [_warning(settings, world_size, forecast.needed, verdict) for verdict in verdicts if not verdict["fits"]]
    return {**described, "devices": verdicts, "warnings": warnings}


def _warning(settings: Settings, world_size: int, needed: int, verdict: dict[str, Any]) -> str:
    profile = settings.profile
    samples = settings.run.samples_per_step // layout_for(settings, world_size).data
    fitting = {kind: max((d for d in divisors(samples) if d <= most), default=0)
               for kind, most in verdict["largest_micro_batch"].items()}
    cures = []
    if smaller := fitting[profile.recompute]:
        cures.append(f"train_micro_batch_size_per_gpu to {smaller:,}")
    better = [kind for kind in RECOMPUTE[RECOMPUTE.index(profile.recompute) + 1 :] if fitting[kind] > smaller]
    if better:
        most = min(fitting[better[0]], profile.train_micro_batch_size_per_gpu)
        with_it = "" if most == profile.train_micro_batch_size_per_gpu else f" and the micro batch to {most:,}"
        cures.append(f"recompute to \"{better[0]}\"{with_it}")
    do = f"set {', or '.join(cures)}" if cures else "spread it over more GPUs, or offload the optimizer"
    return (f"{settings.deepspeed_path}: a process is forecast to need {human_bytes(needed)}, {verdict['share']:.0%} of "
            f"{verdict['device']}; it will probably run out of memory there; {do}")


def print_memory(described: dict[str, Any]) -> None:
    """Print what `describe_memory` returned; warnings go to standard error."""
    print()
    rows = [(name, human_bytes(size)) for name, size in described["parts"].items()]
    rows += [("in all", human_bytes(described["bytes"])),
             ("without our CUDA kernels", human_bytes(described["bytes_without_cuda_kernels"]))]
    print_table(("part", "bytes"), rows, title="peak memory of a process on a GPU (a forecast), in stage "
                f"{described['stage']} at {described['moment']}")
    if described["devices"]:
        print()
        print_table(("device", "has", "forecast", "fits", *(f"recompute {kind}" for kind in RECOMPUTE)),
                    [(verdict["device"], human_bytes(verdict["bytes"]), f"{verdict['share']:.0%}", verdict["fits"],
                      *(verdict["largest_micro_batch"][kind] for kind in RECOMPUTE)) for verdict in described["devices"]],
                    title="largest micro batches that fit")
    for warning in described["warnings"]:
        print_warning(warning)
