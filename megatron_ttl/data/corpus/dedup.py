"""Find documents that a corpus has twice: the same text, nearly the same, and paragraphs that stand everywhere.

Of a cluster the first document stays: by source where `prefer` names some, then by shard, then by line. So what stays
depends neither on lengths nor on workers, and a document of a shard that is added at the end takes the place of none before.

First come exact copies, then near ones among the rest, then paragraphs of what is left: a paragraph of a dropped
document never counts as the first.

Memory: 31 bytes per document in all (47 with `prefer`), at most 0.4 GiB while keys are sorted, and per worker 900 bytes per
document of its shard. So 2 GiB hold 50 million documents. Disk, in the work folder: per document 256 bytes with 14 bands,
4 more for each hash where `min_similarity` asks for signatures, 24 while clusters are joined; and 28 per long paragraph.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ttl.data.corpus.clusters import Numbers, exact_clusters, join_band, load_parents, save_parents, settle
from megatron_ttl.data.corpus.decisions import Decision, Verdict, read_decisions
from megatron_ttl.data.corpus.dedup_settings import DedupSettings
from megatron_ttl.data.corpus.minhash import collision_probability
from megatron_ttl.data.corpus.scan import Scan, scan_shard
from megatron_ttl.data.processes import in_processes
from megatron_ttl.errors import DataError, raise_faults
from megatron_ttl.files import atomic_directory, checksum_bytes, make_directory, or_disk_error, write_json

__all__ = ["Decision", "DedupResult", "DedupSettings", "find_duplicates"]

_OURS = re.compile(r"scan-\d{5,}-[0-9a-f]{32}|(stages|result)-[0-9a-f]{32}|\.(scan|result)-.*\.(tmp|former)-\d+")


@dataclass(frozen=True)
class DedupResult:
    """What becomes of the documents of all shards."""

    folder: Path
    """Holds `report.json` and `decisions-<shard>.jsonl`."""
    report: dict[str, Any]
    """Counts, clusters, pairs of sources, settings: JSON values."""

    def of_shard(self, number: int) -> dict[int, Decision]:
        """Return the decisions for a shard, by line from 1; a document without one stays as it is."""
        return read_decisions(self.folder / f"decisions-{number:05}.jsonl")


def find_duplicates(shards: Sequence[Path], settings: DedupSettings, work: Path, workers: int,
                    on_progress: Callable[[float], None] | None = None) -> DedupResult:
    """Find the duplicates in clean shards; a run that was killed goes on where it stood.

    Args:
        shards: zstandard-packed JSON lines, in the order that decides what stays.
        work: a folder of its own for what is kept between runs; what belongs to other shards or settings is deleted.
        workers: processes that read shards; with 1 this process does it. The result does not depend on it.
        on_progress: is given the bytes of shards that are read.

    Raises:
        DataError: a shard is missing, damaged or given twice, a library is missing, or a worker died.
        DiskError: the disk is full.
    """
    raise_faults(DataError, _faults(shards, workers))
    work = Path(work)
    with or_disk_error(work):
        make_directory(work)
    scans = _scan(shards, settings, work, workers, on_progress)
    key = checksum_bytes(json.dumps([settings.model_dump_json(), *(scan.folder.name for scan in scans)]).encode("utf-8"))
    result, stages = (work / f"{kind}-{key.removeprefix('xxh3:')}" for kind in ("result", "stages"))
    with or_disk_error(work):
        _remove_others(work, {result.name, stages.name, *(scan.folder.name for scan in scans)})
        if not result.is_dir():
            verdict = _compare(scans, settings, stages)
            with atomic_directory(result) as draft:
                report = verdict.write(draft, settings.paragraph_min_documents if settings.paragraphs else None)
                write_json(draft / "report.json", {**report, **_expectations(settings)})
        shutil.rmtree(stages, ignore_errors=True)
    return DedupResult(result, json.loads((result / "report.json").read_text(encoding="utf-8")))


def _faults(shards: Sequence[Path], workers: int) -> list[str]:
    faults = [f"{path}: is no file; it must be a clean shard; prepare it again" for path in shards if not path.is_file()]
    faults += [f"{path}: is given twice; every shard is compared once; leave one out"
               for path in dict.fromkeys(shards) if list(shards).count(path) > 1]
    if workers < 1:
        faults.append(f"workers: is {workers}; it must be at least 1; leave it out for 1")
    return faults


def _scan(shards: Sequence[Path], settings: DedupSettings, work: Path, workers: int,
          on_progress: Callable[[float], None] | None) -> list[Scan]:
    scan_one = partial(scan_shard, settings, work)
    numbered = list(enumerate(shards))
    results = (((item, scan_one(item)) for item in numbered) if workers == 1 else
               in_processes(scan_one, numbered, workers, "use fewer workers, or smaller shards (a worker needs about "
                                                         "900 bytes per document of a shard)"))
    scans, done = [], 0
    with closing(results):
        for (_, shard), name in results:
            scans.append(Scan(work / name))
            done += shard.stat().st_size
            if on_progress is not None:
                on_progress(done)
    return scans


def _remove_others(work: Path, used: set[str]) -> None:
    for entry in list(work.iterdir()):
        if _OURS.fullmatch(entry.name) and entry.name not in used:
            shutil.rmtree(entry)


def _compare(scans: Sequence[Scan], settings: DedupSettings, stages: Path) -> Verdict:
    """Find the clusters: exact copies first, then a band at a time; each stage is kept."""
    make_directory(stages)
    numbers = Numbers(scans, settings.prefer)
    first = load_parents(stages, 0)
    if first is None:
        first = exact_clusters(scans, numbers) if settings.exact else np.arange(numbers.count)
        save_parents(stages, 0, first)
    parents, alive = first.copy(), first == np.arange(numbers.count)
    bands = settings.bands if settings.near else 0
    done = next((stage for stage in range(bands, 0, -1) if (stages / f"stage-{stage:03}.bin").is_file()), 0)
    if done:
        parents = load_parents(stages, done)
        assert parents is not None
    for band in range(done, bands):
        join_band(scans, numbers, band, settings, parents, alive)
        save_parents(stages, band + 1, parents)
        if band:
            (stages / f"stage-{band:03}.bin").unlink()
    return Verdict(scans, numbers, first, settle(parents))


def _expectations(settings: DedupSettings) -> dict[str, Any]:
    """Return the settings, and how surely they find what is how similar."""
    found = {f"{similarity:.1f}": round(collision_probability(similarity, settings.bands, settings.rows), 6)
             for similarity in (0.5, 0.6, 0.7, 0.8, 0.9)} if settings.near else {}
    return {"found_with_probability_at_similarity": found, "settings": settings.model_dump(mode="json")}
