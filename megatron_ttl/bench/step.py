"""One optimizer step: our engine against peers with the same shapes, turn about in one run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_ttl.bench.contender import (
    Builder,
    run_trials,
    settings_faults,
    trial_rows,
    unknown_names,
)
from megatron_ttl.bench.own_models import EngineContender, bare_loop, plain_loop
from megatron_ttl.bench.peer_hf import hf_loop
from megatron_ttl.bench.peer_liger import liger_loop
from megatron_ttl.bench.peer_litgpt import litgpt_loop
from megatron_ttl.bench.workload import base_profile, load_workload_settings, opened
from megatron_ttl.errors import ConfigError, raise_faults

OURS = "ours"
PEERS: dict[str, Builder] = {"bare": bare_loop, "plain": plain_loop, "hf": hf_loop, "liger": liger_loop,
                             "litgpt": litgpt_loop}


def bench_step(config: str | None = None, deepspeed_config: str | None = None, overrides: Sequence[str] = (), *,
               micro_batch: int | None = None, peers: Sequence[str] = ("all",), steps: int = 10, rounds: int = 2,
               warm_up: int = 3, data: bool = False) -> dict[str, Any]:
    """Time the engine of these settings and its peers.

    Args:
        config: run file; None for a small model.
        deepspeed_config: machine profile; None for bf16 on a GPU and fp32 elsewhere.
        overrides: `section.key=value` of the run file.
        micro_batch: instead of the profile's.
        peers: names of `PEERS`, or `all`.
        steps: timed steps of a turn.
        rounds: turns of each contender.
        warm_up: steps before those; on a GPU at least 3, for compilation and capture.
        data: take the run's own data.

    Returns:
        What was trained, and `rows`: tokens per second of the median step, how many times as fast ours is by the median
        and by the best step, MFU, peak memory, median and best step in milliseconds, the last loss.

    Raises:
        ConfigError: settings, names or numbers are wrong.
    """
    faults = settings_faults({"steps": steps, "rounds": rounds}) + settings_faults({"warm-up": warm_up}, 0)
    raise_faults(ConfigError, faults + unknown_names("peer", peers, ["all", *PEERS]))
    settings = load_workload_settings(base_profile(deepspeed_config, micro_batch), config, overrides,
                                      deepspeed_config or "machine profile")
    names = list(PEERS) if "all" in peers else list(dict.fromkeys(peers))
    builders: dict[str, Builder] = {OURS: EngineContender, **{name: PEERS[name] for name in names}}
    with opened(settings, data) as workload:
        trials = run_trials(builders, workload, steps, rounds, warm_up)
        return {**workload.facts(), "steps": steps, "rounds": rounds, "rows": trial_rows(trials, workload, OURS)}
