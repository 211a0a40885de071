"""Say what is wrong, what it must be and what to do: the errors a user meets, and the exit codes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import IntEnum

_LONGEST_FAULT = 2000  # characters: what is larger holds a part of some file, not a name of ours


class ExitCode(IntEnum):
    """Status with which every command of the project ends (documented in README.md)."""

    DONE = 0
    FAILED = 1  # an error of ours: a traceback was printed
    USAGE = 2  # the user's settings, data or files: one screen of faults was printed
    HANG = 70  # a watchdog ended a run that no longer moved
    DISK = 75  # no checkpoint could be written, several times in a row
    PREEMPTED = 85  # asked to stop (Ctrl-C, SIGTERM): a checkpoint is on disk, start the same command again
    INTERRUPTED = 130  # Ctrl-C where nothing is kept, or for the third time


class UserError(ValueError):
    """One or several faults that the user can repair; printed without a traceback.

    A fault reads `<where>: <what it is>; <what it must be>; <what to do>`. Pass all of them at once. It is one line:
    what a hostile file or a path puts into it (line breaks, colours of a terminal, half characters) is written out.
    """

    exit_code = ExitCode.USAGE

    def __init__(self, *faults: str) -> None:
        self.faults = [on_one_line(fault) for fault in faults]
        super().__init__("\n".join(self.faults))


class ConfigError(UserError):
    """The run file, the DeepSpeed JSON or an override is wrong."""


class DataError(UserError):
    """Text, tokens or a tokenizer are missing, damaged or do not fit together."""


class CheckpointError(UserError):
    """A checkpoint or a model folder is missing, damaged or belongs to another run."""


class DiskError(UserError):
    """The disk cannot take what must be written."""

    exit_code = ExitCode.DISK


def on_one_line(text: str) -> str:
    """Return a text of a stranger as it may be printed: shortened, what is no printable sign written out."""
    if len(text) > _LONGEST_FAULT:
        half = _LONGEST_FAULT // 2
        text = f"{text[:half]} ... {text[-half:]}"
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def raise_faults(error: type[UserError], faults: Iterable[str]) -> None:
    """Raise `error` with all `faults` if there is one; do nothing otherwise."""
    found = list(faults)
    if found:
        raise error(*found)


def closest(word: str, known: Iterable[str]) -> str:
    """Return `"did you mean 'x'?"` for the known word nearest to `word`, or an empty string."""
    from difflib import get_close_matches

    by_lower = {k.lower(): k for k in known}
    match = get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return f"did you mean '{by_lower[match[0]]}'?" if match else ""


@contextmanager
def collected(faults: list[str], error: type[UserError] = UserError) -> Iterator[None]:
    """Add to `faults` those of an `error` that is raised inside, and go on behind it: they shall not hide later ones."""
    try:
        yield
    except error as found:
        faults += [fault for fault in found.faults if fault not in faults]
