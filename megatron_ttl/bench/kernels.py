"""Each operation of the model by itself: achieved bandwidth, as a share of what a copy reaches in the same run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_ttl.bench.adamw_case import ADAMW, adamw_bytes, adamw_calls
from megatron_ttl.bench.contender import (
    NotInstalled,
    free_memory,
    settings_faults,
    unknown_names,
)
from megatron_ttl.bench.kernel_bytes import WIDTHS, Widths, bytes_per_token
from megatron_ttl.bench.kernel_cases import CASES, Case, Inputs, Operation
from megatron_ttl.bench.kernel_timing import (
    Call,
    copy_bytes_per_s,
    device_seconds,
    poison,
    sets_beyond_cache,
)
from megatron_ttl.bench.workload import device_name
from megatron_ttl.console import progress
from megatron_ttl.errors import ConfigError, UserError, raise_faults

PATHS = ("cuda", "torch", "compiled", "liger", "apex")
_ROUNDS = 4


@dataclass
class Row:
    """One implementation of an operation in one direction."""

    path: str
    direction: str
    seconds: list[float] = field(default_factory=list)
    error: float | None = None
    note: str = ""


def bench_kernels(ops: Sequence[str] = (), tokens: int | None = None, widths: Sequence[str] = (),
                  paths: Sequence[str] = (), repeats: int = 20) -> dict[str, Any]:
    """Time every implementation of the operations, turn about.

    Args:
        ops: names of operations; none: all.
        tokens: rows of an activation; None for 32,768 on a GPU and 512 elsewhere.
        widths: names of `WIDTHS`; none: the three published models on a GPU, the small one elsewhere.
        paths: names of `PATHS`; none: all on a GPU, PyTorch's elsewhere.
        repeats: timed calls of each.

    Returns:
        The device, its copy bandwidth, and `rows`: bytes by formula, median and best microseconds, bytes per second of the
        median and their share of the copy's, and the largest error against fp32, relative to the largest result.

    Raises:
        ConfigError: a name or number is wrong.
    """
    cuda = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32
    raise_faults(ConfigError, [*unknown_names("op", ops, [*CASES, ADAMW]), *unknown_names("widths", widths, list(WIDTHS)),
                               *unknown_names("path", paths, PATHS),
                               *settings_faults({"repeats": repeats, "tokens": 1 if tokens is None else tokens})])
    tokens = tokens or (32_768 if cuda else 512)
    names = list(widths) or (["160m", "460m", "1b1"] if cuda else ["small"])
    paths = list(paths) or (list(PATHS) if cuda else ["torch"])
    copies = [copy_bytes_per_s(device)]
    rows: list[dict[str, Any]] = []
    work = [(op, name) for op in (ops or CASES) if op != ADAMW for name in names]
    with progress("measuring", len(work) + 1, " operations") as report:
        for number, (op, name) in enumerate(work):
            rows += _figures(op, name, bytes_per_token(op, WIDTHS[name], dtype.itemsize), tokens,
                             _measure(op, WIDTHS[name], tokens, paths, repeats, device, dtype))
            free_memory(device)
            report(number + 1)
        if not ops or ADAMW in ops:
            parameters = 1 << (26 if cuda else 22)
            measured = _run({(path, "both"): calls for path, calls in adamw_calls(parameters, paths, device, dtype).items()},
                            repeats, device)
            rows += _figures(ADAMW, f"{parameters:,} parameters", {"both": adamw_bytes(dtype)}, parameters, measured)
    copies.append(copy_bytes_per_s(device))
    for row in rows:
        row["share_of_copy"] = row["bytes_per_s"] / max(copies) if row["bytes_per_s"] else None
    return {"device": device_name(device), "torch": torch.__version__, "dtype": str(dtype).removeprefix("torch."),
            "tokens": tokens, "copy_bytes_per_s": max(copies), "rows": rows}


def _figures(op: str, name: str, counted: dict[Any, int], units: int, rows: Sequence[Row]) -> list[dict[str, Any]]:
    found = []
    for row in rows:
        moved = counted[row.direction] * units
        median = statistics.median(row.seconds) if row.seconds else None
        found.append({"op": op, "widths": name, "path": row.path, "direction": row.direction, "bytes": moved,
                      "median_us": median and 1e6 * median, "minimum_us": 1e6 * min(row.seconds) if row.seconds else None,
                      "bytes_per_s": moved / median if median else None, "error": row.error, "note": row.note})
    return found


def _measure(op: str, widths: Widths, tokens: int, paths: Sequence[str], repeats: int, device: torch.device,
             dtype: torch.dtype) -> list[Row]:
    case, implementations = CASES[op], CASES[op].implementations()
    directions = tuple(bytes_per_token(op, widths, 1))
    count = sets_beyond_cache(device, bytes_per_token(op, widths, dtype.itemsize)[directions[0]] * tokens)
    make = partial(case.make, widths, tokens, device, dtype)
    calls: dict[tuple[str, str], Callable[[], list[Call]] | str] = {}
    errors: dict[tuple[str, str], float] = {}
    for path in paths:
        if path not in implementations:
            continue
        faults = _try(case, path, implementations[path], make(0), errors)
        sets = [] if faults else [case.arranged(path, make(seed)) for seed in range(1, count + 1)]
        for direction in directions:
            calls[path, direction] = faults or partial(_calls, implementations[path], sets, direction)
    rows = _run(calls, repeats, device)
    for row in rows:
        row.error = errors.get((row.path, row.direction))
    return rows


def _try(case: Case, path: str, operation: Operation, inputs: Inputs, errors: dict[tuple[str, str], float]) -> str:
    """Compute once into poisoned memory and compare with fp32; return why it cannot be, or nothing."""
    try:
        expected, wanted = _forward_backward(partial(case.ours, path="torch"), inputs.wide())
        wanted = case.arranged(path, Inputs(tuple(wanted), inputs.rest)).leaves
        inputs = case.arranged(path, inputs)
        poison(inputs.leaves[0].device, inputs.leaves[0].numel(), inputs.leaves[0].dtype)
        found, gradients = _forward_backward(operation, inputs)
    except torch.OutOfMemoryError:
        return "out of memory"
    except NotInstalled:
        return "not installed"
    except UserError as error:
        return f"not available: {error.faults[0]}"
    except Exception as error:  # noqa: BLE001 -- another's kernel may fail in any way
        return f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    forward, backward = _largest_error(found, expected), _largest_error(gradients, wanted)
    errors |= {(path, "forward"): forward, (path, "backward"): backward, (path, "both"): max(forward, backward)}
    return ""


def _forward_backward(operation: Operation, inputs: Inputs) -> tuple[list[Tensor], list[Tensor]]:
    outputs = _listed(operation(*inputs))
    kept = [output.detach().clone() for output in outputs]
    return kept, list(torch.autograd.grad(outputs, inputs.leaves, _gradients(outputs)))


def _gradients(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Return what arrives from above: an own gradient for each output, the same for every implementation."""
    found = []
    for number, output in enumerate(outputs):
        generator = torch.Generator(output.device).manual_seed(100 + number)
        ones = output.dim() == 0
        found.append(torch.ones_like(output) if ones else
                     torch.randn(output.shape, device=output.device, generator=generator).to(output.dtype))
    return found


