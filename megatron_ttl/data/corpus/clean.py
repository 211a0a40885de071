"""Clean one unit of rows: make documents, take them through the steps, and write what stays and what goes.

A unit's completion record is written last: a run that was killed takes up what has one, and does the rest again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from megatron_ttl.data.corpus.decontaminate import build_decontaminator
from megatron_ttl.data.corpus.document import Document, Dropped, Step
from megatron_ttl.data.corpus.filters import build_steps
from megatron_ttl.data.corpus.inputs import Input
from megatron_ttl.data.corpus.predicates import Predicate
from megatron_ttl.data.corpus.read import Unit
from megatron_ttl.data.corpus.records import shown, to_document
from megatron_ttl.data.corpus.settings import CorpusFile, SourceSettings, where_of
from megatron_ttl.data.corpus.shards import dropped_record, to_line, to_record, write_lines
from megatron_ttl.data.corpus.tally import Examples, Tally, difference
from megatron_ttl.data.documents import BadLine
from megatron_ttl.errors import ConfigError, collected, raise_faults
from megatron_ttl.files import write_text
from megatron_ttl.tokenizer.tokenizer import Tokenizer

UNREADABLE = "unreadable"
_FAULTS = 5  # bad lines that are named in an error


@dataclass(frozen=True)
class Job:
    """One unit of work for a process."""

    settings: str
    """The corpus file, as JSON."""
    wanted: Input
    unit: Unit
    stem: str
    """Path of the unit's files, to which `.clean.jsonl.zst`, `.dropped.jsonl.zst` and `.json` are added."""
    state: str
    """What the result depends on: settings and input, as a checksum."""


@dataclass(frozen=True)
class Stage:
    """A named step, or a predicate."""

    name: str
    step: Step | None = None
    predicate: Predicate | None = None
    keeps: bool = False
    """Whether the predicate must hold, and not fail."""
    order: int = 0
    """Where its rules stand in the report: the same for all sources, of which some leave stages out."""


def stages_of(settings: CorpusFile, source: int) -> list[Stage]:
    """Build what every document of a source goes through, in order.

    Predicates that read no notes come first, for they cost nothing.

    Raises:
        ConfigError: with every model, preset, pack or library that a stage needs and that is not there.
    """
    wanted = settings.source[source]
    where = where_of(wanted)
    predicates = [
        Stage(f"{kind}_where.{number}", predicate=predicate, keeps=kind == "keep", order=60 * predicate.reads_notes)
        for kind, found in (("keep", where.keep), ("drop", where.drop)) for number, predicate in enumerate(found, 1)]
    stages, faults = predicates, []
    for build in (_filters, _toxicity, _decontamination):
        with collected(faults):
            stages += build(settings, wanted)
    raise_faults(ConfigError, faults)
    return sorted(stages, key=lambda stage: stage.order)


def _filters(settings: CorpusFile, source: SourceSettings) -> list[Stage]:
    if settings.filters is None or not source.filters:
        return []
    return [Stage(name, step, order=10 + number) for number, (name, step) in enumerate(build_steps(settings.filters))]


def _toxicity(settings: CorpusFile, source: SourceSettings) -> list[Stage]:
    if settings.toxicity is None:
        return []
    from megatron_ttl.data.corpus.toxicity import toxicity_step

    stages = [Stage("toxicity", toxicity_step(Path(settings.toxicity.model)), order=50)]
    if settings.toxicity.keep_below is not None:
        stages.append(Stage("toxicity", _keep_below(settings.toxicity.keep_below), order=50))
    return stages


def _decontamination(settings: CorpusFile, source: SourceSettings) -> list[Stage]:
    if settings.decontamination is None:
        return []
    return [Stage("decontamination", build_decontaminator(settings.decontamination), order=70)]


def _keep_below(limit: float) -> Step:
    def step(document: Document) -> Document | Dropped:
        probability = document.notes["toxicity"]
        return document if probability < limit else Dropped("toxicity", probability, f"< {limit}")

    return step


