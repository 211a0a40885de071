"""Train a SentencePiece BPE tokenizer and write it as a folder that Hugging Face loads too."""

from __future__ import annotations

import heapq
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import sentencepiece
import xxhash

from megatron_ttl import __version__
from megatron_ttl.errors import ConfigError, DataError, DiskError, raise_faults
from megatron_ttl.files import atomic_directory, checksum_bytes, human_bytes
from megatron_ttl.tokenizer.folder import HF_SPECIALS
from megatron_ttl.tokenizer.tokenizer import SPACE, SPECIALS

# Characters that SentencePiece reserves (NUL, its space, its unknown) or that never share a piece with others
# (line ends): a text is cut at them. They need no piece of their own, for every byte has one.
_BREAKS = re.compile(f"[\0\n\r{SPACE}\u2585]+")
# SentencePiece silently skips what it calls sentences of more than 4,192 bytes; so many characters have at
# most 4,000.
_LONGEST_CHARACTERS = 1_000
_TOO_LARGE = re.compile(r"Vocabulary size too high \(\d+\).*<= (\d+)")
_TOO_SMALL = re.compile(r"Vocabulary size is smaller than required_chars\. \d+ vs (\d+)")

# Upper bounds: 4.8 to 6.5 bytes per byte were measured, the more the fewer words repeat, on 5 to 358 MB of Portuguese.
_MEMORY_BASE, _MEMORY_PER_BYTE, _MEMORY_PER_DOCUMENT = 80 << 20, 6.5, 250

# What Hugging Face's LlamaTokenizer reads beside tokenizer.model. `add_prefix_space` false matches the
# model's `add_dummy_prefix` false: with a dummy prefix the two disagree on text that begins with a space.
_HF_CONFIG = {
    "tokenizer_class": "LlamaTokenizer", "legacy": False, "add_prefix_space": False, "add_bos_token": True,
    "add_eos_token": False, **HF_SPECIALS, "padding_side": "right", "clean_up_tokenization_spaces": False,
}


@dataclass(frozen=True)
class Sample:
    """The documents a tokenizer is trained on."""

    payloads: list[bytes]
    """In UTF-8: a string takes up to four times as much where one of its characters is rare."""
    documents_seen: int
    bytes_seen: int
    bytes_used: int

    @property
    def texts(self) -> list[str]:
        """All of them as strings."""
        return list(map(_text, self.payloads))

    def pieces(self) -> Iterator[str]:
        """Yield what SentencePiece is to see, one string at a time; see `cut`."""
        return (piece for payload in self.payloads for piece in cut(_text(payload)))


