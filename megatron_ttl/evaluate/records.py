"""Keep scores as rows that say all that a score depends on."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

_MODEL = ConfigDict(strict=True, frozen=True, extra="forbid", use_attribute_docstrings=True)


class ScoredModel(BaseModel):
    """Which weights were asked."""

    model_config = _MODEL

    name: str
    """Name of the model folder or the run, without its place."""
    checksum: str
    """Of the weights: of the files' own checksums, or the checkpoint's manifest."""
    parameters: int
    run: str | None = None
    step: int | None = None
    tokens: int | None = None
    """Training tokens seen."""
    kwh: float | None = None
    """Energy spent on training so far, as the run measured it."""


class ScoreRecord(BaseModel):
    """One score: a line of `scores.jsonl`."""

    model_config = _MODEL

    time: str
    """UTC, ISO 8601, seconds."""
    model: ScoredModel
    task: str
    version: str
    definition: str
    language: str
    prompt_language: str
    shots: int
    limit: int | None = None
    """Only the first so many items; None: all that are there."""
    metric: str
    value: float
    stderr: float | None = None
    n: int
    """Items that were scored."""
    prompt_checksum: str
    data_checksum: str
    request_checksum: str
    data: str
    """Names of the data files, or the data set of the hub."""
    sample: bool = False
    """Whether the data are only a sample of the real test set: then no table shows it beside real ones."""
    truncated: int = 0
    """Requests whose context did not fit and was cut on the left."""
    contaminated: int | None = None
    """Items that share 13 words in a row with the training data; None: not looked for."""
    baselines: dict[str, float] = Field(default_factory=dict)
    """The same metric for answers that need no model: `random`, `majority`, `longest`."""
    device: str = "cpu"
    dtype: str = "float32"
    batch: int = 1
    seed: int = 0
    seconds: float = 0.0
    versions: dict[str, str] = Field(default_factory=dict)
    """lm_eval, torch, megatron_ttl and whatever else decides."""
