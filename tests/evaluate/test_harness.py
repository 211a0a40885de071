"""Our way through lm-eval asks the same, gets the same and counts the same as lm-eval's own; and cannot be misused."""

from __future__ import annotations

import builtins
import math
import socket
from dataclasses import replace

import numpy as np
import pytest
from hf_backend import hf_backend
from small_tasks import (
    ACC,
    BLANK,
    BLANKS,
    CHOICE,
    GENERATE,
    LAST_WORD,
    PAIR,
    PAIRS,
    ROLLING,
    Chance,
    Indifferent,
    make_task,
    questions,
)

from megatron_ttl.errors import CheckpointError, ConfigError, DataError
from megatron_ttl.evaluate import harness
from megatron_ttl.evaluate.answer import ModelAnswerer
from megatron_ttl.generate.open_folder import open_model_folder

F1 = {"metric": "f1", "aggregation": "f1", "higher_is_better": True}
CASES = {
    "choice": (CHOICE, questions(9), None, 0),
    "choice, shots from the test rows": (CHOICE, questions(9), None, 3),
    "choice, shots of its own, first n": (CHOICE | {"fewshot_config": {"sampler": "first_n"}, "description": "Responda.\n\n"},
                                          questions(6), questions(14)[9:], 2),
    "f1": (CHOICE | {"doc_to_choice": ["sim", "não"], "doc_to_target": "{{answer % 2}}", "metric_list": [ACC, F1]},
           questions(9), None, 1),
    "pair": (PAIR, PAIRS, None, 0),
    "multiple inputs": (BLANK, BLANKS, None, 0),
    # One token: a random model says half characters, and transformers spells several of them otherwise than sentencepiece.
    "generate": (GENERATE | {"generation_kwargs": {"until": ["\n"], "max_gen_toks": 1}}, questions(5), None, 2),
    "rolling": (ROLLING, questions(5), None, 0),
    "last word": (LAST_WORD, questions(5), None, 0),
}


@pytest.fixture(scope="module")
def theirs(model_folder):
    return hf_backend(model_folder)


def lm_eval_alone(monkeypatch, model, config, rows, fewshot, shots, seed):
    import datasets
    import lm_eval.evaluator
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)  # asks pip, for half a second
    splits = {"test": datasets.Dataset.from_list(rows)}
    if fewshot:
        splits["fewshot"] = datasets.Dataset.from_list(fewshot)
    task = ConfigurableTask(config=config | {
        "task": "toy", "custom_dataset": lambda **_: splits, "test_split": "test", "num_fewshot": shots,
        "fewshot_split": "fewshot" if fewshot else "test"})
    return simple_evaluate(model, tasks=[task], bootstrap_iters=0, fewshot_random_seed=seed,
                           task_manager=TaskManager(include_defaults=False))


@pytest.mark.parametrize("config, rows, fewshot, shots", CASES.values(), ids=CASES)
def test_the_same_as_lm_eval_alone(monkeypatch, theirs, model_folder, config, rows, fewshot, shots):
    answerer = ModelAnswerer(open_model_folder(model_folder, "cpu"), batch=3)
    found = harness.run_task(make_task(config, rows, shots=shots, fewshot=fewshot), answerer, seed=5, standard_errors=False)
    expected = lm_eval_alone(monkeypatch, theirs, config, rows, fewshot, shots, seed=5)
    figures = expected["results"]["toy"]
    assert {f"{name},none": measured.value for name, measured in found.metrics.items()} == pytest.approx(
        {key: value for key, value in figures.items() if key.endswith(",none") and "_stderr" not in key}, rel=1e-5, abs=1e-6)
    assert len(found.items) == len(rows)
    for ours, sample in zip(found.items, expected["samples"]["toy"], strict=True):
        assert ours["item"] == sample["doc_id"] and ours["target"] == sample["target"]
        answers = [answer[0] if isinstance(answer, tuple) else answer for (answer,) in sample["resps"]]
        assert ours["answers"] == (answers if isinstance(answers[0], str) else pytest.approx(answers, abs=1e-4))
        for metric in sample["metrics"]:
            assert np.asarray(ours[metric]) == pytest.approx(np.asarray(sample[metric]), abs=1e-4)


def test_standard_errors_are_those_of_lm_eval(monkeypatch):
    from lm_eval.api.metrics import f1_score, mean_stderr, stderr_for_metric

    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    config, rows = CASES["f1"][0], questions(30)
    found = harness.run_task(make_task(config, rows), Chance())
    pairs = [item["f1"] for item in found.items]
    assert found.metrics["acc"].stderr == mean_stderr([item["acc"] for item in found.items]) > 0
    assert found.metrics["f1"].stderr == stderr_for_metric(f1_score, 200)(pairs) > 0
    assert harness.run_task(make_task(config, rows), Chance(), limit=1).metrics["acc"].stderr is None


