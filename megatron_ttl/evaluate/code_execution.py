"""Score programs that a model wrote: HumanEval's tests in the sandbox, and pass@k without bias.

Source: Chen et al. 2021, Evaluating Large Language Models Trained on Code.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron_ttl import console
from megatron_ttl.errors import DataError, raise_faults
from megatron_ttl.evaluate.sandbox import Limits, Outcome, require_sandbox, run_programs

PASSED, FAILED, TIMED_OUT, REFUSED = "passed", "failed", "timed out", "refused"


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Return the chance that one of k programs, drawn from those at hand without putting back, passes.

    Args:
        samples: programs at hand, at least k.
        passed: how many of them pass.
        k: how many are drawn.
    """
    assert 0 <= passed <= samples and 1 <= k <= samples
    if samples - passed < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / number for number in range(samples - passed + 1, samples + 1))


def require_runnable(problems: Iterable[Mapping[str, Any]]) -> str:
    """Make sure that answers to these problems can be judged; return how far programs are shut in.

    Raises:
        ConfigError: programs cannot be shut in here.
        DataError: a problem's function has no proper name.
    """
    raise_faults(DataError, (f"HumanEval: entry_point {name!r}; it must be the name of a function; correct the data file"
                             for name in (problem["entry_point"] for problem in problems) if not name.isidentifier()))
    return require_sandbox()


def judge_completions(problems: Sequence[Mapping[str, Any]], completions: Sequence[Sequence[str]],
                      limits: Limits | None = None, workers: int | None = None) -> list[list[str]]:
    """Run every completion of every problem against the problem's tests.

    Args:
        problems: rows with `prompt`, `test` (which defines `check`) and `entry_point`.
        completions: for each problem, what a model wrote after the prompt.
        limits: of each program.
        workers: programs at a time; None: one per core. The outcomes are the same.

    Returns:
        For each problem and completion: passed, failed (which an early exit is too), timed out, or refused (no text).

    Raises:
        ConfigError: programs cannot be shut in here.
        DataError: a problem's function has no proper name.
    """
    level = require_runnable(problems)
    proof = secrets.token_hex(16)
    programs = [_program(problem, completion, proof)
                for problem, own in zip(problems, completions, strict=True) for completion in own]
    with console.progress(f"running programs behind {level}", len(programs), "") as report:
        outcomes = iter(run_programs(programs, limits, workers, report))
    return [[_verdict(next(outcomes), proof) for _ in own] for own in completions]


def _program(problem: Mapping[str, Any], completion: str, proof: str) -> str:
    # Printed only by who comes through all tests: a completion that leaves early, exit(0), has not passed.
    return f"{problem['prompt']}{completion}\n{problem['test']}\ncheck({problem['entry_point']})\nprint('\\n{proof}')\n"


def _verdict(outcome: Outcome, proof: str) -> str:
    if outcome.kind in (TIMED_OUT, REFUSED):
        return outcome.kind
    return PASSED if outcome.kind == "ended" and f"\n{proof}\n" in outcome.output else FAILED
