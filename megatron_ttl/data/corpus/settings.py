"""The corpus file: which sources there are, what is filtered, and where the clean corpus goes.

[corpus], [[source]], and the tables of the stages, each of which is left out where its table is: [filters], [toxicity],
[dedup], [decontamination]. Unknown keys, wrong types and paths that lead nowhere are refused, all at once.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from megatron_ttl.config.describe import known_keys, show
from megatron_ttl.config.read import parse_toml, read_text
from megatron_ttl.config.schema import Section
from megatron_ttl.config.suggest import did_you_mean, nearest_keys, nearest_words, split_key
from megatron_ttl.config.validate import validate, without_indices
from megatron_ttl.data.corpus.decontaminate import DecontaminateSettings
from megatron_ttl.data.corpus.dedup_settings import DedupSettings
from megatron_ttl.data.corpus.filter_settings import FilterSettings
from megatron_ttl.data.corpus.predicates import Predicate, parse_predicate
from megatron_ttl.errors import ConfigError, raise_faults

Format = Literal["auto", "jsonl", "parquet", "csv", "tsv", "txt"]


class CorpusTable(Section):
    """Where the corpus goes, and how it is written."""

    output: str = Field(min_length=1)
    """Folder of the clean corpus, its report and what was dropped. Starting again with the same folder goes on."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the examples in the report."""
    examples: int = Field(default=20, ge=0, le=1000)
    """Examples per rule in the report."""
    shard_format: Literal["jsonl.zst", "jsonl.gz", "jsonl"] = "jsonl.zst"
    """How the documents are written; all are read by the tokenizer's trainer and by preprocessing."""
    shard_megabytes: int = Field(default=256, gt=0, le=2**20)
    """Size of a file of documents before it is packed, in MiB."""
    max_bad_fraction: float = Field(default=0.001, ge=0, le=1)
    """Share of the lines and rows that may be no documents; more is an error."""
    tokenizer: str | None = None
    """Tokenizer folder; with it the report counts tokens, and every document notes its own."""


class SourceSettings(Section):
    """One source of documents."""

    name: str = Field(min_length=1, max_length=100)
    """Name in ids and in the report; no two sources share one. Letters, digits, `_`, `-` and dots."""
    license: str = Field(min_length=1)
    """Licence of its documents, e.g. an SPDX identifier."""
    paths: tuple[str, ...] = ()
    """Files, or patterns with * and **, relative to the working folder; read in the order of their names."""
    format: Format = "auto"
    """`auto` goes by the suffix: .jsonl .json .ndjson .csv .tsv .txt, with or without .gz or .zst, and .parquet."""
    dataset: str | None = Field(default=None, min_length=1)
    """Instead of paths: a folder written by `save_to_disk`, a folder of data files, or a name on the Hugging Face hub."""
    dataset_config: str | None = Field(default=None, min_length=1)
    """Configuration of a dataset that has several."""
    split: str = Field(default="train", min_length=1)
    """Split of a dataset."""
    revision: str | None = Field(default=None, min_length=1)
    """Commit of a dataset on the hub; without it a later run may read another version."""
    text_key: str = Field(default="text", min_length=1)
    """Key or column of the text."""
    join_keys: tuple[str, ...] = ()
    """Instead of text_key: keys of the turns of an instruction, joined by an empty line."""
    license_key: str | None = Field(default=None, min_length=1)
    """Key of a document's own licence; where it has none, that of the source holds."""
    document: Literal["file", "paragraph", "line"] = "file"
    """What is one document of a text file; paragraphs are parted by empty lines."""
    keep_where: tuple[str, ...] = ()
    """Predicates that must all hold (corpus/predicates.py)."""
    drop_where: tuple[str, ...] = ()
    """Predicates of which none may hold."""
    filters: bool = True
    """Whether [filters] applies: instructions are too short for rules made for web pages."""

    @property
    def text_keys(self) -> tuple[str, ...]:
        """Keys of the record that become the text."""
        return self.join_keys or (self.text_key,)


class ToxicityTable(Section):
    """Note how toxic a classifier finds each document."""

    model: str = Field(min_length=1)
    """Folder written by tools/train_toxicity.py."""
    keep_below: float | None = Field(default=None, gt=0, le=1)
    """Drop documents with this probability or more; without it, it is only noted, for predicates when mixing."""


