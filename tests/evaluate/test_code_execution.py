"""HumanEval's verdicts on right, wrong, looping and cheating completions; pass@k against enumeration."""

from __future__ import annotations

import itertools
import math

import pytest
from english_items import PROBLEMS

from megatron_ttl.errors import DataError
from megatron_ttl.evaluate.code_execution import judge_completions, pass_at_k
from megatron_ttl.evaluate.sandbox import Limits


def test_pass_at_k_is_the_share_of_draws_with_a_passing_program():
    for samples in range(1, 9):
        for passed in range(samples + 1):
            programs = [number < passed for number in range(samples)]
            for k in range(1, samples + 1):
                draws = list(itertools.combinations(programs, k))
                expected = sum(map(any, draws)) / len(draws)
                assert pass_at_k(samples, passed, k) == pytest.approx(expected, abs=1e-12)
    many = 1 - math.comb(197, 100) / math.comb(200, 100)  # numbers of the paper's size
    assert pass_at_k(200, 3, 100) == pytest.approx(many, abs=1e-12)


COMPLETIONS = [
    (0, "    return 2 * x\n", "passed"),
    (0, "    return x + x", "passed"),
    (0, "    return x ** 2\n", "failed"),
    (0, "    return 2 * x\n\nimport sys\nsys.exit(0)\n", "failed"),  # leaves before the tests
    (0, "    return 2 * x\n\nimport os\nos._exit(0)\n", "failed"),
    (0, "    print('noise')\n    return 2 * x\n", "passed"),
    (0, "    import subprocess\n    return int(subprocess.check_output(['echo', str(2 * x)]))\n", "failed"),
    (1, "    return [s for s in text if s in 'aeiou']\n", "passed"),
    (1, "    return [s for s in text if s in 'aeiou'\n", "failed"),  # no Python
    (1, "    while True:\n        pass\n", "timed out"),
    (1, "    return \ud800\n", "refused"),
    (2, "    return min(numbers)\n", "passed"),
    (2, "    return least(numbers)\n", "failed"),  # recursion without end
]


@pytest.mark.parametrize("workers", [1, 3])
def test_verdicts(workers):
    problems = [PROBLEMS[number] for number, _, _ in COMPLETIONS]
    found = judge_completions(problems, [[text] for _, text, _ in COMPLETIONS], Limits(seconds=1), workers)
    assert found == [[verdict] for _, _, verdict in COMPLETIONS]


def test_several_completions_of_one_problem_stay_together():
    found = judge_completions(PROBLEMS[::2], [["    return 0\n", "    return x * 2\n"], []], workers=2)
    assert found == [["failed", "passed"], []]


def test_an_entry_point_is_a_name():
    with pytest.raises(DataError, match="entry_point 'f\\(1\\) or g'; it must be the name of a function"):
        judge_completions([{**PROBLEMS[0], "entry_point": "f(1) or g"}], [["    return 1\n"]])
