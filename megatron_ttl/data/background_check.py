"""Compare large datasets with their checksums while they are already read."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from megatron_ttl.data.indexed_dataset import IndexedDataset
from megatron_ttl.errors import DataError, UserError


class BackgroundCheck:
    """A thread that reads every `.bin` once which was too large to be compared when it was opened.

    It takes the disk's speed or 5 GB/s of a core, and 8 MiB. Close it, or let it end.

    Args:
        datasets: all that are read; those that were compared already, or have no manifest, are left out.
    """

    def __init__(self, datasets: Iterable[IndexedDataset]) -> None:
        self._open = [dataset for dataset in datasets if dataset.manifest is not None and not dataset.verified]
        self._error: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="data-check", daemon=True)
        if self._open:
            self._thread.start()

    def _run(self) -> None:
        try:
            for dataset in list(self._open):
                faults = dataset.checksum_faults(self._stop)
                if self._stop.is_set():
                    return
                if faults:
                    raise DataError(*faults)
                self._open.remove(dataset)
        except BaseException as error:  # noqa: BLE001: it is raised where the data are used
            self._error = error

    @property
    def unfinished(self) -> list[str]:
        """Prefixes of datasets that were not compared to their end."""
        return [dataset.prefix for dataset in self._open]

    def require_whole(self) -> None:
        """Return at once if no damage was found so far; may be called before every step.

        Raises:
            DataError: a dataset is damaged, or cannot be read.
        """
        if self._error is None:
            return
        if isinstance(self._error, UserError):
            raise DataError(*(f"{fault}; what was learnt since this start may be wrong: go on from a checkpoint before it"
                              for fault in self._error.faults))
        raise self._error

    def close(self) -> None:
        """Stop reading and wait for the thread to end. May be called twice."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(timeout=10)
