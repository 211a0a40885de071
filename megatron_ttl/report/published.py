"""Read figures as papers printed them: their digits say how exact they claim to be, every row says where it stands."""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass
from decimal import ROUND_DOWN, Decimal, InvalidOperation
from pathlib import Path

from megatron_ttl.console import print_table
from megatron_ttl.errors import DataError, closest, raise_faults

AGREES, CUT_OFF, DIFFERS, COMPUTED = "agrees", "cut off, not rounded", "differs", "not printed"
_SOURCE, _NOTE = "source", "note"
_TIE = 1 + 1e-9  # a mean of floats that lies on the edge of two roundings


@dataclass(frozen=True)
class PublishedRow:
    """One line of a table."""

    where: str
    cells: dict[str, str]

    def __getitem__(self, column: str) -> str:
        if column not in self.cells:
            raise DataError(f"{self.where}: has no column {column!r}; it must have one; restore the file")
        return self.cells[column]

    def number(self, column: str) -> float:
        """Return a cell as a number.

        Raises:
            DataError: it is none.
        """
        return float(self.decimal(column))

    def decimal(self, column: str) -> Decimal:
        """Return a cell with the digits that were printed: 4.58e5 has three.

        Raises:
            DataError: it is no number.
        """
        try:
            value = Decimal(self[column])
        except InvalidOperation:
            value = Decimal("nan")
        if not value.is_finite():
            raise DataError(f"{self.where}: {column} is {self[column]!r}; it must be a number; correct it")
        return value


def compare(printed: Decimal, computed: float) -> str:
    """Say whether a printed figure is what computing it gives, in the digits that it has."""
    unit = Decimal(1).scaleb(int(printed.as_tuple().exponent))
    found = Decimal(repr(computed))
    if abs(found - printed) <= unit / 2 * Decimal(_TIE):
        return AGREES
    return CUT_OFF if (found / unit).to_integral_value(ROUND_DOWN) * unit == printed else DIFFERS


def read_published(folder: str | os.PathLike[str], name: str) -> list[PublishedRow]:
    """Read a published table.

    Raises:
        DataError: there is no such table, or it has no rows with a source; all such rows at once.
    """
    path = Path(folder) / f"{name}.csv"
    if not path.is_file():
        known = published_names(folder)
        hint = closest(name, known) or f"there are {', '.join(known) or 'none'}"
        raise DataError(f"{path}: does not exist; it must be one of the published tables; {hint}")
    with open(path, encoding="utf-8", newline="") as handle:
        header, *lines = list(csv.reader(handle)) or [[]]
    faults = [f"{path}: has no column {column!r}; every row must say where it stands; restore the file"
              for column in (_SOURCE, _NOTE) if column not in header]
    faults += [f"{path}:{number}: has {len(line)} cells; it must have {len(header)}; correct it"
               for number, line in enumerate(lines, 2) if len(line) != len(header)]
    raise_faults(DataError, faults)
    rows = [PublishedRow(f"{path}:{number}", dict(zip(header, line, strict=True))) for number, line in enumerate(lines, 2)]
    raise_faults(DataError, [f"{row.where}: has no source; every published figure must say where it stands; add it"
                             for row in rows if not row[_SOURCE]] or ([] if rows else [f"{path}: has no rows; restore it"]))
    return rows


def published_names(folder: str | os.PathLike[str]) -> list[str]:
    """Return the names of the published tables."""
    return sorted(path.stem for path in Path(folder).glob("*.csv"))


def print_published(folder: str | os.PathLike[str], name: str) -> None:
    """Print a published table under a caption that keeps it apart from ours; or, asked for `list`, the names of all.

    Raises:
        DataError: there is no such table, or it is damaged.
    """
    if name == "list":
        print("\n".join(published_names(folder)))
        return
    rows = read_published(folder, name)
    sources = "; ".join(dict.fromkeys(row[_SOURCE] for row in rows))
    header = [column for column in rows[0].cells if column != _SOURCE]
    print_table(header, [[row[column] for column in header] for row in rows],
                title=f"PUBLISHED, not measured here; other harness, texts or machines: {sources}")
