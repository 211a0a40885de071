"""Find, read and check the rows of a task: every row must be right, for a score hides what was wrong in its data."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ttl.data.documents import BadLine, input_faults, parse_record, read_chunks
from megatron_ttl.errors import DataError, raise_faults
from megatron_ttl.evaluate.task import TaskData
from megatron_ttl.files import checksum_bytes

_MOST_FAULTS = 20
_KIND_WORDS = {"text": "a text that is not empty", "string": "a text", "texts": "a list of texts that are not empty",
               "strings": "a list of texts", "integer": "a whole number", "integers": "a list of whole numbers",
               "number": "a finite number", "boolean": "true or false", "any": "there"}
Row = dict[str, Any]


@dataclass(frozen=True)
class DataFiles:
    """The files of one task that are there."""

    test: Path | None
    fewshot: Path | None
    sample: bool
    """Whether the test file is only a sample, or stands in for the real one."""

    @property
    def names(self) -> str:
        """File names without folders."""
        return " + ".join(path.name for path in (self.test, self.fewshot) if path is not None)


@dataclass(frozen=True)
class RowRules:
    """What rows must be like."""

    kinds: Mapping[str, Any]
    prepare: Callable[[Row], Row] | None = None
    unique: bool = True
    ids: tuple[str, ...] = ()
    """Of the demonstrations, in order."""
    numbers: tuple[int, ...] = field(default=())
    """Of the demonstrations in their own file, in order."""


def find_files(names: Mapping[str, str], folders: Sequence[Path]) -> DataFiles:
    """Look for the files of a task: the whole file in any folder before a sample, packed with gzip or not.

    Args:
        names: `test`, and maybe `fewshot` and `stand_in`.
        folders: where to look, in this order.
    """
    test, sample = _first(names["test"], folders, (".jsonl",)), False
    if test is None:
        sample = True
        test = _first(names["test"], folders, (".sample.jsonl",))
        if test is None and names.get("stand_in"):
            test = _first(names["stand_in"], folders, (".jsonl", ".sample.jsonl"))
    fewshot = _first(names["fewshot"], folders, (".jsonl", ".sample.jsonl")) if names.get("fewshot") else None
    return DataFiles(test, fewshot, sample and test is not None)


def _first(name: str, folders: Sequence[Path], suffixes: Sequence[str]) -> Path | None:
    for suffix in suffixes:
        for folder in folders:
            for packing in ("", ".gz"):
                path = folder / (name.removesuffix(".jsonl") + suffix + packing)
                if path.is_file():
                    return path
    return None


def read_task_data(files: DataFiles, rules: RowRules) -> TaskData:
    """Read the rows of a task.

    Raises:
        DataError: a file cannot be read, or rows are not what the task needs; with file and line.
    """
    assert files.test is not None
    raise_faults(DataError, input_faults([path for path in (files.test, files.fewshot) if path is not None]))
    faults: list[str] = []
    splits = {"test": _checked(_file_rows(files.test, rules, faults), rules, str(files.test), faults)}
    if files.fewshot is not None:
        splits["fewshot"] = _checked(_file_rows(files.fewshot, rules, faults), rules, str(files.fewshot), faults)
    _raise(faults)
    return _task_data(splits, rules, files.names, files.sample)


def task_data_of(splits: Mapping[str, Iterable[Row]], rules: RowRules, origin: str) -> TaskData:
    """Check rows that came from elsewhere than a file; `origin` is the name of that place.

    Raises:
        DataError: rows are not what the task needs.
    """
    faults: list[str] = []
    found = {name: _checked(((f"{origin}: {name}: row {number}", row) for number, row in enumerate(rows)), rules,
                            f"{origin}: {name}", faults) for name, rows in splits.items()}
    _raise(faults)
    return _task_data(found, rules, origin, False)


def count_rows(path: Path) -> int:
    """Count the lines of a file that are not blank.

    Raises:
        DataError: it cannot be read to its end.
    """
    return sum(not line.isspace() for chunk in read_chunks(path) for line in chunk.lines)


def _file_rows(path: Path, rules: RowRules, faults: list[str]) -> Iterator[tuple[str, Row]]:
    for chunk in read_chunks(path):
        for number, line in enumerate(chunk.lines, chunk.first_line):
            record = parse_record(line, tuple(rules.kinds))
            if isinstance(record, BadLine):
                faults.append(f"{path}:{number}: {record.reason}; every line must be one JSON object; repair or remove it")
            elif record is not None:
                yield f"{path}:{number}", record


def _checked(rows: Iterable[tuple[str, Row]], rules: RowRules, origin: str, faults: list[str]) -> list[Row]:
    """Return the rows with the keys of the task alone, and add what is wrong with them to `faults`."""
    kept: list[Row] = []
    seen: dict[str, str] = {}
    bare = ""
    before = len(faults)
    for where, given in rows:
        row, fault = _prepared(given, rules)
        fault = fault or _row_fault(row, rules.kinds)
        own = {} if fault else {key: _plain(row[key], kind) for key, kind in rules.kinds.items()}
        name = row.get("id")
        if isinstance(name, (str, int)) and not isinstance(name, bool):
            own["id"] = str(name)
            if rules.unique and own["id"] in seen:
                fault = fault or (f"the id '{name}' is also that of {seen[own['id']]}; every row must have its own; remove "
                                  "one of them")
            seen.setdefault(own["id"], where)
        elif not bare:
            bare = where
        if not fault:
            try:
                json.dumps(own, ensure_ascii=False, allow_nan=False).encode()
            except ValueError as error:
                fault = f"holds what is no text or number ({str(error)[:80]}); must be plain JSON; repair it"
        if fault:
            faults.append(f"{where}: {fault}")
        kept.append(own)
    if seen and bare:
        faults.append(f"{bare}: has no id, as other rows do; all rows must have one, or none; add it")
    if not kept and len(faults) == before:
        faults.append(f"{origin}: holds no rows; a task needs at least one; give the file that belongs there")
    return kept


def _prepared(row: Row, rules: RowRules) -> tuple[Row, str]:
    if rules.prepare is None:
        return row, ""
    try:
        return rules.prepare(dict(row)), ""
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        return row, (f"is not a row of this task ({type(error).__name__}: {str(error)[:200]}); must have the keys of the "
                     "guide; repair it")


def _row_fault(row: Row, kinds: Mapping[str, Any], prefix: str = "") -> str:
    """Return what is wrong with a row, or ''."""
    missing = [prefix + key for key in kinds if key not in row]
    if missing:
        return f"has no key {', '.join(map(repr, missing))}; must have {', '.join(prefix + key for key in kinds)}; add it"
    for key, kind in kinds.items():
        value = row[key]
        if isinstance(kind, dict):
            fault = (_row_fault(value, kind, f"{prefix}{key}.") if isinstance(value, dict) else
                     f"'{prefix}{key}' is {_short(value)}; must be a table with {', '.join(kind)}; correct it")
            if fault:
                return fault
        elif wanted := _unmet(value, kind, row):
            return f"'{prefix}{key}' is {_short(value)}; must be {wanted}; correct it"
    return ""


def _unmet(value: Any, kind: Any, row: Row) -> str:
    """Return what a value must be, if it is not, or ''."""
    if isinstance(kind, list):
        good = any(value == label and type(value) is type(label) for label in kind)
        return "" if good else "one of " + ", ".join(map(repr, kind))
    if kind.startswith("index"):
        target = kind.removeprefix("index into ") if " " in kind else "choices"
        choices = row.get(target)
        count = len(choices) if isinstance(choices, list) else 0
        good = type(value) is int and 0 <= value < count
        return "" if good else f"a whole number from 0 to {max(count - 1, 0)}, into '{target}'"
    if kind in ("text", "string"):
        good = isinstance(value, str) and (kind == "string" or bool(value.strip()))
    elif kind in ("texts", "strings"):
        good = isinstance(value, list) and bool(value) and not any(_unmet(item, kind[:-1], row) for item in value)
    elif kind == "integers":
        good = isinstance(value, list) and all(type(item) is int for item in value)
    elif kind == "number":
        good = type(value) in (int, float) and math.isfinite(value)
    elif kind == "any":
        good = True
    else:
        good = type(value) is {"integer": int, "boolean": bool}[kind]
    return "" if good else _KIND_WORDS[kind]


def _plain(value: Any, kind: Any) -> Any:
    """Return a value as it counts: a number is a float, whatever it was written as; of a table its known keys."""
    if isinstance(kind, dict):
        return {key: _plain(value[key], inner) for key, inner in kind.items()}
    return float(value) if kind == "number" else value


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _raise(faults: Sequence[str]) -> None:
    more = len(faults) - _MOST_FAULTS
    rest = [f"... and {more:,} more rows like these; all must be right; repair the file"] if more > 0 else []
    raise_faults(DataError, [*faults[:_MOST_FAULTS], *rest])


def _task_data(splits: dict[str, list[Row]], rules: RowRules, origin: str, sample: bool) -> TaskData:
    splits = _with_demonstrations(splits, rules)
    lines = [name + "\n" + "".join(json.dumps(row, ensure_ascii=False, sort_keys=True, separators=(",", ":")) + "\n"
                                   for row in rows) for name, rows in sorted(splits.items())]
    return TaskData(splits, checksum_bytes("".join(lines).encode()), origin, sample)


def _with_demonstrations(splits: dict[str, list[Row]], rules: RowRules) -> dict[str, list[Row]]:
    """Put the rows that the pack names as demonstrations first; those of the test rows are no longer asked about.

    They are named as the data set names them; our files put its name before (`ENEM_2022_21`). Where the data lack
    one of them, nothing is moved: demonstrations are then the first rows.
    """
    pool = splits.get("fewshot", splits["test"])
    chosen: list[Row] = []
    if rules.ids:
        by_id = {row["id"].partition("_")[2]: row for row in pool if "id" in row} | {
            row["id"]: row for row in pool if "id" in row}
        chosen = [by_id[name] for name in rules.ids if name in by_id]
        if len(chosen) < len(rules.ids) and "fewshot" not in splits:
            return splits
    elif rules.numbers and "fewshot" in splits and max(rules.numbers) < len(pool):
        chosen = [pool[number] for number in rules.numbers]
    if not chosen:
        return splits
    rest = [row for row in pool if not any(row is one for one in chosen)]
    return {"test": splits["test"], "fewshot": chosen + rest} if "fewshot" in splits else {"test": rest, "fewshot": chosen}
