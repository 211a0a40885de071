"""DROP's figures: by hand, and against lm-eval's implementation on random answers."""

from __future__ import annotations

import random

from megatron_ttl.evaluate.drop_metric import best_drop_scores, drop_scores

WORDS = ["the", "a", "an", "An-other", "two", "2", "2.0", "2,000", "1e3", "$5", "5", "-5", "nan", "inf", "yards", "Yards,",
         "U.S.", "touch-down", "", " ", "'", "%", "3%", "é", "ação", "Ana", "rui"]


def test_by_hand():
    assert best_drop_scores("the Blue Team.", [["blue team"]]) == (1.0, 1.0)
    assert best_drop_scores("2 yards", [["3 yards"]]) == (0.0, 0.0)  # a number is asked for, another one is said
    assert best_drop_scores("about 2.0 yards", [["2 yards"]]) == (0.0, 0.8)
    assert best_drop_scores("Ana", [["Ana", "Rui"]]) == (0.0, 0.5)
    assert best_drop_scores("Rui", [["Ana"], ["Rui"], [" "]]) == (1.0, 1.0)
    assert best_drop_scores("", [[" "]]) == (0.0, 0.0)
    assert drop_scores(["rui silva", "ana"], ["Ana", "Rui"]) == (0.0, 0.83)  # aligned, whatever the order


def test_equal_to_lm_eval_on_random_answers():
    from lm_eval.tasks.drop import utils

    draw = random.Random(1)

    def spans(most: int) -> list[str]:
        return [" ".join(draw.choices(WORDS, k=draw.randint(0, 5))) for _ in range(draw.randint(1, most))]

    differing = 0
    for _ in range(600):
        predicted, reference = spans(3), spans(4)
        expected = utils.get_metrics(predicted, reference)
        differing += expected != (0.0, 0.0)
        assert drop_scores(predicted, reference) == expected, (predicted, reference)
        references = [spans(2) for _ in range(draw.randint(1, 3))]
        whole = utils.process_results({"answers": references}, predicted[:1])
        assert best_drop_scores(predicted[0], references) == (whole["em"], whole["f1"])
    assert differing > 150