def train_tokenizer(
    texts: Iterable[str], output: str | os.PathLike[str], vocab_size: int = 32_000, *,
    normalization: Literal["identity", "nfkc"] = "identity", character_coverage: float = 0.99995,
    digits: Literal["split", "whole"] = "split", max_documents: int | None = None, max_bytes: int | None = None,
    seed: int = 0, inputs: Sequence[dict[str, Any]] = (), on_sample: Callable[[Sample, int], None] | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train a tokenizer on documents and write its folder; the same input gives the same bytes.

    Args:
        texts: documents; read once.
        output: folder to write; complete when its name appears.
        vocab_size: pieces, the 4 specials and 256 bytes included.
        normalization: "identity" keeps text as it is; "nfkc" folds compatibility characters (Hugging Face's
            LlamaTokenizer does not: give it normalised text).
        character_coverage: share of the text's characters that get a piece; the rest is spelled in bytes.
        digits: "split" makes every digit a token, so that all numbers are written alike; "whole" lets years and the like
            be pieces: 4 to 6 % fewer tokens on Portuguese prose and laws.
        max_documents: train on at most so many documents, drawn with `seed`.
        max_bytes: train on at most so many bytes of documents, drawn with `seed`.
        inputs: where the texts come from, for `training.json`; read after `texts` are consumed.
        on_sample: told, before the training, on what it trains and how many bytes of memory that takes about.
        overwrite: replace a folder that is there.

    Returns:
        What was used and written, flat.

    Raises:
        ConfigError: a setting is out of range, or the output exists.
        DataError: the corpus is empty, or too small or too large for the vocabulary.
    """
    output = Path(output)
    raise_faults(ConfigError, _setting_faults(output, vocab_size, character_coverage, max_documents,
                                              max_bytes, seed, overwrite))
    started = time.monotonic()
    sample = draw_sample(texts, max_documents, max_bytes, seed)
    if next(sample.pieces(), None) is None:
        raise DataError(f"the corpus: {sample.documents_seen:,} documents with no text to learn from; it "
                        "must have some; give other inputs, or raise --max-bytes")
    read_s = time.monotonic() - started
    needed = memory_estimate(sample.bytes_used, len(sample.payloads))
    if on_sample is not None:
        on_sample(sample, needed)
    model = _train_model(sample.pieces(), vocab_size, normalization, character_coverage, digits)
    used = {"documents_seen": sample.documents_seen, "documents_used": len(sample.payloads),
            "bytes_seen": sample.bytes_seen, "bytes_used": sample.bytes_used}
    record = {
        "format": "megatron_ttl tokenizer", "version": 1, "model_type": "bpe", "vocab_size": vocab_size,
        "normalization": normalization, "character_coverage": character_coverage,
        "digits": digits, "sample": {"max_documents": max_documents, "max_bytes": max_bytes, "seed": seed, **used},
        "inputs": list(inputs), "specials": SPECIALS, "checksum": checksum_bytes(model),
        "versions": {"megatron_ttl": __version__, "sentencepiece": sentencepiece.__version__},
    }
    write_folder(output, model, record)
    return {"output": str(output), "vocab_size": vocab_size, **used, "checksum": record["checksum"],
            "memory_estimate_bytes": needed, "read_s": round(read_s, 2),
            "train_s": round(time.monotonic() - started - read_s, 2)}


def _setting_faults(output: Path, vocab_size: int, character_coverage: float, max_documents: int | None,
                    max_bytes: int | None, seed: int, overwrite: bool) -> list[str]:
    faults = []
    smallest = len(SPECIALS) + 256 + 1
    if vocab_size < smallest:
        faults.append(f"--vocab-size: is {vocab_size}; it must be at least {smallest} (4 specials, 256 "
                      "bytes, a character); 32000 is usual")
    if not 0.98 <= character_coverage <= 1:
        faults.append(f"--character-coverage: is {character_coverage}; it must be from 0.98 to 1; leave it "
                      "out for 0.99995")
    for name, value in (("--max-documents", max_documents), ("--max-bytes", max_bytes)):
        if value is not None and value < 1:
            faults.append(f"{name}: is {value}; it must be at least 1; leave it out to use everything")
    if not 0 <= seed < 2**64:
        faults.append(f"--seed: is {seed}; it must be from 0 to 2^64 - 1; choose another")
    if output.exists() and not output.is_dir():
        faults.append(f"{output}: is a file; the output must be a folder; choose another name")
    elif output.is_dir() and any(output.iterdir()) and not overwrite:
        faults.append(f"{output}: exists and is not empty; a tokenizer is not overwritten unasked; choose "
                      "another name, or give --overwrite")
    return faults


def draw_sample(texts: Iterable[str], max_documents: int | None, max_bytes: int | None, seed: int) -> Sample:
    """Keep the documents with the smallest keyed hashes, as many as fit, in the order they came.

    Which documents are kept depends on the seed and the texts alone, not on their order or on the files they
    stand in. At most the sample itself is held in memory.
    """
    kept: list[tuple[int, int, bytes]] = []  # heap, largest hash first: (-hash, -number, text)
    limited = max_documents is not None or max_bytes is not None
    bar = (-(2**64), 0)  # of the smallest hash that had to leave: what lies beyond it may not come in later
    seen = seen_bytes = kept_bytes = 0
    for text in texts:
        payload = text.encode("utf-8", "surrogatepass")
        rank = (-xxhash.xxh3_64_intdigest(payload, seed) if limited else 0, -seen)
        seen, seen_bytes = seen + 1, seen_bytes + len(payload)
        if rank < bar:
            continue
        heapq.heappush(kept, (*rank, payload))
        kept_bytes += len(payload)
        while ((max_documents is not None and len(kept) > max_documents)
               or (max_bytes is not None and kept_bytes > max_bytes)):
            *left, dropped = heapq.heappop(kept)
            bar = max(bar, tuple(left))
            kept_bytes -= len(dropped)
    kept.sort(key=lambda entry: -entry[1])
    return Sample([entry[2] for entry in kept], seen, seen_bytes, kept_bytes)


def memory_estimate(sample_bytes: int, documents: int) -> int:
    """Return about how many bytes of memory the process takes at its peak when it trains on a sample."""
    return int(_MEMORY_BASE + _MEMORY_PER_BYTE * sample_bytes + _MEMORY_PER_DOCUMENT * documents)


def announce_sample(sample: Sample, needed_bytes: int) -> None:
    """Say on standard error what the training begins with, and what it will take."""
    print(f"sample: {len(sample.payloads):,} of {sample.documents_seen:,} documents, {human_bytes(sample.bytes_used)}; "
          f"training on it takes up to about {human_bytes(needed_bytes)} of memory", file=sys.stderr, flush=True)


def _text(payload: bytes) -> str:
    return payload.decode("utf-8", "surrogatepass")


def cut(text: str) -> Iterator[str]:
    """Cut a document into what SentencePiece calls sentences: at line ends, and long lines at spaces.

    No character is lost but the reserved ones; a space stays at the head of the piece it begins.
    """
    for line in _BREAKS.split(text):
        start = 0
        while len(line) - start > _LONGEST_CHARACTERS:
            space = line.rfind(" ", start + 1, start + _LONGEST_CHARACTERS + 1)
            end = space if space > 0 else start + _LONGEST_CHARACTERS
            yield line[start:end]
            start = end
        if start < len(line):
            yield line[start:]


def _train_model(sentences: Iterator[str], vocab_size: int, normalization: str, character_coverage: float,
                 digits: str) -> bytes:
    """Run SentencePiece's trainer in a thread, so that Ctrl-C is heard while it works."""
    result, errors = BytesIO(), []

    def work() -> None:
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=sentences, model_writer=result, model_type="bpe",
                vocab_size=vocab_size, byte_fallback=True, split_digits=digits == "split",
                normalization_rule_name=normalization, remove_extra_whitespaces=False,
                add_dummy_prefix=False, allow_whitespace_only_pieces=True,
                character_coverage=character_coverage, unk_id=0, bos_id=1, eos_id=2, pad_id=3,
                num_threads=4,  # does not change the pieces, but is written into the model: a constant
                minloglevel=2,
            )
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work, name="sentencepiece", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    if errors:
        raise _training_fault(errors[0], vocab_size)
    return result.getvalue()


