"""Write documents as clean shards, for tests of what reads them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import zstandard

from megatron_ttl.data.corpus.document import Document


def write_shards(folder: Path, shards: Iterable[Sequence[str | tuple[str, str]]]) -> list[Path]:
    """Write texts, or pairs of source and text, as shards; the identifier of a document is `<source>/<shard>:<line>`."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, texts in enumerate(shards):
        path = folder / f"clean-{number:05}.jsonl.zst"
        lines = []
        for line, item in enumerate(texts, 1):
            source, text = ("a", item) if isinstance(item, str) else item
            document = Document(text, source, "CC0", str(number), line)
            lines.append(json.dumps({
                "text": text, "id": document.id, "source": source, "license": "CC0", "file": document.file,
                "position": line, "hash": document.hash, "meta": {}, "notes": {}}, ensure_ascii=False) + "\n")
        path.write_bytes(zstandard.ZstdCompressor().compress("".join(lines).encode("utf-8")))
        paths.append(path)
    return paths


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder with their contents."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
