"""Find the files that the sources of a corpus file name, and tell later whether they are still the same."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ttl.data.corpus.settings import CorpusFile, SourceSettings
from megatron_ttl.data.documents import without_packing
from megatron_ttl.errors import ConfigError, raise_faults
from megatron_ttl.files import checksum_bytes

_FORMATS = {".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv", ".txt": "txt",
            ".parquet": "parquet"}


@dataclass(frozen=True)
class Input:
    """What is read from its beginning to its end: a file, a dataset, or all text files of a source together."""

    source: int
    """Number of its source in the corpus file."""
    name: str
    """As the corpus file names it."""
    format: str
    """jsonl, csv, tsv, parquet, txt, or dataset."""
    paths: tuple[str, ...]
    """Its files; of a dataset on the hub none."""

    @property
    def size_bytes(self) -> int:
        """Bytes of its files, packed as they are."""
        return sum(os.path.getsize(path) for path in self.paths)

    def identity(self) -> str:
        """Return what changes when its files do: a checksum of their names, sizes and times."""
        states = [(path, os.stat(path)) for path in self.paths]
        return checksum_bytes(repr([self.name, self.format, *((path, state.st_size, state.st_mtime_ns)
                                                              for path, state in states)]).encode())


def find_inputs(settings: CorpusFile, config: str | os.PathLike[str]) -> list[Input]:
    """Return the inputs of all sources in the order in which they are read.

    Raises:
        ConfigError: with everything that keeps them from being read.
    """
    inputs: list[Input] = []
    faults: list[str] = []
    for number, source in enumerate(settings.source):
        where = f"{os.fspath(config)}: source[{number}]"
        if source.dataset is not None:
            inputs.append(Input(number, _dataset_name(source), "dataset", _files_under(source.dataset)))
            continue
        paths, more = _expanded(source.paths, where)
        formats = {path: _format_of(path, source) for path in paths}
        more += [f"{where}.paths: '{path}' has an unknown suffix; it must end in {', '.join(_FORMATS)}, text formats with "
                 "or without .gz or .zst; name its format" for path in paths if not formats[path]]
        faults += more
        texts = tuple(path for path in paths if formats[path] == "txt" and source.document == "file")
        inputs += [Input(number, path, formats[path], (path,)) for path in paths if path not in texts]
        if texts:
            inputs.append(Input(number, f"{len(texts)} text files", "txt", texts))
    raise_faults(ConfigError, faults)
    return inputs


def _dataset_name(source: SourceSettings) -> str:
    return "/".join(filter(None, (source.dataset, source.dataset_config, source.split)))


def _files_under(dataset: str) -> tuple[str, ...]:
    folder = Path(dataset)
    return tuple(sorted(str(path) for path in folder.rglob("*") if path.is_file())) if folder.is_dir() else ()


def _expanded(patterns: Sequence[str], where: str) -> tuple[list[str], list[str]]:
    """Return the files that patterns name, and the faults."""
    paths: list[str] = []
    faults: list[str] = []
    seen: set[str] = set()
    for number, pattern in enumerate(patterns):
        key = f"{where}.paths[{number}]"
        is_pattern = glob.has_magic(pattern) and not os.path.exists(pattern)
        found = [pattern]
        if is_pattern:
            found = [path for path in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(path)]
        if not found:
            faults.append(f"{key}: '{pattern}' matches no file; it must match at least one; correct it, or run where "
                          "its folder is")
        for path in found:
            if not os.path.exists(path):
                faults.append(f"{key}: '{path}' does not exist; it must be a file, or a pattern with *; correct the path")
            elif not os.path.isfile(path):
                faults.append(f"{key}: '{path}' is not a file; it must be one; write '{path}/*.jsonl' for those in a folder")
            elif not os.access(path, os.R_OK):
                faults.append(f"{key}: '{path}' cannot be read; it must be readable by you; change its permissions")
            elif (real := os.path.realpath(path)) in seen:
                faults.append(f"{key}: '{path}' is given twice; every input is read once; to repeat a source, give it a "
                              "larger weight in training")
            else:
                seen.add(real)
                paths.append(path)
    return paths, faults


def _format_of(path: str, source: SourceSettings) -> str:
    """Return how a file is to be read; empty if its name does not say so."""
    if source.format != "auto":
        return source.format
    return _FORMATS.get(os.path.splitext(without_packing(path.lower()))[1], "")
