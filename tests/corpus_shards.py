"""Write documents as clean shards, for tests of what reads them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from megatron_ttl.data.corpus.document import Document
from megatron_ttl.data.corpus.shards import write_shard


def write_shards(folder: Path, shards: Iterable[Sequence[str | tuple[str, str]]]) -> list[Path]:
    """Write texts, or pairs of source and text, as shards; the identifier of a document is `<source>/<shard>:<line>`."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, texts in enumerate(shards):
        path = folder / f"clean-{number:05}.jsonl.zst"
        pairs = [("a", item) if isinstance(item, str) else item for item in texts]
        write_shard(path, (Document(text, source, "CC0", str(number), line) for line, (source, text) in enumerate(pairs, 1)))
        paths.append(path)
    return paths


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder with their contents."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
