"""Signal tasks: small sets of items that move early in training, read from files alone and turned into rows of token ids.

A signal task is a `.jsonl` file: one shipped in `packs/<language>/`, or one that `tools/make_packs.py` wrote. Two kinds of
items, one per file; a context may be empty, and never ends in white space:

    {"id": "...", "context": "...", "choices": ["...", "..."], "answer": 0}      which continuation is the most probable?
    {"id": "...", "context": "...", "target": "..."}                             would greedy decoding say it?
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ttl.errors import DataError, closest, collected, raise_faults
from megatron_ttl.files import read_regular
from megatron_ttl.tokenizer.tokenizer import Tokenizer

PACKS = Path(__file__).parent / "packs"
_LARGEST_BYTES = 64 << 20
_MOST_FAULTS = 20


@dataclass(frozen=True)
class SignalItem:
    """One question."""

    context: str
    continuations: tuple[str, ...]
    """The choices; or the target alone."""
    answer: int | None
    """Number of the right choice; None where there is only a target."""


@dataclass(frozen=True)
class SignalTask:
    """A name and its items."""

    name: str
    items: tuple[SignalItem, ...]

    @property
    def has_choices(self) -> bool:
        """Whether choices are compared; otherwise a target is greedily said or not."""
        return self.items[0].answer is not None


@dataclass(frozen=True)
class ScoredRow:
    """A sequence whose last tokens are asked for."""

    ids: tuple[int, ...]
    asked: int
    """So many of the last ids are predicted."""
    truncated: bool = False
    """Whether the context was cut on the left to fit the model."""


def read_signal_tasks(names: Sequence[str], limit: int | None = None) -> list[SignalTask]:
    """Read tasks by name (shipped) or by path (`.jsonl`).

    Args:
        names: of tasks.
        limit: only the first so many items of each; a file has its kinds of items mixed well.

    Raises:
        DataError: with every fault of every file.
    """
    tasks, faults = [], []
    for name in names:
        with collected(faults, DataError):
            tasks.append(_read_task(name, limit))
    raise_faults(DataError, faults)
    return tasks


def _read_task(name: str, limit: int | None) -> SignalTask:
    path = _path_of(name)
    try:
        lines = read_regular(path, _LARGEST_BYTES).decode("utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "is no UTF-8"
        raise DataError(f"{path}: cannot be read ({why}); it must be a file of items; check the path") from None
    items: list[SignalItem] = []
    faults: list[str] = []
    for number, line in enumerate(lines, start=1):
        try:
            items.append(_item(line))
        except ValueError as error:
            faults.append(f"{path}:{number}: {error}; an item is an object with id, context and either choices and answer, or "
                          "target; write the file again with tools/make_packs.py")
    if not faults and len({item.answer is None for item in items}) != 1:
        faults.append(f"{path}: holds both kinds of items; it must hold one; write it again with tools/make_packs.py")
    raise_faults(DataError, faults[:_MOST_FAULTS])
    return SignalTask(path.stem, tuple(items[:limit]))


def _path_of(name: str) -> Path:
    if name.endswith(".jsonl") or os.sep in name:
        return Path(name)
    shipped = {path.stem: path for path in sorted(PACKS.glob("*/*.jsonl"))}
    if name not in shipped:
        hint = closest(name, shipped)
        raise DataError(f"{name}: is no signal task; it must be one of {', '.join(shipped)}, or a path that ends in .jsonl; "
                        f"{hint or 'correct the name'}")
    return shipped[name]


def _item(line: str) -> SignalItem:
    """Read one line.

    Raises:
        ValueError: what is wrong with it.
    """
    try:
        row: Any = json.loads(line)
    except RecursionError:
        raise ValueError("is no JSON object") from None
    if not isinstance(row, dict) or not isinstance(row.get("context"), str):
        raise ValueError("is no object with a context")
    context, choices, answer = row["context"], row.get("choices"), row.get("answer")
    if choices is None:
        choices, answer = [row.get("target")], None
    elif (not isinstance(choices, list) or len(choices) < 2 or type(answer) is not int
          or not 0 <= answer < len(choices)):
        raise ValueError("has not two or more choices, and the number of the right one")
    if not all(isinstance(choice, str) and choice for choice in choices):
        raise ValueError("has a continuation that is no text, or an empty one")
    if context != context.rstrip():
        raise ValueError("has a context that ends in white space, which belongs to the continuation")
    return SignalItem(context, tuple(choices), answer)


def rows_of(task: SignalTask, tokenizer: Tokenizer, add_bos: bool, positions: int) -> Iterator[ScoredRow]:
    """Yield a row for every continuation of every item, in order.

    An empty context is BOS alone. What does not fit is cut on the left of the context.

    Args:
        task: what is asked.
        tokenizer: of the model.
        add_bos: whether documents begin with BOS.
        positions: of the model; a row has at most one token more, for the last one is only predicted.

    Raises:
        DataError: a text is no valid Unicode, or a continuation alone has more tokens than the model has positions.
    """
    for number, item in enumerate(task.items, start=1):
        context = tokenizer.encode(item.context)
        begin = [tokenizer.bos_id] if add_bos or not context else []
        for continuation in item.continuations:
            whole = tokenizer.encode(item.context + continuation)
            cut = min(len(context), len(whole) - 1)  # where all of it merges into the context's last token, it is that one
            asked = whole[cut:]
            if len(asked) > positions:
                raise DataError(f"{task.name}: item {number}: a continuation has {len(asked)} tokens; the model has "
                                f"{positions} positions; leave the task out, or shorten the item")
            ids = [*begin, *whole]
            yield ScoredRow(tuple(ids[-(positions + 1):]), len(asked), len(ids) > positions + 1)
