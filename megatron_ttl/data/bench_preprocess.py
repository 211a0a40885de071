"""Measure how fast text becomes a dataset, and which share of the encoder's own rate is left of it, in one run."""

from __future__ import annotations

import json
import os
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_ttl.data.documents import DocumentReader, input_faults
from megatron_ttl.data.encode import EncodeSettings
from megatron_ttl.data.preprocess import preprocess
from megatron_ttl.errors import ConfigError, DataError, raise_faults
from megatron_ttl.tokenizer.tokenizer import SPACE, Tokenizer

_BATCH = 1_000  # texts that are encoded at a time


def bench_preprocess(inputs: Sequence[str | os.PathLike[str]], tokenizer_folder: str, text_key: str = "text",
                     workers: Sequence[int] = (1, 2, 4), max_mb: float = 50.0, repeats: int = 2) -> dict[str, Any]:
    """Encode the same texts with SentencePiece, with our encoder, and with the whole of `preprocess`.

    Rates of one process are MB (10^6 bytes of UTF-8 text) per second of CPU time, which other work on the machine
    disturbs least; the best of `repeats` runs counts. With several workers, rates are by the clock, too, and the share of
    the CPU time that the parent takes says how many workers it could feed.

    Args:
        inputs: files of documents.
        tokenizer_folder: the tokenizer.
        text_key: key of the text in each object.
        workers: numbers of worker processes to try.
        max_mb: take so much text from the beginning of the inputs.
        repeats: runs of each.

    Returns:
        Sizes, rates, and ratios, flat.

    Raises:
        ConfigError: a number is out of range.
        DataError: an input or the tokenizer cannot be used, or our ids are not SentencePiece's.
    """
    faults = [f"--{name}: is {value}; it must be above 0; leave it out" for name, value in
              (("workers", min(workers, default=1)), ("max-mb", max_mb), ("repeats", repeats)) if not value > 0]
    raise_faults(ConfigError, faults)
    raise_faults(DataError, input_faults(inputs))
    texts = _some_texts(DocumentReader(inputs, text_key, max_bad_fraction=1.0), max_mb * 1e6)
    text_mb = sum(len(text.encode()) for text in texts) / 1e6
    whole: list[list[int]] = []
    result: dict[str, Any] = {"texts": len(texts), "text_mb": text_mb}
    result["sentencepiece_mb_per_cpu_s"] = text_mb / _cpu_seconds(
        lambda: whole.extend(_in_batches(Tokenizer.load(tokenizer_folder).encode_whole, texts)))
    _require_same_ids(Tokenizer.load(tokenizer_folder), texts, whole)
    result["ids"] = sum(map(len, whole))
    whole.clear()
    settings = EncodeSettings(tokenizer_folder, bos=True, held_out_fraction=0.01)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        source = Path(folder, "texts.jsonl")
        with open(source, "w", encoding="utf-8") as handle:
            handle.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)

        def run(count: int) -> None:
            preprocess([source], Path(folder, "dataset"), settings, workers=count, overwrite=True)

        encoder, end_to_end = [], []
        for _ in range(repeats):  # in turns, so that what else the machine does disturbs both
            fresh = Tokenizer.load(tokenizer_folder)  # which remembers no word yet, like that of a worker
            encoder.append(_cpu_seconds(lambda tokenizer=fresh: _in_batches(tokenizer.encode_packed, texts)))
            end_to_end.append(_cpu_seconds(lambda: run(1)))
        result["encoder_mb_per_cpu_s"] = text_mb / min(encoder)
        result["preprocess_mb_per_cpu_s"] = text_mb / min(end_to_end)
        result["encoder_over_sentencepiece"] = result["encoder_mb_per_cpu_s"] / result["sentencepiece_mb_per_cpu_s"]
        result["preprocess_over_encoder"] = min(encoder) / min(end_to_end)
        for count in workers:
            result |= _with_workers(run, count, text_mb)
    return result


def _with_workers(run: Callable[[int], None], count: int, text_mb: float) -> dict[str, float]:
    began, children = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    parent = _cpu_seconds(lambda: run(count))
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    used = parent + after.ru_utime + after.ru_stime - children.ru_utime - children.ru_stime
    return {f"workers_{count}_mb_per_s": text_mb / seconds, f"workers_{count}_mb_per_cpu_s": text_mb / used,
            f"workers_{count}_parent_cpu_share": parent / used}


def _some_texts(reader: DocumentReader, limit_bytes: float) -> list[str]:
    texts, size = [], 0
    for text in reader:
        texts.append(text)
        size += len(text.encode())
        if size >= limit_bytes:
            break
    if not texts:
        raise DataError("--input: holds no documents; there must be at least one; give other files")
    return texts


def _in_batches(encode: Callable[[list[str]], list[Any]], texts: list[str]) -> list[Any]:
    return [ids for start in range(0, len(texts), _BATCH) for ids in encode(texts[start : start + _BATCH])]


def _cpu_seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def _require_same_ids(tokenizer: Tokenizer, texts: list[str], whole: list[list[int]]) -> None:
    faults = [f"text {number}: its ids are not SentencePiece's; they must be; report it with the tokenizer"
              for number, (ids, wanted) in enumerate(zip(_in_batches(tokenizer.encode_batch, texts), whole, strict=True))
              if ids != wanted and SPACE not in texts[number]]
    raise_faults(DataError, faults)