def _training_fault(error: Exception, vocab_size: int) -> Exception:
    """Turn SentencePiece's words about the size of the vocabulary into ours; leave other errors alone."""
    if match := _TOO_LARGE.search(str(error)):
        return DataError(f"--vocab-size: is {vocab_size:,}; this corpus gives at most {int(match[1]):,} "
                         "pieces; give more text, or a smaller vocabulary")
    if match := _TOO_SMALL.search(str(error)):
        return DataError(f"--vocab-size: is {vocab_size:,}; specials, bytes and the characters of this "
                         f"corpus alone need {int(match[1]):,}; give a larger vocabulary, or a smaller "
                         "--character-coverage")
    return error


def write_folder(output: Path, model: bytes, record: dict[str, Any]) -> None:
    """Write a tokenizer folder: the model, Hugging Face's two files and how it was trained.

    Raises:
        DiskError: the folder cannot be written.
    """
    contents = {
        "tokenizer_config.json": _HF_CONFIG, "special_tokens_map.json": HF_SPECIALS, "training.json": record,
    }
    try:
        with atomic_directory(output) as folder:
            (folder / "tokenizer.model").write_bytes(model)
            for name, value in contents.items():
                text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
                (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise DiskError(f"{output}: cannot be written ({error.strerror}); its folder must be writable and "
                        "have space for it; choose another --output") from None
