"""Rows of a dataset: a folder that `save_to_disk` wrote, a folder of data files, or a name on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_ttl.data.corpus.settings import SourceSettings
from megatron_ttl.errors import DataError

_HUB_TIMEOUT_S = 10.0
_RETRIES = 3
_BATCH_ROWS = 256


def dataset_rows(source: SourceSettings) -> Iterator[dict[str, Any]]:
    """Yield the rows of the dataset that a source names; one on the hub is streamed.

    Raises:
        DataError: `datasets` is not installed, the dataset or its split is not there, or the hub cannot be reached.
    """
    dataset = _open(source)
    columns: dict[str, list[Any]]
    try:
        for columns in dataset.iter(batch_size=_BATCH_ROWS):
            for values in zip(*columns.values(), strict=True):
                yield dict(zip(columns, values, strict=True))
    except Exception as error:  # of any library that reads the files
        raise _unreadable(source, error) from None


def _open(source: SourceSettings) -> Any:
    """Open what a source names, without reading its rows."""
    try:
        import datasets
    except ImportError:
        raise DataError("datasets is not installed; it is needed for `dataset` in a corpus file; "
                        "pip install 'megatron_ttl[corpus]'") from None
    assert source.dataset is not None
    folder = Path(source.dataset)
    if not folder.is_dir():
        _require_hub(source)
    # What is lost on the way is asked for again a few times, not for minutes.
    datasets.config.STREAMING_READ_MAX_RETRIES = _RETRIES
    try:
        if (folder / "dataset_dict.json").is_file():
            splits = datasets.load_from_disk(source.dataset)
            if source.split not in splits:
                raise DataError(f"source '{source.name}': split: '{source.split}' is not in {folder}; it must be one of "
                                f"{', '.join(splits)}; choose one")
            return splits[source.split]
        if (folder / "state.json").is_file():
            return datasets.load_from_disk(source.dataset)
        return datasets.load_dataset(source.dataset, source.dataset_config, split=source.split, revision=source.revision,
                                     streaming=True, download_config=datasets.DownloadConfig(max_retries=_RETRIES))
    except DataError:
        raise
    except Exception as error:  # the library has no type of its own for all that it may find
        raise _unreadable(source, error) from None


def _require_hub(source: SourceSettings) -> None:
    """Ask the hub for the dataset once, with a time limit, before a library asks patiently.

    Raises:
        DataError: there is no answer, or it says no.
    """
    from huggingface_hub import HfApi

    assert source.dataset is not None
    try:
        HfApi().dataset_info(source.dataset, revision=source.revision, timeout=_HUB_TIMEOUT_S)
    except Exception as error:  # of the library, of its HTTP client, of the system
        raise DataError(f"source '{source.name}': dataset: '{source.dataset}' is no folder here, and the hub does not "
                        f"give it ({_in_short(error)}); it must be a folder, or a dataset on the hub and a network; correct "
                        "the name, or download it where there is a network and give its folder") from None


def _unreadable(source: SourceSettings, error: Exception) -> DataError:
    return DataError(f"source '{source.name}': dataset: '{source.dataset}' cannot be read ({_in_short(error)}); it must be "
                     "a folder written by save_to_disk, a folder of data files, or a dataset on the hub; correct dataset, "
                     "dataset_config, split or revision")


def _in_short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
