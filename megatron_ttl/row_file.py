"""Keep rows of JSON in a file that a killed process may leave torn and a full disk may refuse for a while."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

from megatron_ttl.console import print_warning
from megatron_ttl.errors import ConfigError
from megatron_ttl.files import make_directory, open_own, open_regular, or_disk_error

_NOT_OURS = (errno.ELOOP, errno.EINVAL, errno.EISDIR, errno.EMLINK, errno.ENXIO, errno.EACCES, errno.EPERM)
_LONGEST_ROW = 1 << 20  # bytes; a row has some hundred


class RowFile:
    """Append one JSON line per row; a reader never meets half a line, save the last one after a kill.

    Raises:
        DiskError: the file cannot be opened, or its torn last line not be cut.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        with or_disk_error(self.path):
            make_directory(self.path.parent)
            repair(self.path)
            self._handle = _open(self.path)
        self._waiting = b""
        self._warned = False

    def append(self, row: dict[str, Any]) -> None:
        """Write a row; when the disk refuses it, warn once and write it with a later one."""
        self._waiting += json.dumps(_plain(row), ensure_ascii=False, default=str).encode() + b"\n"
        try:
            written = self._handle.write(self._waiting) or 0
            if written < len(self._waiting):
                # What is left begins in the middle of a line, just where the next write goes on.
                self._waiting = self._waiting[written:]
                raise OSError("only a part was written")
            self._waiting = b""
        except OSError as error:
            if not self._warned:
                self._warned = True
                print_warning(f"{self.path}: a row could not be written ({error.strerror or error}); rows "
                              "are kept in memory until it works again")

    @property
    def complete(self) -> bool:
        """Whether every row is in the file, and none waits in memory for the disk."""
        return not self._waiting

    def close(self) -> None:
        """Make the rows survive a power cut, as far as the disk can."""
        if self._handle.closed:
            return
        try:
            os.fsync(self._handle.fileno())
        except OSError as error:
            print_warning(f"{self.path}: {error.strerror}")
        self._handle.close()


def repair(path: Path) -> None:
    """Cut a last line that a killed process left torn, and say so."""
    if not os.path.lexists(path):
        return
    _open(path).close()
    size = path.stat().st_size
    whole = 0
    for end, row in _lines(path):
        whole = end if row is not None else whole
    if whole < size:
        os.truncate(path, whole)
        print_warning(f"{path}: the last {size - whole} bytes were not a whole row; they are cut")


def trim_rows(path: Path, last_step: int) -> dict[str, Any] | None:
    """Cut the rows after `last_step`, which a resumed run writes again, and return what was the last row.

    That row may know totals (energy) that no checkpoint has.

    Raises:
        DiskError: the disk cannot take it.
    """
    path = Path(path)
    with or_disk_error(path):
        return _trim_rows(path, last_step) if os.path.lexists(path) else None


def _trim_rows(path: Path, last_step: int) -> dict[str, Any] | None:
    repair(path)
    last: dict[str, Any] | None = None
    keep, cut = 0, 0
    for end, row in _lines(path):
        last = row or last
        step = (row or {}).get("step")
        if cut or isinstance(step, int) and step > last_step:
            cut += 1
        else:
            keep = end
    if cut:
        os.truncate(path, keep)
        print_warning(f"{path}: {cut} rows after step {last_step} are cut; the run writes them again")
    return last


def read_rows(path: Path) -> Iterator[dict[str, Any] | None]:
    """Yield the rows of a file that may still be written; None for each line that is no row.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    return (row for _, row in _lines(path))


def _open(path: Path) -> IO[bytes]:
    """Open the file to append; it is changed in place, so it must be the run's own.

    Raises:
        ConfigError: it is a link, no file, or somebody else's.
        OSError: what the disk said.
    """
    try:
        return open_own(path, "ab", 0)
    except OSError as error:
        if error.errno not in _NOT_OURS:
            raise
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); it must be a file of this run and of nothing "
                          "else; move it away, or choose another run.dir") from None


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Yield for every line where it ends and its row; None for one that is no row."""
    end = 0
    with open(open_regular(path), "rb") as handle:
        for line in iter(partial(handle.readline, _LONGEST_ROW), b""):
            end += len(line)
            try:
                row = json.loads(line) if line.endswith(b"\n") else None
            except (ValueError, RecursionError):
                row = None
            yield end, row if isinstance(row, dict) else None


def _plain(value: Any) -> Any:
    """Replace what JSON has no word for: NaN and infinity become null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