def test_seeded_demonstrations_and_what_decides_the_checksum():
    task = make_task(CHOICE, questions(20), shots=4)
    first, again, other = (harness.run_task(task, Chance(), seed=seed) for seed in (1, 1, 2))
    assert first == replace(again, task=task)
    assert other.request_checksum != first.request_checksum
    limited = harness.run_task(task, Chance(), seed=1, limit=5)
    assert list(limited.items) == list(first.items)[:5] and limited.limit == 5
    none = harness.run_task(task, Chance(), shots=0, seed=1)
    assert none.shots == 0 and none.request_checksum == harness.run_task(task, Indifferent(), shots=0).request_checksum


class Listening(Chance):
    """Keeps what it was asked."""

    def __init__(self) -> None:
        self.asked = []

    def loglikelihood(self, requests):
        self.asked += requests
        return super().loglikelihood(requests)

    def generate(self, requests):
        self.asked += requests
        return super().generate(requests)


def test_a_row_is_never_its_own_demonstration():
    rows, listening = questions(8), Listening()
    harness.run_task(make_task(CHOICE, rows, shots=7), listening)
    for request in listening.asked:
        assert request.context.count(rows[request.item]["question"]) == 1
        assert request.context.count("Pergunta:") == 8 and request.continuation == " " + rows[request.item]["choices"][
            request.choice]
    with pytest.raises(DataError, match="8 rows to take demonstrations from; 9 are needed"):
        harness.run_task(make_task(CHOICE, rows, shots=8), Chance())


def test_prompts_whose_shots_are_fixed_and_samples_of_the_definition():
    fixed = CHOICE | {"num_fewshot": 0}
    assert harness.run_task(make_task(fixed, questions(3)), Chance(), shots=2).shots == 0
    own = CHOICE | {"fewshot_config": {"sampler": "first_n", "samples": questions(30)[28:]}}
    listening = Listening()
    harness.run_task(make_task(own, questions(3), shots=2), listening)
    assert all("dia 28?" in request.context and "dia 29?" in request.context for request in listening.asked)
    with pytest.raises(DataError, match="2 rows to take demonstrations from; 3 are needed"):
        harness.run_task(make_task(own, questions(3), shots=3), Chance())


def test_rows_are_processed_once_and_stay_as_they_were():
    calls = []

    def shout(rows):
        calls.append(len(rows))
        for row in rows:
            row["question"] = row["question"].upper()
        return [row for row in rows if row["answer"] != 1]

    rows, listening = questions(9), Listening()
    found = harness.run_task(make_task(CHOICE | {"process_docs": shout}, rows, shots=1), listening)
    assert calls == [9] and len(found.items) == sum(row["answer"] != 1 for row in rows)
    assert all("O QUE ELA VIU" in request.context for request in listening.asked) and rows == questions(9)


def test_ties_go_to_the_first_and_blank_answers_never_win_by_length():
    found = harness.run_task(make_task(CHOICE, questions(9)), Indifferent())
    assert [item["acc"] for item in found.items] == [float(row["answer"] == 0) for row in questions(9)]
    blank = [{"question": "?", "choices": ["", "sim"], "answer": 1}]
    assert harness.run_task(make_task(CHOICE, blank), Indifferent()).metrics["acc_norm"].value == 1
    with pytest.raises(DataError, match="task toy: item 0, choice 0: is empty"):
        harness.run_task(make_task(CHOICE | {"target_delimiter": ""}, blank), Chance())


def test_generation_is_asked_as_the_task_says():
    config = GENERATE | {"generation_kwargs": {"until": "\n\n", "do_sample": True, "temperature": 0.2}, "repeats": 3}
    listening = Listening()
    harness.run_task(make_task(config, questions(2)), listening)
    assert [(request.item, request.choice) for request in listening.asked] == [
        (item, time) for item in range(2) for time in range(3)]
    assert {(request.until, request.max_new_tokens, request.temperature) for request in listening.asked} == {
        (("\n\n",), 256, 0.2)}


def test_several_filters_are_several_metrics():
    config = GENERATE | {"filter_list": [{"name": "first", "filter": [{"function": "take_first"}]},
                                         {"name": "low", "filter": [{"function": "lowercase"},
                                                                    {"function": "take_first"}]}]}
    found = harness.run_task(make_task(config, questions(4), metrics=("exact_match",)), Chance())
    assert list(found.metrics) == ["exact_match", "exact_match,low"] and len(found.items) == 4
    assert set(found.items[0]) == {"item", "target", "answers", "exact_match", "exact_match,low"}


