"""Baselines against sums written out and scikit-learn, through the harness that scores models."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial

import numpy as np
import pytest
from small_tasks import ACC, BLANK, BLANKS, CHOICE, GENERATE, LAST_WORD, PAIR, PAIRS, ROLLING, make_task, questions

from megatron_ttl.errors import DataError
from megatron_ttl.evaluate.baselines import DRAWS, FixedAnswers, baselines
from megatron_ttl.evaluate.harness import run_task as harness_run
from megatron_ttl.evaluate.pack_functions import FUNCTIONS

run_task = partial(harness_run, standard_errors=False)
F1 = {"metric": "f1", "aggregation": FUNCTIONS["macro_f1"], "higher_is_better": True}
LABELS = CHOICE | {"doc_to_choice": ["Não", "Sim"], "doc_to_target": "label", "metric_list": [F1, ACC]}


def labelled(labels) -> list[dict]:
    return [{"question": f"É mesmo {number}?", "label": label} for number, label in enumerate(labels)]


def macro_f1(gold, said) -> float:
    from sklearn.metrics import f1_score

    return f1_score(gold, said, average="macro")


def test_texts_of_their_own_have_random_longest_and_shortest():
    rows = questions(11)
    found = baselines(make_task(CHOICE, rows), run_task)
    expected = {
        "random": np.mean([1 / len(row["choices"]) for row in rows]),
        "longest": np.mean([row["answer"] == int(np.argmax(list(map(len, row["choices"])))) for row in rows]),
        "shortest": np.mean([row["answer"] == int(np.argmin(list(map(len, row["choices"])))) for row in rows])}
    assert {len(row["choices"]) for row in rows} == {3, 4} and expected["longest"] != expected["shortest"]
    # Normalising by length changes no baseline: the chosen answer has all the probability.
    assert found == {"acc": pytest.approx(expected), "acc_norm": pytest.approx(expected)}
    part = baselines(make_task(CHOICE, rows), run_task, limit=3)
    assert part["acc"]["random"] == pytest.approx((1 / 3 + 1 / 4 + 1 / 3) / 3)


@pytest.mark.parametrize("labels", [[0] * 5 + [1] * 9, [1, 0] * 6, [1] * 4 + [0] * 16])
def test_classes_have_random_and_majority(labels):
    found = baselines(make_task(LABELS, labelled(labels)), run_task)
    common = int(sum(labels) > len(labels) / 2)
    assert found["acc"] == pytest.approx({"random": 0.5, "majority": np.mean([label == common for label in labels])})
    assert found["f1"]["majority"] == pytest.approx(macro_f1(labels, [common] * len(labels)))
    draws = [[int(draw.integers(2)) for _ in labels] for draw in map(np.random.default_rng, range(DRAWS))]
    assert found["f1"]["random"] == pytest.approx(np.mean([macro_f1(labels, draw) for draw in draws]))
    assert baselines(make_task(LABELS, labelled(labels)), run_task) == found, "draws are seeded"


def test_balanced_classes_give_a_third():
    """ASSIN 2 and HateBR are balanced; FaQuAD-NLI's test rows are not, and saying no to everything scores 43.97."""
    assert baselines(make_task(LABELS, labelled([0, 1] * 20)), run_task)["f1"]["majority"] == pytest.approx(1 / 3)
    faquad = labelled([0] * 51 + [1] * 14)  # a tenth of the official 650, 78.5 % of one class
    assert 100 * baselines(make_task(LABELS, faquad), run_task)["f1"]["majority"] == pytest.approx(43.97, abs=0.005)


def test_classes_whose_choices_are_whole_sentences():
    config = PAIR | {"doc_to_target": "{{label}}", "metric_list": [F1]}
    rows = [row | {"label": int(number < 2)} for number, row in enumerate(PAIRS)]
    found = baselines(make_task(config, rows), run_task)
    assert set(found["f1"]) == {"random", "majority"}
    assert found["f1"]["majority"] == pytest.approx(macro_f1([1, 1, 0, 0, 0, 0], [0] * 6))


