"""Open tokenizers of any make to count with: SentencePiece, tokenizer.json, WordPiece vocabularies, GPT-2's pair of files.

Nothing of ours is trained or run with them; they are what ours is compared with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import sentencepiece

from megatron_ttl.errors import DataError
from megatron_ttl.files import checksum_bytes, read_regular
from megatron_ttl.tokenizer.folder import MAX_MODEL_BYTES
from megatron_ttl.tokenizer.tokenizer import SPACE

if TYPE_CHECKING:
    import tokenizers

UNKNOWN, BYTES, SPACES = 1, 2, 4
"""What a piece may be, bits of `ForeignTokenizer.kinds`: unknown; not one whole character; nothing but spaces."""
_LARGEST_JSON = 64 << 20
_MOST_PIECES = 1 << 22
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
_CURE = "give a .model, a tokenizer.json, a WordPiece .txt, GPT-2's encoder.json+vocab.bpe, or a folder with one of these"
# What a folder may hold, in the order of preference; the files of a pair stand together.
_IN_FOLDERS = (("tokenizer.model",), ("spiece.model",), ("tokenizer.json",), ("vocab.json", "merges.txt"),
               ("encoder.json", "vocab.bpe"), ("vocab.txt",))


@dataclass(frozen=True)
class ForeignTokenizer:
    """A vocabulary that turns texts into ids, without adding specials."""

    name: str
    kind: str
    """`SentencePiece`, `tokenizer.json`, `WordPiece` or `byte-level BPE`."""
    vocab_size: int
    checksum: str
    encode: Callable[[Sequence[str]], list[list[int]]]
    kinds: np.ndarray
    """uint8, shape [largest id + 1]."""


def open_foreign(place: str, lowercase: bool = False) -> ForeignTokenizer:
    """Open a tokenizer.

    Args:
        place: a file, a folder, or two files joined by `+` (vocabulary, merges); `NAME=` before it names the column.
        lowercase: whether a WordPiece vocabulary is of lower-case text.

    Raises:
        DataError: it is missing, damaged, or of no kind that is known.
    """
    name, place = _named(place)
    paths = _files(place)
    payloads = [_read(path) for path in paths]
    name = name or (Path(place).name if Path(place).is_dir() else paths[0].stem)
    try:
        if len(paths) == 2:
            kind, made = "byte-level BPE", _byte_level_bpe(payloads[0], payloads[1])
        elif paths[0].suffix == ".txt":
            kind, made = "WordPiece", _word_piece(payloads[0], lowercase)
        elif paths[0].suffix == ".json":
            kind, made = "tokenizer.json", _tokenizer_json(payloads[0])
        else:
            kind, made = "SentencePiece", None
        encode, kinds = _sentencepiece(payloads[0]) if made is None else _through_tokenizers(made)
    except DataError:
        raise
    except Exception as error:  # SentencePiece raises RuntimeError, and tokenizers nothing more special than this
        raise DataError(f"{paths[0]}: is no tokenizer ({str(error)[:200]}); {_CURE}") from None

    def encode_or_say(texts: Sequence[str]) -> list[list[int]]:
        try:
            return encode(texts)
        except Exception as error:
            raise DataError(f"{paths[0]}: cannot encode the text ({str(error)[:200]}); a tokenizer must say something to "
                            "every text; leave it out") from None

    return ForeignTokenizer(name, kind, len(kinds), checksum_bytes(b"".join(payloads)), encode_or_say, kinds)


def _named(place: str) -> tuple[str, str]:
    name, equals, rest = place.partition("=")
    return (name, rest) if equals and name and "/" not in name and not Path(place).exists() else ("", place)


def _files(place: str) -> list[Path]:
    path = Path(place)
    if path.is_dir():
        found = next((names for names in _IN_FOLDERS if all((path / name).is_file() for name in names)), None)
        if found is None:
            raise DataError(f"{path}: holds no tokenizer; {_CURE}")
        return [path / name for name in found]
    if path.exists():
        if path.suffix not in (".model", ".json", ".txt"):
            raise DataError(f"{path}: has an unknown suffix; {_CURE}")
        return [path]
    parts = [Path(part) for part in place.split("+")]
    if missing := [str(part) for part in parts if not part.is_file()]:
        raise DataError(*(f"{part}: is no file; it must be a tokenizer; {_CURE}" for part in missing))
    if len(parts) != 2:
        raise DataError(f"{place}: names {len(parts)} files; a pair is a vocabulary and its merges; {_CURE}")
    return parts


def _read(path: Path) -> bytes:
    try:
        return read_regular(path, MAX_MODEL_BYTES if path.suffix == ".model" else _LARGEST_JSON)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); it must be a tokenizer; {_CURE}") from None


def _sentencepiece(payload: bytes) -> tuple[Callable[[Sequence[str]], list[list[int]]], np.ndarray]:
    if not payload:  # would be accepted and fail at the first use
        raise ValueError("the file is empty")
    processor = sentencepiece.SentencePieceProcessor(model_proto=payload)
    count = processor.vocab_size()
    flags = np.zeros(count, np.uint8)
    for number in range(count):
        flags[number] = (UNKNOWN * processor.is_unknown(number) | BYTES * processor.is_byte(number)
                         | SPACES * (not processor.id_to_piece(number).strip(SPACE)))
    return lambda texts: processor.encode(list(texts), num_threads=1), flags


def _through_tokenizers(made: tokenizers.Tokenizer) -> tuple[Callable[[Sequence[str]], list[list[int]]], np.ndarray]:
    from tokenizers import decoders

    made.no_truncation()
    made.no_padding()
    settings = json.loads(made.to_str())
    model = settings["model"]
    unknown = model.get("unk_token")
    if isinstance(model.get("unk_id"), int):
        unknown = model["vocab"][model["unk_id"]][0]
    byte_level = '"ByteLevel"' in json.dumps([settings.get("pre_tokenizer"), settings.get("decoder")])
    spell = decoders.ByteLevel()
    vocabulary = made.get_vocab()
    last = max(vocabulary.values(), default=-1)
    if not 0 <= last < _MOST_PIECES:
        raise ValueError(f"its largest id is {last:,}")
    flags = np.zeros(last + 1, np.uint8)
    for piece, number in vocabulary.items():
        text = spell.decode([piece]) if byte_level else piece.replace(SPACE, " ")
        part = "\ufffd" in text if byte_level else bool(_BYTE_PIECE.fullmatch(piece))
        flags[number] = UNKNOWN * (piece == unknown) | BYTES * part | SPACES * (not text.strip(" "))

    def encode(texts: Sequence[str]) -> list[list[int]]:
        return [found.ids for found in made.encode_batch_fast(list(texts), add_special_tokens=False)]

    return encode, flags


def _tokenizer_json(payload: bytes) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(payload.decode("utf-8"))


def _word_piece(payload: bytes, lowercase: bool) -> tokenizers.Tokenizer:
    """Build BERT's tokenizer: accents stay, whatever the case, for Portuguese needs them."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    vocabulary = {line.rstrip("\r"): number for number, line in enumerate(payload.decode("utf-8").rstrip("\n").split("\n"))}
    if "[UNK]" not in vocabulary:
        raise ValueError("a WordPiece vocabulary has a line [UNK]")
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    made.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=False)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return made


def _byte_level_bpe(vocabulary: bytes, merges: bytes) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces: Any = json.loads(vocabulary)
    if not isinstance(pieces, dict):
        raise ValueError("its vocabulary is no JSON object of pieces and ids")
    lines = [line for line in merges.decode("utf-8").split("\n") if line.strip() and not line.startswith("#version")]
    made = Tokenizer(models.BPE(pieces, [tuple(line.split()) for line in lines]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made
