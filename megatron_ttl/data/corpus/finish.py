"""The last stage of a corpus: find duplicates among the clean units, and write the files that stay."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from megatron_ttl.console import progress
from megatron_ttl.data.corpus.clean import load_tokenizer
from megatron_ttl.data.corpus.document import Document, Dropped
from megatron_ttl.data.corpus.funnel import Funnel
from megatron_ttl.data.corpus.plan import DROPPED, Plan
from megatron_ttl.data.corpus.shards import dropped_record, from_record, to_line, to_record
from megatron_ttl.data.zstd_file import zstd_lines, zstd_writer
from megatron_ttl.files import checksum, fsync_directory, make_directory, write_json, write_text


def finish(plan: Plan, stems: list[Path], workers: int) -> dict[str, Any]:
    """Write documents, what was dropped, and the report under <work>/final; return what the manifest says of them.

    Raises:
        DataError: a unit is damaged, or a worker died.
        OSError: what the disk said.
    """
    final = plan.work / "final"
    shutil.rmtree(final, ignore_errors=True)
    make_directory(final / DROPPED)
    duplicates = _duplicates(plan, stems, workers)
    funnel = Funnel(plan.settings, duplicates.report if duplicates is not None else None)
    corpus = plan.settings.corpus
    with (_Shards(final, corpus.shard_format, corpus.shard_megabytes << 20) as shards,
          _DroppedLists(final / DROPPED) as dropped,
          progress("writing", len(stems), " units") as on_progress):
        for number, stem in enumerate(stems):
            record = json.loads(Path(f"{stem}.json").read_bytes())
            funnel.add_unit(record)
            for line in zstd_lines(f"{stem}.dropped.jsonl.zst"):
                entry = json.loads(line)
                dropped.add(entry["rule"], line)
                funnel.show(entry)
            decisions = duplicates.of_shard(number) if duplicates is not None else {}
            for place, line in enumerate(zstd_lines(f"{stem}.clean.jsonl.zst"), 1):
                if place not in decisions:
                    shards.add(line)
                    continue
                before = from_record(json.loads(line))
                after = decisions[place].apply(before)
                if isinstance(after, Dropped):
                    entry = dropped_record(before, after)
                    dropped.add(after.rule, to_line(entry))
                    funnel.lose(record["source"], entry)
                else:
                    after = _counted_again(after, corpus.tokenizer)
                    funnel.change(record["source"], before, after)
                    shards.add(to_line(to_record(after)))
            on_progress(number + 1)
    report = funnel.report()
    write_json(final / "report.json", report)
    write_text(final / "report.md", funnel.page(report))
    files = [*shards.files, *dropped.files]
    return {**{key: report[key] for key in ("read", "kept", "unreadable")},
            "files": [{"file": name, "bytes": (final / name).stat().st_size, "checksum": checksum(final / name),
                       "documents": count} for name, count in files]}


def _duplicates(plan: Plan, stems: list[Path], workers: int) -> Any:
    if plan.settings.dedup is None:
        return None
    from megatron_ttl.data.corpus.dedup import find_duplicates

    shards = [Path(f"{stem}.clean.jsonl.zst") for stem in stems]
    with progress("comparing", sum(path.stat().st_size for path in shards), "B") as on_progress:
        return find_duplicates(shards, plan.settings.dedup, plan.work / "dedup", workers, on_progress)


def _counted_again(document: Document, tokenizer: str | None) -> Document:
    return document if tokenizer is None else document.with_note(
        "tokens", len(load_tokenizer(tokenizer).encode_batch([document.text])[0]))


class _Shards:
    """The files of the corpus, each of about so many bytes before it is packed."""

    def __init__(self, folder: Path, format_: str, limit_bytes: int) -> None:
        self.files: list[tuple[str, int]] = []
        """Name and documents of each."""
        self._folder = folder
        self._format = format_
        self._limit = limit_bytes
        self._open = ExitStack()
        self._file: BinaryIO | None = None
        self._size = 0

    def add(self, line: bytes) -> None:
        """Write one document."""
        if self._file is None or self._size >= self._limit:
            self._open.close()
            name = f"documents-{len(self.files):05}.{self._format}"
            self.files.append((name, 0))
            self._file, self._size = self._open.enter_context(_packed(self._folder / name)), 0
        self._file.write(line)
        self._size += len(line)
        self.files[-1] = (self.files[-1][0], self.files[-1][1] + 1)

    def __enter__(self) -> _Shards:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._open.__exit__(*exception)
        fsync_directory(self._folder)


class _DroppedLists:
    """A packed list of what each rule has dropped."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open = ExitStack()
        self._lists: dict[str, BinaryIO] = {}
        self._counts: dict[str, int] = {}

    @property
    def files(self) -> list[tuple[str, int]]:
        """Name and entries of each list."""
        return [(f"{self._folder.name}/{name}", count) for name, count in sorted(self._counts.items())]

    def add(self, rule: str, line: bytes) -> None:
        """Write one entry."""
        name = re.sub(r"[^\w.-]", "_", rule) + ".jsonl.zst"
        if name not in self._lists:
            self._lists[name] = self._open.enter_context(_packed(self._folder / name))
            self._counts[name] = 0
        self._lists[name].write(line)
        self._counts[name] += 1

    def __enter__(self) -> _DroppedLists:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._open.__exit__(*exception)
        fsync_directory(self._folder)


@contextmanager
def _packed(path: Path) -> Iterator[BinaryIO]:
    """Open a file for lines, packed as its name says; it is on the disk when it is closed."""
    with open(path, "xb") as handle:
        if path.suffix == ".zst":
            with zstd_writer(handle) as packed:
                yield packed
        elif path.suffix == ".gz":
            with gzip.GzipFile("", "wb", 6, handle, mtime=0) as packed:  # no name and no time: the same bytes again
                yield cast(BinaryIO, packed)
        else:
            yield handle
        handle.flush()
        os.fsync(handle.fileno())
