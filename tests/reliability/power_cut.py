"""What a power cut may leave of a folder: rebuilt from a log of calls, for every prefix of it.

A disk keeps the bytes of a file that were in it at its last fsync, and the names of a folder that were in it at the
folder's. Of what came later anything may be there. The model is stricter than ext4 or xfs: those keep the order of
names over all folders, here every folder and every file has its own fate.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from fault_shim import Operation

PAGE = 4096
FILES = ("kept", "lost", "zeroed")
"""Bytes written since the last fsync: there, not there (the file is as long as it was), or there as zeros."""
NAMES = ("kept", "lost")
"""Names made, moved and deleted since the last fsync of their folder: done or not."""


@dataclass
class File:
    """A file: its bytes now, those that are safe, and where they differ."""

    now: bytearray = field(default_factory=bytearray)
    safe: bytes = b""
    dirty: list[tuple[int, int]] = field(default_factory=list)

    def after_a_cut(self, fate: str, draw: random.Random) -> bytes:
        """Return what is in it when the machine is on again."""
        if fate == "mixed":
            fate = draw.choice((*FILES, "pages"))
        if fate == "lost":
            return self.safe
        found = bytearray(self.now)
        for start, end in self.dirty if fate != "kept" else ():
            for page in range(start - start % PAGE, end, PAGE):
                part = slice(max(start, page), min(end, page + PAGE, len(found)))
                if part.stop > part.start and (fate == "zeroed" or draw.random() < 0.5):
                    found[part] = bytes(part.stop - part.start)
        return bytes(found)


@dataclass
class Folder:
    """A folder: its entries now, those that are safe, and the changes between, each one whole or not at all."""

    now: dict[str, File | Folder] = field(default_factory=dict)
    safe: dict[str, File | Folder] = field(default_factory=dict)
    changes: list[dict[str, File | Folder | None]] = field(default_factory=list)

    def change(self, **entries: File | Folder | None) -> None:
        """Set some names at once; None takes one away."""
        self.changes.append(entries)
        _apply(self.now, entries)

    def after_a_cut(self, fate: str, draw: random.Random) -> dict[str, File | Folder]:
        """Return its entries when the machine is on again."""
        found = dict(self.safe)
        count = {"kept": len(self.changes), "lost": 0}.get(fate)
        for entries in self.changes[: draw.randint(0, len(self.changes)) if count is None else count]:
            _apply(found, entries)
        return found


def _apply(names: dict[str, File | Folder], entries: dict[str, File | Folder | None]) -> None:
    for name, entry in entries.items():
        names.pop(name, None)
        if entry is not None:
            names[name] = entry


class Disk:
    """A folder that was empty and safe when the log began."""

    def __init__(self, top: Path) -> None:
        self.top, self.root = top, Folder()

    def play(self, operations: Iterable[Operation]) -> None:
        """Make all calls of a log."""
        for operation in operations:
            self.step(operation)

    def step(self, operation: Operation) -> None:
        """Make one call."""
        if operation.what in ("note", "change") or operation.path.endswith(" (deleted)"):
            return
        folder, name = self._place(operation.path)
        entry = folder.now.get(name) if name else self.root
        match operation.what:
            case "create":
                folder.change(**{name: File()})
            case "mkdir":
                folder.change(**{name: Folder()})
            case "unlink":
                folder.change(**{name: None})
            case "rename":
                target, new = self._place(operation.other)
                assert target is folder, "a move between folders is not in the model, nor in the store"
                folder.change(**{name: None, new: entry})
            case "write":
                end = operation.offset + operation.size
                entry.now.extend(bytes(max(0, end - len(entry.now))))
                entry.now[operation.offset : end] = operation.payload
                entry.dirty.append((operation.offset, end))
            case "truncate":
                assert operation.size <= len(entry.now)
                del entry.now[operation.size :]
            case "fsync":
                entry.safe = bytes(entry.now) if isinstance(entry, File) else dict(entry.now)
                (entry.dirty if isinstance(entry, File) else entry.changes).clear()
            case _:
                raise AssertionError(f"{operation.what} is not in the model")

    def _place(self, path: str) -> tuple[Folder, str]:
        parts = Path(path).relative_to(self.top).parts
        folder = self.root
        for part in parts[:-1]:
            folder = folder.now[part]
        return folder, parts[-1] if parts else ""

    def write(self, to: Path, files: str = "kept", names: str = "kept", seed: int = 0) -> None:
        """Write what a power cut would leave; `mixed` draws a fate for every file and every folder."""
        draw = random.Random(seed)

        def put(folder: Folder, path: Path) -> None:
            os.mkdir(path)
            for name, entry in folder.after_a_cut(names, draw).items():
                if isinstance(entry, File):
                    (path / name).write_bytes(entry.after_a_cut(files, draw))
                else:
                    put(entry, path / name)

        put(self.root, to)
