"""The first stage of a corpus: every unit of every input is cleaned once, however often the run is killed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from megatron_ttl.console import progress
from megatron_ttl.data.corpus.clean import UNREADABLE, Job, clean_unit
from megatron_ttl.data.corpus.inputs import Input
from megatron_ttl.data.corpus.plan import DROPPED, Plan
from megatron_ttl.data.corpus.read import read_units
from megatron_ttl.data.corpus.shards import write_lines
from megatron_ttl.data.processes import in_processes
from megatron_ttl.data.zstd_file import zstd_lines
from megatron_ttl.errors import DataError
from megatron_ttl.files import checksum_bytes, make_directory, write_json

UNIT_BYTES = 8 << 20
"""Of input that one process cleans at a time."""
_HOPELESS = 10_000  # bad lines after which inputs that are mostly bad are not read to their end
_BAD_SHOWN = 5
_UNREADABLE_LINE = f'{{"rule": "{UNREADABLE}"'.encode()


class Cleaning:
    """The first stage: units of all inputs, those that are done already and those that processes clean now."""

    def __init__(self, plan: Plan) -> None:
        self.stems: list[Path] = []
        """Paths of the units without suffix, in the order of the corpus."""
        self._plan = plan
        self._folder = plan.work / "units"
        self._settings = plan.settings.model_dump_json()
        self._unreadable: Counter[str] = Counter()
        self._bad: list[str] = []
        self._rows = 0

    def run(self, workers: int) -> None:
        """Clean all units that have no completion record yet.

        Raises:
            DataError: an input cannot be read, or too much of it is no documents; a worker died.
        """
        make_directory(self._folder)
        with progress("cleaning", sum(wanted.size_bytes for wanted in self._plan.inputs), "B") as on_progress:
            jobs = self._jobs(on_progress)
            results = (((job, clean_unit(job)) for job in jobs) if workers == 1
                       else in_processes(clean_unit, jobs, workers, "use fewer --workers, or split long documents"))
            with closing(results):
                for _, record in results:
                    self._count(record)
        if self._unreadable.total() > self._plan.settings.corpus.max_bad_fraction * self._rows:
            self._refuse()

    def remove_strays(self) -> None:
        """Delete what units of earlier inputs, or killed processes, have left."""
        wanted = {stem.name for stem in self.stems}
        for path in self._folder.iterdir():
            if path.name.partition(".")[0] not in wanted and not path.name.endswith(".input.json"):
                path.unlink()

    def _jobs(self, on_progress: Callable[[float], None]) -> Iterator[Job]:
        before = 0
        for wanted in self._plan.inputs:
            with _input_errors(wanted):
                identity = wanted.identity()
            state = checksum_bytes(f"{self._plan.states[wanted.source]}{identity}".encode())
            source = self._plan.settings.source[wanted.source]
            name = checksum_bytes(f"{source.name}/{wanted.name}".encode()).removeprefix("xxh3:")[:16]
            whole = self._folder / f"{name}.input.json"
            if self._take_complete(whole, state, name):
                before += wanted.size_bytes
                continue
            number = -1
            for number, unit in enumerate(read_units(wanted, source, UNIT_BYTES)):
                stem = self._stem(name, number)
                self.stems.append(stem)
                if (record := _record(stem, state)) is not None:
                    self._count(record)
                else:
                    yield Job(self._settings, wanted, unit, str(stem), state)
                on_progress(before + unit.input_bytes)
            with _input_errors(wanted):
                if wanted.identity() != identity:
                    raise DataError(f"{wanted.name}: changed while it was read; it must stay as it is; start the same "
                                    "command again")
                before += wanted.size_bytes
            write_json(whole, {"state": state, "units": number + 1})  # units have records of their own

    def _stem(self, name: str, number: int) -> Path:
        return self._folder / f"{name}-{number:06d}"

    def _take_complete(self, whole: Path, state: str, name: str) -> bool:
        """Take all units of an input that need not even be read again, if it is one."""
        record = _read_record(whole, state)
        if record is None:
            return False
        stems = [self._stem(name, number) for number in range(record["units"])]
        records = [_record(stem, state) for stem in stems]
        if any(record is None for record in records):
            return False
        self.stems += stems
        for unit in records:
            assert unit is not None
            self._count(unit)
        return True

    def _count(self, record: dict[str, Any]) -> None:
        self._unreadable.update(record["tally"]["unreadable"])
        self._rows += record["tally"]["rows"]
        self._bad = (self._bad + record["bad"])[:_BAD_SHOWN]
        bad, most = self._unreadable.total(), max(0.5, self._plan.settings.corpus.max_bad_fraction)
        if bad >= _HOPELESS and bad > most * self._rows:
            self._refuse()

    def _refuse(self) -> None:
        """Say how much is bad, and where it is listed."""
        listed = self._plan.output / DROPPED / f"{UNREADABLE}.jsonl.zst"
        done = [stem for stem in self.stems if Path(f"{stem}.json").exists()]
        write_lines(listed, (line for stem in done for line in zstd_lines(f"{stem}.dropped.jsonl.zst")
                             if line.startswith(_UNREADABLE_LINE)))
        most = self._plan.settings.corpus.max_bad_fraction
        kinds = ", ".join(f"{count:,} x {reason}" for reason, count in self._unreadable.most_common())
        raise DataError(*self._bad, f"{self._plan.config}: corpus.max_bad_fraction: {self._unreadable.total():,} of "
                        f"{self._rows:,} lines and rows are no documents ({kinds}); at most {100 * most:g} % may be; repair "
                        f"them ({listed} lists them), or allow more")


def _record(stem: Path, state: str) -> dict[str, Any] | None:
    """Return the completion record of a unit if it is complete and of this state."""
    if not all(Path(f"{stem}.{kind}.jsonl.zst").exists() for kind in ("clean", "dropped")):
        return None
    return _read_record(Path(f"{stem}.json"), state)


def _read_record(path: Path, state: str) -> dict[str, Any] | None:
    try:
        record = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("state") == state else None


@contextmanager
def _input_errors(wanted: Input) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{error.filename or wanted.name}: cannot be read ({error.strerror}); it must stay where it is "
                        "until the corpus is ready; put it back") from None
