"""Encoders such as BERTimbau, from a local folder, through transformers: the one door to it for fine-tuning."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from megatron_ttl.checkpoint.bounded_json import read_json_object
from megatron_ttl.checkpoint.tensor_file import open_tensors
from megatron_ttl.errors import CheckpointError, ConfigError, raise_faults
from megatron_ttl.files import write_json
from megatron_ttl.finetune.backbone import RECORD, Classifier, ClassifierRecord, Encoded, describe
from megatron_ttl.finetune.tasks import ClassificationTask

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")
_NO_LIMIT = 100_000  # tokenizers without a limit say 10^30
_SAFE = {"local_files_only": True, "trust_remote_code": False}


class EncoderClassifier(nn.Module):
    """An encoder of transformers with its head for sequences, on [CLS]."""

    def __init__(self, model: Any, asks_kinds: bool) -> None:
        super().__init__()
        self.model = model
        self._asks_kinds = asks_kinds

    def forward(self, ids: Tensor, real: Tensor, kinds: Tensor | None = None) -> Tensor:
        """[b, s], [b, s] bool, [b, s] -> [b, classes]"""
        more = {"token_type_ids": kinds} if self._asks_kinds else {}
        return self.model(input_ids=ids, attention_mask=real.long(), **more).logits


class EncoderBackbone:
    """An encoder's folder; see `classifier.Backbone`."""

    def __init__(self, folder: str | os.PathLike[str], task: ClassificationTask, max_tokens: int | None = None) -> None:
        """Open the folder.

        Args:
            folder: config.json, safetensors and a tokenizer that transformers reads without code of the folder's own.
            task: what it is to learn.
            max_tokens: longer texts lose their end; None: as many as the model has positions.

        Raises:
            CheckpointError: it is no such folder.
            ConfigError: transformers is not installed.
        """
        self._folder = Path(folder)
        raise_faults(CheckpointError, _folder_faults(self._folder))
        self._tokenizer, limit = _open_tokenizer(self._folder)
        self._config = _config(self._folder, task)
        self.scored = describe(self._folder, sum(weight.numel() for weight in self._load(False).base_model.parameters()))
        self.pad_id = self._tokenizer.pad_token_id
        self.record = ClassifierRecord(family="encoder", base=self.scored.name, base_checksum=self.scored.checksum,
                                       task=task, max_tokens=min(max_tokens or limit, limit, _positions(self._config)))

    def encode(self, texts: Sequence[tuple[str, ...]]) -> list[Encoded]:
        """Return the ids of texts, or of pairs, with the tokenizer's own [CLS] and [SEP]."""
        return _encode(texts, self._tokenizer, self.record.max_tokens)

    def build(self, seed: int, untrained: bool, device: torch.device) -> EncoderClassifier:
        """Return a classifier with weights of its own."""
        torch.manual_seed(seed)
        return EncoderClassifier(self._load(untrained), "token_type_ids" in self._tokenizer.model_input_names).to(device)

    def write(self, module: nn.Module, folder: Path) -> None:
        """Write what transformers writes, and the record."""
        with _quiet():
            module.model.save_pretrained(folder)  # type: ignore[union-attr, operator]
            self._tokenizer.save_pretrained(folder)
        write_json(folder / RECORD, self.record.model_dump(mode="json"))

    def _load(self, untrained: bool) -> Any:
        return _load_model(self._folder, self._config, untrained)


def load_encoder_classifier(folder: Path, record: ClassifierRecord, device: torch.device) -> Classifier:
    """Read the folder of an `EncoderClassifier`.

    Raises:
        CheckpointError: it is damaged.
        ConfigError: transformers is not installed.
    """
    raise_faults(CheckpointError, _folder_faults(folder))
    tokenizer, _ = _open_tokenizer(folder)
    model = _load_model(folder, _config(folder, record.task), untrained=False)
    module = EncoderClassifier(model, "token_type_ids" in tokenizer.model_input_names)
    return Classifier(record, module.to(device).eval(), tokenizer.pad_token_id,
                      lambda texts: _encode(texts, tokenizer, record.max_tokens))


def _folder_faults(folder: Path) -> Iterator[str]:
    if not (folder / "config.json").is_file():
        yield f"{folder}: has no config.json; it must be a folder of a model; correct --model"
        return
    if "auto_map" in read_json_object(folder / "config.json", follow_links=True):
        yield f"{folder / 'config.json'}: 'auto_map' names code to load; a model must need none; use another one"
    weights = sorted(path for path in folder.iterdir() if path.suffix == ".safetensors")
    if not weights:
        pickled = ", ".join(sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES))
        why = f"; {pickled[:80]} is not read, for opening such a file can run code" if pickled else ""
        yield (f"{folder}: has no safetensors{why}; weights must be safetensors; convert them with "
               "tools/import_weights.py, and put config.json and tokenizer beside them")
    for path in weights:
        try:
            with open_tensors(path):
                pass
        except (SafetensorError, OSError) as error:
            yield f"{path}: is no readable safetensors file ({error}); it must be one; get the folder again"


@contextmanager
def _quiet() -> Iterator[Any]:
    """Yield transformers, which does not speak of heads that are drawn anew and of texts that are long."""
    try:
        import transformers
    except ImportError:
        raise ConfigError("transformers is not installed; it is needed for encoders; pip install 'megatron_ttl'") from None
    logging = transformers.utils.logging
    level, showed = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield transformers
    finally:
        logging.set_verbosity(level)
        if showed:
            logging.enable_progress_bar()


@contextmanager
def _or_checkpoint_error(folder: Path, what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError, ImportError) as error:
        said = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{folder}: transformers cannot read its {what} ({said}); it must be an encoder's folder; "
                              "get it again, or use another one") from None


def _open_tokenizer(folder: Path) -> tuple[Any, int]:
    with _quiet() as transformers, _or_checkpoint_error(folder, "tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **_SAFE)
        if tokenizer.pad_token_id is None:
            raise ValueError("it has no token for padding")
    return tokenizer, min(tokenizer.model_max_length, _NO_LIMIT)


def _config(folder: Path, task: ClassificationTask) -> Any:
    names = task.label_names
    with _quiet() as transformers, _or_checkpoint_error(folder, "config.json"):
        return transformers.AutoConfig.from_pretrained(
            folder, **_SAFE, num_labels=len(names), id2label=dict(enumerate(names)),
            label2id={name: number for number, name in enumerate(names)})


def _load_model(folder: Path, config: Any, untrained: bool) -> Any:
    with _quiet() as transformers, _or_checkpoint_error(folder, "model"):
        auto = transformers.AutoModelForSequenceClassification
        if untrained:
            return auto.from_config(config, trust_remote_code=False)
        return auto.from_pretrained(folder, config=config, use_safetensors=True, dtype=torch.float32, **_SAFE)


def _positions(config: Any) -> int:
    """Return how many tokens an encoder takes; RoBERTa's count begins after the padding id."""
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:  # relative positions
        return _NO_LIMIT
    return positions - config.pad_token_id - 1 if "roberta" in config.model_type else positions


def _encode(texts: Sequence[tuple[str, ...]], tokenizer: Any, max_tokens: int) -> list[Encoded]:
    found = []
    with _quiet():
        for sides in texts:
            whole = tokenizer(*sides)
            cut = len(whole["input_ids"]) > max_tokens
            read = tokenizer(*sides, truncation="longest_first", max_length=max_tokens) if cut else whole
            found.append(Encoded(list(read["input_ids"]), list(read.get("token_type_ids", [])), cut))
    return found