class CorpusFile(Section):
    """The whole corpus file."""

    corpus: CorpusTable
    """Where the corpus goes."""
    source: tuple[SourceSettings, ...] = Field(min_length=1)
    """Sources, in the order in which they are written."""
    filters: FilterSettings | None = None
    """Rules for every document."""
    toxicity: ToxicityTable | None = None
    """Toxicity classifier."""
    dedup: DedupSettings | None = None
    """Duplicates."""
    decontamination: DecontaminateSettings | None = None
    """Overlap with evaluation packs."""


@dataclass(frozen=True)
class Where:
    """The predicates of one source, parsed."""

    keep: tuple[Predicate, ...]
    drop: tuple[Predicate, ...]


def load_corpus_file(path: str | os.PathLike[str]) -> CorpusFile:
    """Return the checked settings of a corpus file.

    Raises:
        ConfigError: with every fault of the file.
    """
    path = Path(path)
    text, faults = read_text(path, "a corpus file in TOML", "--config")
    raise_faults(ConfigError, faults)
    raw, faults = parse_toml(text, path, "corpus file")
    raise_faults(ConfigError, faults)
    checked = validate(CorpusFile, raw, _unknown)
    found = list(checked.faults)
    if not {"source", "source[]"} & checked.wrong and not any(key.startswith("source") for key, _ in found):
        found += _source_faults(checked.value.source)
        if "dedup" not in checked.wrong and checked.value.dedup is not None:
            found += _prefer_faults(checked.value)
    raise_faults(ConfigError, (f"{path}: {key}: {fault}" for key, fault in found))
    return checked.value


def where_of(source: SourceSettings) -> Where:
    """Parse the predicates of a source that has been checked."""
    parsed = [[predicate for predicate in map(parse_predicate, texts) if isinstance(predicate, Predicate)]
              for texts in (source.keep_where, source.drop_where)]
    return Where(tuple(parsed[0]), tuple(parsed[1]))


def _unknown(key: str) -> tuple[str, set[str]]:
    """Return the fault of an unknown key, and the keys that were probably meant."""
    own = known_keys(CorpusFile)
    near = nearest_keys(without_indices(key), own)
    if near:
        return f"is not a key of the corpus file here; must be one of its keys; {did_you_mean(near)}", set(near)
    section = split_key(without_indices(key))[0]
    siblings = ", ".join(split_key(name)[1] for name in own if split_key(name)[0] == section)
    return f"is not a key of the corpus file; must be one of {siblings or 'its tables'}; remove it", set()


def _prefer_faults(settings: CorpusFile) -> list[tuple[str, str]]:
    names = [source.name for source in settings.source]
    return [(f"dedup.prefer[{number}]", f'is "{name}"; must be the name of a source; '
             + (did_you_mean(nearest_words(name, names)) if nearest_words(name, names) else "correct it"))
            for number, name in enumerate(settings.dedup.prefer if settings.dedup else ()) if name not in names]


def _source_faults(sources: tuple[SourceSettings, ...]) -> list[tuple[str, str]]:
    """Find what the schema cannot: names given twice, inputs given twice or not at all, predicates that say nothing."""
    faults: list[tuple[str, str]] = []
    names: dict[str, int] = {}
    for number, source in enumerate(sources):
        key = f"source[{number}]"
        first = names.setdefault(source.name.lower(), number)
        if first != number:
            faults.append((f"{key}.name", f'is "{source.name}", as that of source[{first}]; must be another; rename one'))
        if not re.fullmatch(r"[\w.-]+", source.name):
            faults.append((f"{key}.name", f"is {show(source.name)}; must be of letters, digits, _, - and dots; change it"))
        if bool(source.paths) == bool(source.dataset):
            faults.append((f"{key}.paths", "is missing; must name files, or `dataset` a dataset; add one of the two"
                           if not source.paths else "stands beside dataset; must be one of the two; remove the other"))
        if source.dataset is None:
            faults += [(f"{key}.{name}", "is for a dataset; must stand beside `dataset`; remove it")
                       for name in ("dataset_config", "revision") if getattr(source, name) is not None]
        if source.join_keys and "text_key" in source.model_fields_set:
            faults.append((f"{key}.join_keys", "stands beside text_key; must be one of the two; remove the other"))
        for name in ("keep_where", "drop_where"):
            for place, text in enumerate(getattr(source, name)):
                if isinstance(fault := parse_predicate(text), str):
                    faults.append((f"{key}.{name}[{place}]", fault))
    return faults
