"""Prepare a corpus: read, clean, filter, score, deduplicate, write; resumable, and the same for any number of workers.

Inputs are cut into units of a few megabytes; processes clean them and write each unit's result, its completion record
last. A run that was killed finds the records and does the rest. Duplicates are then found over all units, and the files of
the corpus are written one after the other under <output>/work and moved to their names at the end, `corpus.json` last.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_ttl.data.corpus.cleaning import Cleaning
from megatron_ttl.data.corpus.finish import finish
from megatron_ttl.data.corpus.plan import DROPPED, Plan, versions
from megatron_ttl.errors import ConfigError
from megatron_ttl.files import (
    fsync_directory,
    make_directory,
    open_own,
    or_disk_error,
    remove_leftovers,
    require_free_space,
    write_json,
)

MANIFEST = "corpus.json"
"""Written last: a folder that has it is complete."""
_REPORTS = ("report.json", "report.md")
_PACKED = (".gz", ".zst", ".parquet")


def prepare(plan: Plan, workers: int = 1, overwrite: bool = False, keep_work: bool = False) -> dict[str, Any]:
    """Prepare a corpus, or go on where an earlier run with the same corpus file ended.

    Args:
        plan: what `make_plan` returned.
        workers: processes; does not change the output.
        overwrite: whether to replace a finished corpus that other settings or inputs made.
        keep_work: leave <output>/work, so that a later run with another [dedup] need not clean again.

    Raises:
        ConfigError: the output holds another corpus, or another run writes into it.
        DataError: an input cannot be read, too much of it is no documents, or a worker died.
        DiskError: the disk does not take what is written.
    """
    if workers < 1:
        raise ConfigError(f"--workers: is {workers}; it must be at least 1; {os.cpu_count()} use the whole machine")
    with or_disk_error(plan.output), _locked(plan.output):
        manifest = _finished(plan, overwrite)
        if manifest is None:
            manifest = _work(plan, workers)
        if not keep_work and plan.work.exists():  # also of a run that was killed while it removed it
            shutil.rmtree(plan.work)
        return _result(plan, manifest)


def _work(plan: Plan, workers: int) -> dict[str, Any]:
    """Do all stages; return the manifest, which is written."""
    # What is read packed is written packed twice; text packs to less than half.
    needed = sum(wanted.size_bytes * (2 if wanted.name.lower().endswith(_PACKED) else 1) for wanted in plan.inputs)
    require_free_space(plan.output, needed, "the corpus with its unfinished parts")
    cleaning = Cleaning(plan)
    cleaning.run(workers)
    cleaning.remove_strays()
    manifest = {"fingerprint": plan.fingerprint(),
                "settings": plan.settings.model_dump(mode="json", exclude={"corpus": {"output"}}),
                "versions": versions(),
                "inputs": [{"source": source, "input": name, "format": format_, "bytes": size, "license": licence}
                           for source, name, format_, size, licence in plan.summary()],
                **finish(plan, cleaning.stems, workers)}
    _commit(plan, manifest)
    return manifest


def _finished(plan: Plan, overwrite: bool) -> dict[str, Any] | None:
    """Return the manifest of a corpus that is there and is what is asked for.

    Raises:
        ConfigError: another corpus is there.
    """
    path = plan.output / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        since = path.stat().st_mtime_ns
    except FileNotFoundError:
        return None
    except ValueError:
        manifest, since = {}, 0
    older = all(os.stat(file).st_mtime_ns <= since for wanted in plan.inputs for file in wanted.paths)
    if isinstance(manifest, dict) and manifest.get("fingerprint") == plan.fingerprint() and older:
        if all((plan.output / entry["file"]).is_file() and (plan.output / entry["file"]).stat().st_size == entry["bytes"]
               for entry in manifest["files"]):
            return manifest
    if not overwrite:
        raise ConfigError(f"{plan.config}: corpus.output: '{plan.output}' holds a corpus of other settings or inputs, or "
                          "one that was changed; a corpus is not overwritten unasked; choose another folder, or give "
                          "--overwrite")
    return None


def _commit(plan: Plan, manifest: dict[str, Any]) -> None:
    """Put the files of the corpus in place of an earlier one; it is complete when the manifest is there."""
    remove_leftovers(plan.output, [MANIFEST])
    (plan.output / MANIFEST).unlink(missing_ok=True)
    fsync_directory(plan.output)
    for old in [*plan.output.glob("documents-*.jsonl*"), *(plan.output / DROPPED).glob("*.jsonl.zst")]:
        old.unlink()
    make_directory(plan.output / DROPPED)
    for entry in [*manifest["files"], *({"file": name} for name in _REPORTS)]:
        os.replace(plan.work / "final" / entry["file"], plan.output / entry["file"])
    fsync_directory(plan.output / DROPPED)
    fsync_directory(plan.output)
    write_json(plan.output / MANIFEST, manifest)


def _result(plan: Plan, manifest: dict[str, Any]) -> dict[str, Any]:
    """Return what is told at the end."""
    read, kept = manifest["read"], manifest["kept"]
    return {"corpus": str(plan.output), "documents_read": read["documents"], "documents": kept["documents"],
            "bytes_read": read["bytes"], "bytes": kept["bytes"],
            **({"tokens": kept["tokens"]} if plan.settings.corpus.tokenizer else {}),
            "unreadable": manifest["unreadable"], "report": str(plan.output / "report.md")}


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Keep a second run out of the folder; the kernel lets go when this process ends, however it ends.

    Raises:
        ConfigError: another run is at work in it, or it cannot be written.
    """
    try:
        make_directory(output)
        handle = open_own(output / "prepare.lock", "r+b")
    except OSError as error:
        raise ConfigError(f"corpus.output: '{error.filename or output}' cannot be written ({error.strerror}); it must be a "
                          "folder of yours; choose another") from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"corpus.output: '{output}' is in use by another run; it must have one at a time; wait for "
                              "it, or choose another folder") from None
        except OSError:  # a file system without locks: nobody keeps a second run out
            pass
        yield
