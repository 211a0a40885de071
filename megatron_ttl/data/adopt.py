"""Give a dataset that another program wrote a manifest, once its ids are found to be those of a tokenizer.

Megatron-LM, datatrove and GPT-NeoX write `.bin` and `.idx` and nothing that says which tokenizer made the ids. Nobody can
prove it afterwards, but the wrong tokenizer is seen: the text that its pieces spell is not encoded to the same ids again.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from megatron_ttl.data.indexed_dataset import IndexedDataset
from megatron_ttl.data.inspect import Scan, content_faults
from megatron_ttl.data.manifest import DatasetManifest, FileRecord, TokenizerRecord, dataset_paths, dump_manifest
from megatron_ttl.data.tokenizer_copy import holds_tokenizer, place_tokenizer, text_bytes_of, tokenizer_record
from megatron_ttl.errors import DataError, raise_faults
from megatron_ttl.files import checksum, or_disk_error, write_text
from megatron_ttl.tokenizer.tokenizer import Tokenizer

_TRIED = 200  # documents that are decoded and encoded again
_COME_BACK = 0.9  # of them: Hugging Face's ids differ where a text spells a special piece or holds U+2581
_CURE = "tokenise the text again with tools/preprocess_data.py"


def adopt_dataset(prefix: str | os.PathLike[str], tokenizer_folder: str | os.PathLike[str],
                  on_progress: Callable[[float], None] | None = None) -> dict[str, Any]:
    """Check a foreign dataset against a tokenizer and write its manifest, and a copy of the tokenizer, beside it.

    Checked are, over all ids: the vocabulary, one EOS at the end of every document and nowhere else, BOS at the beginning
    of all documents or of none and nowhere else, and filler; and whether 200 documents spread over the dataset come back
    when they are decoded and encoded again. `.bin` and `.idx` are not touched.

    Args:
        prefix: path without suffix.
        tokenizer_folder: the tokenizer that made the ids.
        on_progress: is given the bytes of the `.bin` that were read.

    Returns:
        What the manifest says, flat.

    Raises:
        DataError: the dataset is damaged, has a manifest, or is not of this tokenizer; with all faults.
        DiskError: the manifest or the copy cannot be written.
    """
    tokenizer, paths = Tokenizer.load(tokenizer_folder), dataset_paths(prefix)
    taken = [paths.manifest] if paths.manifest.exists() else []
    taken += [paths.tokenizer] if paths.tokenizer.exists() and not holds_tokenizer(paths.tokenizer, tokenizer) else []
    raise_faults(DataError, (f"{path}: exists already; a dataset is adopted once; use it as it is, or remove {path.name}"
                             for path in taken))
    dataset, record = IndexedDataset(prefix), tokenizer_record(tokenizer, paths.tokenizer)
    raise_faults(DataError, _shape_faults(dataset))
    scan = Scan(dataset, record).run(on_progress)
    begins = np.append(0, dataset.document_ends()[:-1])
    with_bos = int(np.count_nonzero(dataset.tokens[begins] == record.bos_id))
    bos = with_bos > 0
    raise_faults(DataError, [*_eos_faults(dataset, scan, record), *_bos_faults(dataset, scan, record, with_bos)])
    raise_faults(DataError, _tokenizer_faults(dataset, tokenizer, bos))
    manifest = DatasetManifest(
        text_bytes=text_bytes_of(tokenizer, scan.counts), bos=bos, tokenizer=record, dtype=dataset.dtype.name,
        documents=dataset.document_count, tokens=dataset.token_count,
        bin=FileRecord(bytes=paths.bin.stat().st_size, checksum=checksum(paths.bin)),
        idx=FileRecord(bytes=paths.idx.stat().st_size, checksum=checksum(paths.idx)),
    )
    with or_disk_error(paths.manifest):
        place_tokenizer(tokenizer, paths.tokenizer)
        write_text(paths.manifest, dump_manifest(manifest))
    return {"dataset": dataset.prefix, "documents": manifest.documents, "tokens": manifest.tokens, "bos": bos,
            "text_bytes": manifest.text_bytes, "bytes_per_token": manifest.text_bytes / max(1, manifest.tokens),
            "vocab_size": record.vocab_size, "tokenizer": record.checksum, "manifest": str(paths.manifest)}


def _shape_faults(dataset: IndexedDataset) -> list[str]:
    faults = []
    if dataset.dtype.name not in ("uint16", "int32"):
        faults.append(f"{dataset.paths.idx}: its ids are {dataset.dtype.name}; they must be uint16 or int32; {_CURE}")
    if dataset.sequence_count != dataset.document_count:
        faults.append(f"{dataset.paths.idx}: has {dataset.sequence_count:,} sequences in {dataset.document_count:,} "
                      f"documents, as --split-sentences makes them; a document must be one sequence; {_CURE}")
    if not dataset.token_count:
        faults.append(f"{dataset.paths.bin}: holds no ids; there must be a document; {_CURE}")
    return faults


def _eos_faults(dataset: IndexedDataset, scan: Scan, record: TokenizerRecord) -> list[str]:
    if len(scan.counts) > record.eos_id and scan.counts[record.eos_id]:
        return content_faults(dataset, scan)
    return [f"{dataset.paths.bin}: holds no EOS (id {record.eos_id}); every document must end with one, as --append-eod and "
            f"datatrove's eos_token write it; {_CURE}"]


def _bos_faults(dataset: IndexedDataset, scan: Scan, record: TokenizerRecord, with_bos: int) -> list[str]:
    found = int(scan.counts[record.bos_id]) if record.bos_id < len(scan.counts) else 0
    faults = []
    if with_bos not in (0, dataset.document_count):
        faults.append(f"{dataset.paths.bin}: {with_bos:,} of its {dataset.document_count:,} documents begin with BOS (id "
                      f"{record.bos_id}); all or none must; {_CURE}")
    if found != with_bos:
        faults.append(f"{dataset.paths.bin}: holds BOS (id {record.bos_id}) {found - with_bos:,} times inside of documents; "
                      f"it must stand at their beginning or nowhere; {_CURE}")
    return faults


def _tokenizer_faults(dataset: IndexedDataset, tokenizer: Tokenizer, bos: bool) -> list[str]:
    numbers = np.unique(np.linspace(0, dataset.document_count - 1, min(_TRIED, dataset.document_count)).astype(np.int64))
    bare = [dataset.document(number)[int(bos) : -1].tolist() for number in numbers.tolist()]
    again = tokenizer.encode_batch([tokenizer.decode(ids) for ids in bare])
    come_back = sum(ids == other for ids, other in zip(bare, again, strict=True))
    if come_back >= _COME_BACK * len(bare):
        return []
    return [f"{dataset.paths.bin}: {come_back} of {len(bare)} documents come back when they are decoded and encoded again; "
            f"with the tokenizer that made the ids {100 * _COME_BACK:g} % do; give that one, or {_CURE}"]
