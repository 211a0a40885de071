"""Let lm-eval ask any `Answerer`: its instances become requests, its answers come back in order."""

from __future__ import annotations

import inspect
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from megatron_ttl.errors import CheckpointError, DataError
from megatron_ttl.evaluate.task import Answerer, GenerationRequest, Request
from megatron_ttl.files import checksum_bytes

Bar = Callable[[int], AbstractContextManager[Callable[[float], None]]]
"""Opens a bar for so many requests; what it gives takes the number done. `console.progress` with a label is one."""

GENERATION_OPTIONS = frozenset({"until", "max_gen_toks", "do_sample", "temperature"})
"""What a task may ask of a generation; anything else would change the answers unseen."""
_NEW_TOKENS = 256  # lm-eval's own, where a task does not say
_SLICE = 512  # requests between two movements of the bar, for an answerer that does not report how far it is


class AnsweringModel:
    """The language model that lm-eval sees; `language_model` makes it one of lm-eval's."""

    def __init__(self, task: str, answerer: Answerer, bar: Bar | None = None) -> None:
        super().__init__()
        self.answering = False
        """Whether the answerer is at work: what fails then is no fault of the task."""
        self._task, self._answerer = task, answerer
        self._bar = bar or (lambda total: nullcontext(lambda done: None))
        self._asked: list[str] = []

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Answer instances whose arguments are (context, continuation)."""
        asked = [Request(*instance.args, item=instance.doc_id, choice=instance.idx) for instance in requests]
        for request in asked:
            self._note("loglikelihood", request.context, request.continuation)
            if not request.continuation:
                raise DataError(f"task {self._task}: item {request.item}, choice {request.choice}: is empty; it must "
                                "hold text to be scored; correct the row, or the pack's doc_to_choice")
        answers = self._answer(self._answerer.loglikelihood, asked)
        self._require_numbers(value for value, _ in answers)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Answer instances whose argument is (text,)."""
        texts = [instance.args[0] for instance in requests]
        for text in texts:
            self._note("rolling", text)
        answers = self._answer(self._answerer.rolling, texts)
        self._require_numbers(answers)
        return answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answer instances whose arguments are (context, options)."""
        asked, times = [], Counter()
        for instance in requests:
            context, options = instance.args
            self._note("generate", context, options)
            # A document that is asked several times (pass@k) gets answers that are drawn differently.
            asked.append(_generation(context, options, instance.doc_id, times[instance.doc_id]))
            times[instance.doc_id] += 1
        return self._answer(self._answerer.generate, asked)

    @property
    def request_checksum(self) -> str:
        """Of all that was asked so far, word for word and in order."""
        return checksum_bytes("\n".join(self._asked).encode())

    def _note(self, *parts: Any) -> None:
        self._asked.append(checksum_bytes(json.dumps(parts, sort_keys=True).encode()))

    def _answer(self, method: Callable[[Sequence[Any]], list[Any]], asked: Sequence[Any]) -> list[Any]:
        answers: list[Any] = []
        with self._bar(len(asked)) as report, self._at_work():
            if "progress" in inspect.signature(method).parameters:
                return method(asked, progress=report)
            for start in range(0, len(asked), _SLICE):
                answers += method(asked[start:start + _SLICE])
                report(len(answers))
        return answers

    @contextmanager
    def _at_work(self):
        self.answering = True
        yield  # what is raised here leaves it true
        self.answering = False

    def _require_numbers(self, values: Iterable[float]) -> None:
        if any(math.isnan(value) for value in values):
            raise CheckpointError(f"task {self._task}: the model answers with what is no number; a log-likelihood must "
                                  "be one; its weights are damaged or overflow in this dtype: try float32, or convert "
                                  "the checkpoint again")


def language_model(task: str, answerer: Answerer, bar: Bar | None = None) -> Any:
    """Return an `AnsweringModel` that is an `lm_eval.api.model.LM`.

    Args:
        task: its name, for errors.
        answerer: who is asked.
        bar: shows how many requests are done.
    """
    from lm_eval.api.model import LM

    class HarnessModel(AnsweringModel, LM):
        """Both."""

    return HarnessModel(task, answerer, bar)


def _generation(context: str, options: dict[str, Any], item: int, time: int) -> GenerationRequest:
    until = options.get("until") or ()
    drawn = float(options.get("temperature", 1.0)) if options.get("do_sample") else 0.0
    return GenerationRequest(context, (until,) if isinstance(until, str) else tuple(until),
                             int(options.get("max_gen_toks", _NEW_TOKENS)), item, time, drawn)
