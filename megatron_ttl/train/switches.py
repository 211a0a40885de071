"""Files that somebody puts into the run folder to be heard by a run whose process cannot be signalled: STOP and SAVE."""

from __future__ import annotations

import sys
from pathlib import Path

_NAMES = ("STOP", "SAVE")


class Switches:
    """The switch files of one run; a file that was honoured is removed."""

    def __init__(self, folder: Path, looks: bool) -> None:
        """Prepare.

        Args:
            folder: the run folder.
            looks: whether this process looks for the files; of several, one is enough, for the loop votes.
        """
        self._paths = [folder / name for name in _NAMES]
        self._looks = looks

    def asked(self) -> tuple[bool, bool]:
        """Return whether a stop and whether a checkpoint is asked for."""
        stop, save = ((path.exists() for path in self._paths) if self._looks else (False, False))
        return stop, save

    def honoured(self, stop: bool, save: bool) -> None:
        """Remove the files of what was done."""
        for path, done in zip(self._paths, (stop, save), strict=True):
            if done and self._looks:
                try:
                    path.unlink(missing_ok=True)
                except OSError as error:
                    print(f"warning: {path}: could not be removed ({error.strerror}); it would ask again; remove it by "
                          "hand", file=sys.stderr)
