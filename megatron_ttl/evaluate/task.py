"""What an evaluation is about: a task, what is asked of a model, and what came out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

Documents = Mapping[str, Sequence[Mapping[str, Any]]]
"""Rows of a task's data, per split."""


@dataclass(frozen=True)
class TaskData:
    """The rows of a task, and what is known of them."""

    splits: Documents
    """`test`, and `fewshot` where the task has its own rows for demonstrations."""
    checksum: str
    """Of all rows that were read, whatever file or column order they came in."""
    origin: str
    """File names without folders, or the data set of the hub."""
    sample: bool = False
    """Whether the file says of itself that it is only a part of the real test set (`*.sample.jsonl`)."""


@dataclass(frozen=True)
class Task:
    """One definition: data, prompt, shots and metrics; another prompt or metric is another task."""

    name: str
    version: str
    definition: str
    """Who defined prompt and metric: `lm-eval`, `ttl-paper`, `tinyllama-paper`, `leaderboard-pt` or `megatron_ttl`."""
    language: str
    """Of the items."""
    prompt_language: str
    """Of the words around them."""
    shots: int
    """Demonstrations before every question, unless asked otherwise."""
    metrics: tuple[str, ...]
    """As they are called in records; the first one is the task's score."""
    config: Mapping[str, Any]
    """The keys that lm-eval reads, functions resolved; without data."""
    source: str
    """Where the items come from: paper, data set."""
    license: str
    load: Callable[[], TaskData] = field(repr=False)
    """Reads the rows; a DataError says what is wrong with them."""
    prompt_checksum: str = ""
    """Of everything in the definition that a model gets to see or that decides how answers are counted."""
    tags: tuple[str, ...] = ()
    demonstrations_column: str | None = None
    """The demonstrations of an item are those that agree with it in this key (MMLU: `subject`); None: all are its own."""


@dataclass(frozen=True)
class Request:
    """How likely is this continuation after this context?"""

    context: str
    continuation: str
    item: int
    """Number of the document in the test split."""
    choice: int = 0
    """Number of the request among those of the document."""


@dataclass(frozen=True)
class GenerationRequest:
    """What follows this context, greedily?"""

    context: str
    until: tuple[str, ...]
    """Texts that end the answer; they are not part of it."""
    max_new_tokens: int
    item: int
    choice: int = 0
    temperature: float = 0.0
    """0: greedy. Above: sampled, seeded by item and choice (pass@k needs several answers)."""


class Answerer(Protocol):
    """Whatever answers requests: a model, or a baseline that knows nothing."""

    def loglikelihood(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """Return for each request the log-probability in nats, and whether greedy decoding would say it."""
        ...

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """Return for each text its log-probability in nats, every token predicted once."""
        ...

    def generate(self, requests: Sequence[GenerationRequest]) -> list[str]:
        """Return the answers."""
        ...


@dataclass(frozen=True)
class Measured:
    """A figure and its standard error."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class TaskResult:
    """What came out."""

    task: Task
    shots: int
    limit: int | None
    metrics: Mapping[str, Measured]
    items: Sequence[Mapping[str, Any]]
    """One per document: `item` (number), `target`, `answers` (log-likelihoods, or texts), and its metrics by name."""
    data: TaskData
    request_checksum: str
    """Of all contexts and continuations: two results with the same one were asked the same, word for word."""
    truncated: int = 0
    """Requests whose context was cut on the left to fit the model."""