def test_the_bar_and_what_did_not_fit():
    from contextlib import contextmanager

    moves = []

    @contextmanager
    def bar(total):
        yield lambda done: moves.append((done, total))

    answerer = Chance()
    answerer.truncated = 3

    def count(requests, before=answerer.loglikelihood):
        answerer.truncated += len(requests)
        return before(requests)

    answerer.loglikelihood = count
    found = harness.run_task(make_task(PAIR, PAIRS), answerer, progress=bar)
    assert found.truncated == 12 and moves == [(12, 12)]


PAYLOADS = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ self.__init__.__globals__.__builtins__.__import__('os').system('touch /tmp/owned') }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ (''|attr('__class__'))|attr('__mro__') }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(lipsum) }}{{ lipsum.__globals__ }}",
    "{{ choices.append('x') }}",
)


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("key", ["doc_to_text", "description"])
def test_templates_reach_no_code(payload, key):
    with pytest.raises(DataError, match="task toy: its definition does not fit its rows .(SecurityError|UndefinedError)"):
        harness.run_task(make_task(CHOICE | {key: payload}, questions(2)), Chance())


MISTAKES = {
    "a name that no row has": (CHOICE | {"doc_to_text": "{{nothing}}"}, {}, "'nothing' is undefined"),
    "a template that is none": (CHOICE | {"doc_to_text": "{{ question"}, {}, "TemplateSyntaxError"),
    "a metric from the hub": (CHOICE | {"metric_list": [{"metric": "rouge", "aggregation": "mean"}]}, {},
                              "metric 'rouge': would be code from a hub"),
    "evaluate's metric": (CHOICE | {"metric_list": [ACC | {"hf_evaluate": True}]}, {}, "would be code from a hub"),
    "an option": (GENERATE | {"generation_kwargs": {"num_beams": 4}}, {}, "generation_kwargs.num_beams: is not known"),
    "prompts of others": (CHOICE | {"use_prompt": "promptsource:x"}, {}, "use_prompt: is not offered"),
    "a metric that is not measured": (CHOICE, {"metrics": ("f1",)}, "metrics: f1; what is measured is acc, acc_norm"),
    "a gold that is no choice": (CHOICE | {"doc_to_target": "{{answer + 2}}"}, {}, "2 answers that are none of the choi"),
    "no rows": (CHOICE | {"process_docs": lambda rows: []}, {}, "no item is left to ask about"),
}


@pytest.mark.parametrize("config, more, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_one_sentence(config, more, message):
    with pytest.raises((ConfigError, DataError), match=message):
        harness.run_task(make_task(config, questions(3), **more), Chance())


def test_what_fails_in_the_answerer_keeps_its_name():
    broken = Chance()
    broken.loglikelihood = lambda requests: [(math.nan, False) for _ in requests]
    with pytest.raises(CheckpointError, match="task toy: the model answers with what is no number"):
        harness.run_task(make_task(CHOICE, questions(2)), broken)
    broken.loglikelihood = lambda requests: [(1 / 0, False) for _ in requests]
    with pytest.raises(ZeroDivisionError):
        harness.run_task(make_task(CHOICE, questions(2)), broken)


def test_a_metric_that_overflows_is_said():
    sure = Chance()
    sure.loglikelihood = lambda requests: [(-1e4, False) for _ in requests]
    with pytest.raises(DataError, match="task toy: a metric is no number: it overflows"):
        harness.run_task(make_task(LAST_WORD, questions(3)), sure)
    nothing = CHOICE | {"metric_list": [ACC | {"aggregation": lambda items: math.nan}]}
    with pytest.raises(DataError, match="task toy: acc: is no number .nan. for these 3 items"):
        harness.run_task(make_task(nothing, questions(3)), Chance())


def test_no_network_no_word(monkeypatch, capfd, caplog):
    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    harness.run_task(make_task(CHOICE | {"metadata": {"version": 1.0}}, questions(9), shots=2), Chance())
    harness.run_task(make_task(GENERATE, questions(3)), Chance())
    assert capfd.readouterr() == ("", "") and not caplog.records


def test_without_lm_eval(monkeypatch):
    usual = builtins.__import__

    def absent(name, *arguments, **keywords):
        if name.startswith("lm_eval"):
            raise ImportError("No module named 'lm_eval'")
        return usual(name, *arguments, **keywords)

    harness._load_harness.cache_clear()
    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ConfigError, match="lm-eval is not installed .*; pip install 'megatron_ttl.evaluation.'"):
        harness.run_task(make_task(CHOICE, questions(2)), Chance())
