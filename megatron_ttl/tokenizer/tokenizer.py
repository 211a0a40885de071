"""Encode text and decode ids with a tokenizer folder that `tools/train_tokenizer.py` wrote."""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

from megatron_ttl.errors import DataError, raise_faults
from megatron_ttl.files import checksum_bytes
from megatron_ttl.tokenizer.folder import read_model

SPECIALS = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3}
"""Special pieces and the ids they must have."""

SPACE = "\u2581"
"""What SentencePiece writes for a space inside a piece."""

# Text is encoded word by word, and words are remembered: three times as fast as whole documents, for language
# repeats its words. The ids are the same, because no piece reaches over a place where the pattern cuts (a space
# after something else, either side of a newline): `_piece_faults` makes sure of it.
_WORDS = re.compile(f" *[^ \n{SPACE}]+| +|[\n{SPACE}]")
_REACHES_OVER = re.compile(f"[^{SPACE}]{SPACE}|\n.|.\n", re.DOTALL)
_SURROGATE = re.compile("[\ud800-\udfff]")
_REMEMBERED_CHARACTERS = 8_000_000  # of all words together: about 150 MB

_CURE = "train one with tools/train_tokenizer.py, or correct the path"


class Tokenizer:
    """A SentencePiece BPE model whose text round trip is exact: `decode(encode(text)) == text`.

    SentencePiece writes spaces as U+2581 and would turn a U+2581 of the text into a space; here that sign is
    encoded as its three byte pieces, which decode to itself. Hugging Face's classes do not know this: for
    text with U+2581, and for text that spells a special piece (they read the text "</s>" as the end of the
    document, we read it as four characters), their ids differ from ours; for all other text they are equal.

    With `--normalization nfkc` the round trip gives the normalised text.

    Attributes:
        directory: the folder it was loaded from.
        checksum: of `tokenizer.model`; two tokenizers with the same checksum give the same ids.
    """

    def __init__(self, processor: sentencepiece.SentencePieceProcessor, directory: Path,
                 checksum: str) -> None:
        self._processor = processor
        self.directory = directory
        self.checksum = checksum
        self.vocab_size: int = processor.vocab_size()
        self.unk_id: int = processor.unk_id()
        self.bos_id: int = processor.bos_id()
        self.eos_id: int = processor.eos_id()
        self.pad_id: int = processor.pad_id()
        self._words = _Words(processor)

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Tokenizer:
        """Load the `tokenizer.model` of a tokenizer folder (or of a model folder that holds one).

        Raises:
            DataError: the folder or the file is missing, is no SentencePiece model, or not one that this
                project can use: its special ids, bytes or treatment of spaces are others.
        """
        directory = Path(directory)
        path = directory / "tokenizer.model"
        if not directory.is_dir():
            what = "is a file" if directory.exists() else "does not exist"
            raise DataError(f"{directory}: {what}; it must be a tokenizer folder; {_CURE}")
        if not path.is_file():
            raise DataError(f"{path}: does not exist; a tokenizer folder holds a tokenizer.model; {_CURE}")
        payload = read_model(path)
        try:
            # An empty model would be accepted and fail at the first use.
            processor = sentencepiece.SentencePieceProcessor(model_proto=payload) if payload else None
        except (RuntimeError, UnicodeDecodeError):
            processor = None
        if processor is None:
            raise DataError(f"{path}: is not a SentencePiece model; it may be damaged or another file; "
                            f"{_CURE}")
        try:
            faults = _model_faults(processor)
        except UnicodeDecodeError as error:
            faults = [f"has a piece that is no UTF-8 ({error.reason}); the file may be damaged"]
        raise_faults(DataError, (f"{path}: {fault}; {_CURE}" for fault in faults))
        return cls(processor, directory, checksum_bytes(payload))

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without specials.

        Raises:
            DataError: the text holds a lone surrogate, which UTF-8 cannot express.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text; see `encode`."""
        return [list(memoryview(ids).cast("i")) for ids in self.encode_packed(texts)]

    def encode_packed(self, texts: Sequence[str]) -> list[bytes]:
        """Return the ids of each text as native int32, which is half the work of a list; see `encode`."""
        word_ids = self._words.__getitem__
        try:
            return [b"".join(map(word_ids, _WORDS.findall(text))) for text in texts]
        except (RuntimeError, TypeError, UnicodeError):
            raise_faults(DataError, (_surrogate_fault(number, text) for number, text in enumerate(texts)
                                     if _SURROGATE.search(text)))
            raise

    def encode_whole(self, texts: Sequence[str]) -> list[list[int]]:
        """Return what SentencePiece itself makes of whole texts, U+2581 lost as a space: slow, to compare with."""
        return self._processor.encode(list(texts), num_threads=1)

    def bytes_per_id(self) -> list[int]:
        """Return how many bytes of text each id stands for, in UTF-8; special pieces stand for none.  # [vocab_size]"""
        return [1 if self._processor.is_byte(number)
                else 0 if self._processor.is_control(number) or self._processor.is_unknown(number)
                else len(self._processor.id_to_piece(number).replace(SPACE, " ").encode())
                for number in range(self.vocab_size)]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`; special pieces are dropped, bytes that are no UTF-8 become U+FFFD.

        Raises:
            DataError: an id is outside of the vocabulary.
        """
        numbers = [int(number) for number in ids]
        wrong = next((number for number in numbers if not 0 <= number < self.vocab_size), None)
        if wrong is not None:
            raise DataError(f"{self.directory}: id {wrong} is not in the vocabulary; ids must be in "
                            f"[0, {self.vocab_size}); use the tokenizer that made the ids")
        return self._processor.decode(numbers)


class _Words(dict[str, bytes]):
    """The ids of every word that was met, native int32; all are forgotten when they are too many."""

    def __init__(self, processor: sentencepiece.SentencePieceProcessor) -> None:
        super().__init__()
        self._processor = processor
        self._sign = _packed([processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()])
        self._characters = 0

    def __missing__(self, word: str) -> bytes:
        """Encode a new word and remember it."""
        ids = self._sign if word == SPACE else _packed(self._processor.encode(word))
        self._characters += len(word)
        if self._characters > _REMEMBERED_CHARACTERS:
            self.clear()
            self._characters = len(word)
        self[word] = ids
        return ids


def _packed(ids: list[int]) -> bytes:
    return array("i", ids).tobytes()


def _surrogate_fault(number: int, text: str) -> str:
    place = _SURROGATE.search(text)
    assert place is not None
    code = f"U+{ord(place.group()):04X}"
    return (f"text {number}, character {place.start()}: is the lone surrogate {code}; text must be "
            " expressible in UTF-8; repair or leave out the document")


def _model_faults(processor: sentencepiece.SentencePieceProcessor) -> list[str]:
    """Say what keeps a SentencePiece model from being one of ours."""
    faults = []
    found = {"<unk>": processor.unk_id(), "<s>": processor.bos_id(), "</s>": processor.eos_id(),
             "<pad>": processor.pad_id()}
    for piece, wanted in SPECIALS.items():
        if found[piece] != wanted:
            where = f"id {found[piece]}" if found[piece] >= 0 else "no id"
            faults.append(f"{piece} has {where}; it must have id {wanted}")
        elif processor.id_to_piece(wanted) != piece:
            faults.append(f"id {wanted} is written '{processor.id_to_piece(wanted)}'; it must be '{piece}'")
    byte_ids = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
    if not all(processor.is_byte(number) for number in byte_ids):
        faults.append("has no byte pieces, unknown characters would be lost; it must have all 256 (byte "
                      "fallback)")
    return faults or _space_faults(processor) or _piece_faults(processor)


def _space_faults(processor: sentencepiece.SentencePieceProcessor) -> list[str]:
    adds = processor.id_to_piece(processor.encode("a")[0]).startswith(SPACE)
    if adds or processor.decode(processor.encode("  a  b  ")) != "  a  b  ":
        return ["adds or removes spaces; every space of the text must be kept and none added"]
    return []


def _piece_faults(processor: sentencepiece.SentencePieceProcessor) -> list[str]:
    pieces = map(processor.id_to_piece, range(processor.vocab_size()))
    crossing = next((piece for piece in pieces if _REACHES_OVER.search(piece)), None)
    return [] if crossing is None else [f"piece {crossing!r} reaches over a space or a newline; no piece may"]
