"""Tasks of a few rows, and answerers that know nothing but arithmetic, for the tests of evaluation."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_ttl.evaluate.task import GenerationRequest, Request, Task, TaskData

ACC = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
ACC_NORM = {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True}
_PLACES = ("na feira", "no porto", "na escola", "à beira do rio", "no quintal")
_THINGS = ("um cesto de mangas", "a rede de pesca", "três laranjas", "o café", "uma canção antiga", "a chuva")


def questions(count: int) -> list[dict[str, Any]]:
    """Compose questions with three or four answers."""
    rows = []
    for number in range(count):
        choices = [_THINGS[(number + place * 2 + 1) % 6] for place in range(3 + number % 2)]
        rows.append({"id": f"q{number}", "question": f"O que ela viu {_PLACES[number % 5]} no dia {number}?",
                     "choices": choices, "answer": (number * 7) % len(choices)})
    return rows


CHOICE = {"output_type": "multiple_choice", "doc_to_text": "Pergunta: {{question}}\nResposta:", "doc_to_choice": "choices",
          "doc_to_target": "answer", "metric_list": [ACC, ACC_NORM]}
PAIR = {"output_type": "multiple_choice", "doc_to_text": "", "doc_to_choice": "{{[good, bad]}}", "doc_to_target": 0,
        "target_delimiter": "", "metric_list": [ACC]}
GENERATE = {"output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{choices[answer]}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]}
BLANK = {"output_type": "multiple_choice", "doc_to_text": "answer", "doc_to_choice": "{{[before + a, before + b]}}",
         "doc_to_target": "after", "metric_list": [ACC]}
ROLLING = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}",
           "metric_list": [{"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False},
                           {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}]}
LAST_WORD = {"output_type": "loglikelihood", "doc_to_text": "{{question}}", "doc_to_target": " {{choices[0]}}",
             "metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}, ACC]}
PAIRS = [{"good": f"As meninas viram {thing}.", "bad": f"As meninas viu {thing}."} for thing in _THINGS]
BLANKS = [{"before": f"Choveu {place} e ", "a": "a ponte", "b": "o barco", "answer": number % 2, "after": "ficou molhado."}
          for number, place in enumerate(_PLACES)]


def make_task(config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], name: str = "toy", shots: int = 0,
              fewshot: Sequence[Mapping[str, Any]] | None = None, metrics: tuple[str, ...] | None = None,
              version: str = "1.0", load: Any = None) -> Task:
    """Make a task over rows that are at hand."""
    splits = {"test": rows} | ({"fewshot": fewshot} if fewshot is not None else {})
    return Task(name, version, "megatron_ttl", "pt", "pt", shots,
                metrics or tuple(entry["metric"] for entry in config["metric_list"]), config, "made for tests", "none",
                load or (lambda: TaskData(splits, "xxh3:0", "toy.jsonl")), "xxh3:1")


class Chance:
    """Answers that depend on the words alone, and on nothing else in the world."""

    def loglikelihood(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """Between -9 and 0."""
        values = [zlib.crc32(f"{request.context}|{request.continuation}".encode()) for request in requests]
        return [(-(value % 9001) / 1000, value % 3 == 0) for value in values]

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """Two nats per byte."""
        return [-2.0 * len(text.encode()) for text in texts]

    def generate(self, requests: Sequence[GenerationRequest]) -> list[str]:
        """Say some thing."""
        return [_THINGS[zlib.crc32(request.context.encode()) % 6] for request in requests]


class Indifferent(Chance):
    """Finds everything equally likely."""

    def loglikelihood(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """-1."""
        return [(-1.0, False) for _ in requests]