def test_letters_pairs_and_blanks():
    letters = CHOICE | {"doc_to_choice": ["A", "B", "C"], "doc_to_target": "{{['A', 'B', 'C'][answer % 3]}}"}
    rows = questions(12)
    gold = Counter(row["answer"] % 3 for row in rows)
    found = baselines(make_task(letters, rows), run_task)
    assert found["acc"] == pytest.approx({"random": 1 / 3, "majority": max(gold.values()) / 12}), "by letter as by number"
    some = letters | {"doc_to_choice": "{{['A', 'B', 'C', 'D'][:choices|length]}}", "doc_to_target": "{{answer}}"}
    gold = Counter(row["answer"] for row in rows)
    found = baselines(make_task(some, rows), run_task)
    assert found["acc"]["majority"] == max(gold.values()) / 12, "some questions have three letters, some four"
    assert baselines(make_task(PAIR, PAIRS), run_task)["acc"] == pytest.approx({
        "random": 0.5, "longest": np.mean([len(row["good"]) >= len(row["bad"]) for row in PAIRS]),
        "shortest": np.mean([len(row["good"]) <= len(row["bad"]) for row in PAIRS])})
    assert baselines(make_task(BLANK, BLANKS), run_task)["acc"] == {"random": 0.5}, "both end in the same words"


def test_a_share_of_probability():
    """TruthfulQA's second metric: the expected share of the true answers is how many of all there are."""
    config = CHOICE | {"process_results": FUNCTIONS["truthfulqa_mc2"], "metric_list": [ACC],
                       "doc_to_choice": "{{mc2_targets.choices}}", "doc_to_target": 0}
    truths = [[1, 0, 0, 0], [1, 1, 0], [1, 1, 1, 0, 0]]
    rows = [{"question": f"Q{number}?", "mc2_targets": {"choices": ["abc"[number] * (place + 1) for place in range(len(labels))],
                                                        "labels": labels}} for number, labels in enumerate(truths)]
    found = baselines(make_task(config, rows), run_task)
    assert found["acc"] == pytest.approx({"random": np.mean([1 / 4, 2 / 3, 3 / 5]), "longest": 0, "shortest": 1})


def test_generated_answers():
    rows = [{"question": f"{number} ou {number + 1}?", "choices": ["sim", "não"], "answer": int(number < 3)} for number in range(9)]
    found = baselines(make_task(GENERATE, rows), run_task)
    assert found == {"exact_match": pytest.approx({"majority": 6 / 9, "random": 0.5})}
    assert baselines(make_task(GENERATE, rows[:1]), run_task) == {}, "an answer of its own is no class"


@pytest.mark.parametrize("config", [ROLLING, LAST_WORD])
def test_what_has_no_choices_has_no_baselines(config):
    assert baselines(make_task(config, questions(4)), run_task) == {}
    with pytest.raises(DataError, match="a baseline has none"):
        FixedAnswers().rolling(["a"])


def test_the_rows_are_read_once_and_faults_are_told():
    reads = []
    task = make_task(LABELS, labelled([0, 1]))
    load = task.load
    counted = make_task(LABELS, [], load=lambda: (reads.append(1), load())[1])
    baselines(counted, run_task)
    assert reads == [1]
    with pytest.raises(DataError, match="answers that are none of the choices"):
        baselines(make_task(LABELS, labelled([0, 5])), run_task)


def test_real_rows(shared_data):
    """ARC in Portuguese: a quarter by chance; hate speech: the majority is what scikit-learn says."""
    def read(name):
        return [json.loads(line) for line in (shared_data / "tasks" / name).read_text(encoding="utf-8").splitlines()]

    arc = baselines(make_task(CHOICE, read("arc_challenge_pt.sample.jsonl")), run_task)
    assert arc["acc_norm"]["random"] == pytest.approx(0.25, abs=0.002)
    rows = [{"question": row["text"], "label": row["label"]} for row in read("hatebr.sample.jsonl")]
    labels = [row["label"] for row in rows]
    found = baselines(make_task(LABELS, rows), run_task)
    assert found["f1"]["majority"] == pytest.approx(macro_f1(labels, [Counter(labels).most_common(1)[0][0]] * len(labels)))
    assert found["f1"]["random"] == pytest.approx(0.5, abs=0.05)
