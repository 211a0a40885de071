"""Turn files of documents into tokenised datasets: one for training and one of held-out documents.

The parent reads lines in chunks, workers parse and encode them, and the parent writes what comes back in the
order of the input: the bytes on the disk do not depend on the number of workers. Nothing takes its name
before all of it is complete, but the list of bad lines.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np

from megatron_ttl.data.documents import Chunk, bad_lines_fault, input_faults
from megatron_ttl.data.encode import EncodeSettings, Outcome, encode_files
from megatron_ttl.data.indexed_dataset import IndexedDatasetWriter, token_dtype
from megatron_ttl.data.manifest import (
    Description,
    HeldOutRecord,
    SourceRecord,
    dataset_paths,
)
from megatron_ttl.data.tokenizer_copy import holds_tokenizer, place_tokenizer
from megatron_ttl.errors import DataError, DiskError, collected, raise_faults
from megatron_ttl.files import fsync_directory, require_free_space
from megatron_ttl.tokenizer.tokenizer import Tokenizer

Role = Literal["train", "held_out"]
_ROLES: tuple[Role, ...] = ("train", "held_out")
_HOPELESS = 10_000  # bad lines after which a file that is mostly bad is not read to its end


@dataclass
class _Tally:
    """What has been counted so far."""

    lines: int = 0
    blank_lines: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    text_bytes: Counter[Role] = field(default_factory=Counter)
    tokens: Counter[Role] = field(default_factory=Counter)
    documents: Counter[tuple[Role, int]] = field(default_factory=Counter)  # by side and number of the input

    @property
    def rejected_lines(self) -> int:
        return sum(self.rejected.values())

    def too_bad(self, max_bad_fraction: float) -> bool:
        return self.rejected_lines > max_bad_fraction * self.lines

    def hopeless(self, max_bad_fraction: float) -> bool:
        return self.rejected_lines >= _HOPELESS and self.too_bad(max(0.5, max_bad_fraction))


def preprocess(
    inputs: Sequence[str | os.PathLike[str]], prefix: str | os.PathLike[str], settings: EncodeSettings, *,
    workers: int = 1, max_bad_fraction: float = 0.001, overwrite: bool = False,
    on_progress: Callable[[float], None] | None = None, chunk_bytes: int = 1 << 20,
) -> dict[str, Any]:
    """Tokenise documents and write `<prefix>` and, when documents are held out, `<prefix>_heldout`.

    Every document becomes `[BOS] ids EOS`. Both datasets point to a copy of the tokenizer,
    `<prefix>.tokenizer`.
    Bad lines are listed in `<prefix>.rejected.jsonl` with their place and reason.

    Args:
        inputs: `.jsonl` or `.jsonl.gz` files.
        prefix: path of the dataset without suffix.
        workers: processes that encode.
        max_bad_fraction: share of the lines that may be no documents.
        overwrite: replace a dataset that is there.
        on_progress: is given the bytes of input that are done.
        chunk_bytes: lines are handed to the workers in portions of about this size.

    Returns:
        Counts of documents, tokens and bytes, flat.

    Raises:
        DataError: a setting is out of range, an input is missing, the dataset exists (all of these at once);
            an input or the tokenizer cannot be used, a worker died, or too many lines are bad: of all that
            was written only the list of bad lines is left.
        DiskError: the disk is full.
    """
    tokenizer = _checked(inputs, prefix, settings, workers, max_bad_fraction, overwrite)
    dtype = token_dtype(tokenizer.vocab_size)
    _require_space(inputs, Path(prefix), np.dtype(dtype).itemsize)
    started = time.monotonic()
    tally = _Tally()
    with ExitStack() as stack:
        stack.enter_context(_disk_faults(prefix))
        quarantine = stack.enter_context(_Quarantine(prefix, inputs))
        writers = {
            role: stack.enter_context(IndexedDatasetWriter(
                prefix_of(prefix, role), dtype, tokenizer.vocab_size, tokenizer.eos_id, overwrite))
            for role in _ROLES
        }
        results = encode_files(inputs, tokenizer, settings, workers, chunk_bytes, on_progress)
        for chunk, outcome in stack.enter_context(closing(results)):
            _take(chunk, outcome, writers, quarantine, tally)
            if tally.hopeless(max_bad_fraction):
                break
        quarantine.keep()
        _require_documents(tally, max_bad_fraction, quarantine.path, writers)
        _commit(prefix, settings, tokenizer, writers, tally, [Path(path).name for path in inputs])
    return _report(prefix, settings, tally, quarantine.path, time.monotonic() - started)


def prefix_of(prefix: str | os.PathLike[str], role: Role) -> str:
    """Return the prefix of the dataset that holds one side of the split."""
    return os.fspath(prefix) + ("_heldout" if role == "held_out" else "")


def _checked(inputs: Sequence[str | os.PathLike[str]], prefix: str | os.PathLike[str],
             settings: EncodeSettings, workers: int, max_bad_fraction: float, overwrite: bool) -> Tokenizer:
    """Find all faults that can be found before the work, and load the tokenizer."""
    faults = [*_setting_faults(settings, workers, max_bad_fraction), *_prefix_faults(prefix),
              *input_faults(inputs)]
    tokenizer = None
    with collected(faults, DataError):
        tokenizer = Tokenizer.load(settings.tokenizer)
    if not overwrite:
        faults += [
            f"{path}: exists already; a dataset is not overwritten unasked; choose another --output-prefix, "
            "or give --overwrite" for path in _taken(prefix, tokenizer)
        ]
    raise_faults(DataError, faults)
    assert tokenizer is not None
    return tokenizer


def _setting_faults(settings: EncodeSettings, workers: int, max_bad_fraction: float) -> list[str]:
    faults = []
    if workers < 1:
        faults.append(f"--workers: is {workers}; it must be at least 1; {os.cpu_count()} use the whole "
                      "machine")
    if not settings.text_key:
        faults.append("--text-key: is empty; it must name the key of the text; leave it out for 'text'")
    if not 0 <= settings.held_out_fraction < 1:
        faults.append(f"--held-out-fraction: is {settings.held_out_fraction}; it must be from 0 to below 1; "
                      "0 holds nothing out")
    if not 0 <= settings.held_out_seed < 2**64:
        faults.append(f"--held-out-seed: is {settings.held_out_seed}; it must be from 0 to 2^64 - 1; choose "
                      "another")
    if not 0 <= max_bad_fraction <= 1:
        faults.append(f"--max-bad-fraction: is {max_bad_fraction}; it must be from 0 to 1; leave it out for "
                      "0.001")
    return faults


def _prefix_faults(prefix: str | os.PathLike[str]) -> list[str]:
    text = os.fspath(prefix)
    if text and not text.endswith("/") and Path(text).name not in ("", ".", ".."):
        return []
    return [f"--output-prefix: is '{text}'; it must end in a name, to which .bin, .idx and .json are added; "
            "write e.g. data/pt"]


def _taken(prefix: str | os.PathLike[str], tokenizer: Tokenizer | None) -> list[Path]:
    """Return the files of a dataset that is there; a copy of the same tokenizer alone is none."""
    files = [path for role in _ROLES for path in dataset_paths(prefix_of(prefix, role))[:3]]
    copy = dataset_paths(prefix).tokenizer
    taken = [path for path in files if path.exists()]
    return [*taken, copy] if copy.exists() and not holds_tokenizer(copy, tokenizer) else taken


def _require_space(inputs: Sequence[str | os.PathLike[str]], prefix: Path, token_bytes: int) -> None:
    """Refuse what surely does not fit: five bytes of text per token, packed text unpacks to four times."""
    text_bytes = sum(os.path.getsize(path) * (4 if os.fspath(path).endswith(".gz") else 1) for path in inputs)
    require_free_space(prefix.parent, text_bytes * token_bytes // 5, f"the dataset {prefix.name}")


def _take(chunk: Chunk, outcome: Outcome, writers: dict[Role, IndexedDatasetWriter], quarantine: _Quarantine,
          tally: _Tally) -> None:
    tally.lines += len(chunk.lines)
    tally.blank_lines += outcome.blank_lines
    for role, encoded in (("train", outcome.train), ("held_out", outcome.held_out)):
        writers[role].add_documents(encoded.ids, encoded.lengths)
        tally.text_bytes[role] += encoded.text_bytes
        tally.tokens[role] += sum(encoded.lengths)
        tally.documents[role, chunk.file] += len(encoded.lengths)
    for bad_line in outcome.bad_lines:
        tally.rejected[bad_line["reason"]] += 1
        quarantine.add(chunk.file, bad_line)


class _Quarantine:
    """The list of bad lines; kept on `keep`, and only if there are any."""

    def __init__(self, prefix: str | os.PathLike[str], inputs: Sequence[str | os.PathLike[str]]) -> None:
        self.path = Path(f"{os.fspath(prefix)}.rejected.jsonl")
        self._temporary = self.path.with_name(f".{self.path.name}.partial")
        self._names = [os.fspath(path) for path in inputs]
        self._handle: TextIO | None = None

    def add(self, file: int, bad_line: dict[str, Any]) -> None:
        """Write one line of the list."""
        if self._handle is None:
            self._temporary.parent.mkdir(parents=True, exist_ok=True)
            self._temporary.unlink(missing_ok=True)
            self._handle = open(self._temporary, "x", encoding="utf-8", newline="\n")  # noqa: SIM115
        self._handle.write(json.dumps({"file": self._names[file], **bad_line}, ensure_ascii=False) + "\n")

    def keep(self) -> None:
        """Put the list in place of an earlier one; remove the earlier one if no line is bad."""
        if self._handle is None:
            self.path.unlink(missing_ok=True)
            return
        self._handle.flush()
        os.fsync(self._handle.fileno())
        os.replace(self._temporary, self.path)
        fsync_directory(self.path.parent)

    def __enter__(self) -> _Quarantine:
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            self._handle.close()
        with suppress(OSError):  # it was renamed, never written, or its folder is no folder
            self._temporary.unlink()


def _require_documents(tally: _Tally, max_bad_fraction: float, rejected: Path,
                       writers: dict[Role, IndexedDatasetWriter]) -> None:
    if tally.too_bad(max_bad_fraction):
        fault = bad_lines_fault(tally.rejected, tally.lines, max_bad_fraction)
        raise DataError(fault + f"; they are listed in {rejected}")
    if not sum(tally.documents.values()):
        raise DataError("--input: holds no documents; there must be at least one; give other files")
    if not writers["train"].document_count:
        raise DataError("--held-out-fraction: leaves no document for training; at least one must be left; "
                        "hold out less, or give more documents")


def _commit(prefix: str | os.PathLike[str], settings: EncodeSettings, tokenizer: Tokenizer,
            writers: dict[Role, IndexedDatasetWriter], tally: _Tally, names: list[str]) -> None:
    """Put tokenizer and datasets in place, or, if that fails, nothing."""
    documents = sum(writer.document_count for writer in writers.values())
    assert tally.lines == tally.blank_lines + tally.rejected_lines + documents, "every line is counted once"
    for role, writer in writers.items():
        assert writer.token_count == tally.tokens[role], "tokens in = tokens written"
    copy = dataset_paths(prefix).tokenizer
    placed: list[str] = []
    new_copy = not copy.exists()
    try:
        record = place_tokenizer(tokenizer, copy)
        for role, writer in writers.items():
            if not writer.document_count:  # held out: nothing
                _remove(writer.prefix)  # of the dataset that is replaced
                continue
            sources = tuple(SourceRecord(file=name, documents=tally.documents[role, number])
                            for number, name in enumerate(names))
            writer.finish(Description(
                text_bytes=tally.text_bytes[role], bos=settings.bos, tokenizer=record, sources=sources,
                held_out=HeldOutRecord(fraction=settings.held_out_fraction, seed=settings.held_out_seed,
                                       role=role),
                rejected=dict(sorted(tally.rejected.items())),
            ))
            placed.append(writer.prefix)
    except BaseException:
        for done in placed:
            _remove(done)
        if new_copy:
            shutil.rmtree(copy, ignore_errors=True)
        raise


def _remove(prefix: str) -> None:
    paths = dataset_paths(prefix)
    for path in (paths.manifest, paths.idx, paths.bin):  # what says that the others are complete goes first
        path.unlink(missing_ok=True)


@contextmanager
def _disk_faults(prefix: str | os.PathLike[str]) -> Iterator[None]:
    """Say in one sentence what the disk did not want."""
    try:
        yield
    except OSError as error:
        if not error.errno:  # not from the system
            raise
        where = error.filename or os.fspath(prefix)
        raise DiskError(f"{where}: cannot be written or read ({error.strerror}); the dataset needs a "
                        "place that can be written; free some space, or choose another "
                        "--output-prefix") from None


def _report(prefix: str | os.PathLike[str], settings: EncodeSettings, tally: _Tally, rejected: Path,
            seconds: float) -> dict[str, Any]:
    documents = {role: sum(count for (side, _), count in tally.documents.items() if side == role)
                 for role in _ROLES}
    tokens, text_bytes = sum(tally.tokens.values()), sum(tally.text_bytes.values())
    held_out = prefix_of(prefix, "held_out") if documents["held_out"] else (
        "none: --held-out-fraction is 0" if not settings.held_out_fraction
        else f"empty: no document fell into the held-out {100 * settings.held_out_fraction:g} %"
    )
    return {
        "dataset": prefix_of(prefix, "train"), "documents": documents["train"],
        "tokens": tally.tokens["train"], "text_bytes": tally.text_bytes["train"],
        "held_out": held_out, "held_out_documents": documents["held_out"],
        "held_out_tokens": tally.tokens["held_out"], "held_out_text_bytes": tally.text_bytes["held_out"],
        "bytes_per_token": round(text_bytes / tokens, 4), "tokens_per_s": round(tokens / seconds),
        "seconds": round(seconds, 2), "lines": tally.lines, "blank_lines": tally.blank_lines,
        "rejected_lines": tally.rejected_lines, "rejected": dict(sorted(tally.rejected.items())),
        "rejected_list": str(rejected) if tally.rejected_lines else None,
    }