def _listed(outputs: Any) -> list[Tensor]:
    return list(outputs) if isinstance(outputs, tuple | list) else [outputs]


@torch.no_grad()
def _largest_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest difference, relative to the largest number; NaN where something was not written."""
    worst = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        error = float((ours.float() - theirs).abs().max() / theirs.abs().max())
        if math.isnan(error):
            return error
        worst = max(worst, error)
    return worst


def _calls(operation: Operation, sets: Sequence[Inputs], direction: str) -> list[Call]:
    """Return one call per set of inputs, in the direction that is timed."""
    def forward(inputs: Inputs) -> list[Tensor]:
        return _listed(operation(*inputs))

    def backward(inputs: Inputs, prepared: tuple[list[Tensor], list[Tensor]]) -> None:
        torch.autograd.grad(prepared[0], inputs.leaves, prepared[1])

    def ready(inputs: Inputs) -> tuple[list[Tensor], list[Tensor]]:
        outputs = forward(inputs)
        return outputs, _gradients(outputs)

    def both(inputs: Inputs, _: Any) -> None:
        torch.autograd.grad(forward(inputs), inputs.leaves)

    if direction == "forward":
        return [(lambda: None, lambda _, i=inputs: forward(i)) for inputs in sets]
    if direction == "backward":
        return [(partial(ready, inputs), partial(backward, inputs)) for inputs in sets]
    return [(lambda: None, partial(both, inputs)) for inputs in sets]


def _run(calls: dict[tuple[str, str], Callable[[], list[Call]] | str], repeats: int, device: torch.device) -> list[Row]:
    """Time all of them turn about; after one call each that is not counted."""
    rows = {key: Row(*key, note=calls[key] if isinstance(calls[key], str) else "") for key in calls}
    ready = {key: make() for key, make in calls.items() if not isinstance(make, str)}
    for found in ready.values():
        device_seconds(found, device)
    for turn in range(_ROUNDS):
        for key, found in ready.items():
            rows[key].seconds += device_seconds(list(_cycled(found, turn, -(-repeats // _ROUNDS))), device)
    return list(rows.values())


def _cycled(calls: Sequence[Call], first: int, count: int) -> Iterator[Call]:
    for number in range(count):
        yield calls[(first * count + number) % len(calls)]