def clean_unit(job: Job) -> dict[str, Any]:
    """Clean a unit, write its three files, and return its record."""
    settings = _settings(job.settings)
    tally, examples = Tally(), Examples(settings.corpus.examples, settings.corpus.seed)
    kept: list[Document] = []
    dropped: list[tuple[Document, Dropped, int]] = []
    unreadable: list[dict[str, Any]] = []
    stages = _stages(job.settings, job.wanted.source)
    for row in job.unit.rows:
        document = to_document(row, settings.source[job.wanted.source], job.wanted.format == "txt")
        tally.rows += 1
        if document is None:
            tally.blank += 1
        elif isinstance(document, BadLine):
            tally.unreadable[document.reason] += 1
            unreadable.append({"rule": UNREADABLE, "value": document.reason, "limit": "a document", **shown(row)})
        else:
            end = _through(document, stages, tally, examples)
            if isinstance(end, Document):
                kept.append(end)
            else:
                dropped.append(end)
    kept = _counted(kept, dropped, tally, settings.corpus.tokenizer)
    write_lines(f"{job.stem}.clean.jsonl.zst", (to_line(to_record(document)) for document in kept))
    write_lines(f"{job.stem}.dropped.jsonl.zst",
                map(to_line, [*unreadable, *(dropped_record(document, why) for document, why, _ in dropped)]))
    bad = [f"{entry['file']}:{entry['line']}:{'' if entry['byte'] is None else str(entry['byte']) + ':'} {entry['value']}; "
           "every line or row must be a document; repair or remove it" for entry in unreadable[:_FAULTS]]
    name = settings.source[job.wanted.source].name
    record = {"state": job.state, "source": name, "tally": tally.to_json(), "changes": examples.to_json(), "bad": bad}
    write_text(f"{job.stem}.json", to_line(record).decode())
    return record


def _through(document: Document, stages: Sequence[Stage], tally: Tally,
             examples: Examples) -> Document | tuple[Document, Dropped, int]:
    """Take one document through the stages; count what changes it, and what it lacks."""
    size = len(document.text.encode("utf-8"))
    tally.read.add(1, size, 0)
    for stage in stages:
        if stage.predicate is not None:
            holds = stage.predicate.holds(document)
            if holds is None:
                tally.unknown[stage.predicate.text] += 1
            if bool(holds) != stage.keeps:
                limit = stage.predicate.text if stage.keeps else f"not {stage.predicate.text}"
                return document, Dropped(stage.name, stage.predicate.measured(document), limit), stage.order
            continue
        assert stage.step is not None
        end = stage.step(document)
        if isinstance(end, Dropped):
            return document, end, stage.order
        if end.text != document.text:
            after = len(end.text.encode("utf-8"))
            tally.change(stage.name, size - after, 0)
            if examples.wants(stage.name, document.id):
                examples.add(stage.name, document.id, {"id": document.id, **difference(document.text, end.text)})
            size = after
        document = end
    return document


def _counted(kept: list[Document], dropped: list[tuple[Document, Dropped, int]], tally: Tally,
             tokenizer: str | None) -> list[Document]:
    """Count documents, bytes and tokens of what stays and of what goes; note its tokens with every document that stays."""
    texts = [document.text for document in kept] + [document.text for document, _, _ in dropped]
    tokens = [len(ids) for ids in load_tokenizer(tokenizer).encode_batch(texts)] if tokenizer else [0] * len(texts)
    for text, count in zip(texts[:len(kept)], tokens, strict=False):
        tally.kept.add(1, len(text.encode("utf-8")), count)
    for (document, why, stage), count in zip(dropped, tokens[len(kept):], strict=True):
        tally.lose(why.rule, stage, len(document.text.encode("utf-8")), count)
    tally.read.tokens = tally.kept.tokens + sum(amount.tokens for amount in tally.lost.values())
    if tokenizer is None:
        return kept
    return [document.with_note("tokens", count) for document, count in zip(kept, tokens, strict=False)]


@cache
def _settings(text: str) -> CorpusFile:
    return CorpusFile.model_validate_json(text)


@cache
def _stages(text: str, source: int) -> list[Stage]:
    return stages_of(_settings(text), source)


@cache
def load_tokenizer(folder: str) -> Tokenizer:
    """Load a tokenizer once per process."""
    return Tokenizer.load(folder)
