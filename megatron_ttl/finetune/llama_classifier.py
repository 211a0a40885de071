"""Our Llama as a classifier: its blocks, and a head on the last token of the text; its folder, written and read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from megatron_ttl.checkpoint.hf_config import hf_config
from megatron_ttl.checkpoint.names import hf_names, hf_shapes, join_from_hf, packed_names, split_to_hf
from megatron_ttl.checkpoint.tensor_file import open_tensors, write_tensors
from megatron_ttl.errors import CheckpointError, ConfigError, raise_faults
from megatron_ttl.files import write_json
from megatron_ttl.evaluate.scored_model import describe_folder
from megatron_ttl.finetune.backbone import CURE, RECORD, Classifier, ClassifierRecord, Encoded, Pooling
from megatron_ttl.finetune.tasks import ClassificationTask
from megatron_ttl.generate.open_folder import open_model_folder
from megatron_ttl.model.llama import build_model
from megatron_ttl.tokenizer.folder import HF_FILES, copy_tokenizer
from megatron_ttl.tokenizer.tokenizer import Tokenizer

WEIGHTS = "model.safetensors"
_HEAD = "score.weight"
_HEAD_STD = 0.02
_FEWEST_TOKENS = 4


class LlamaClassifier(nn.Module):
    """The blocks of a Llama, its final norm, and a linear head without bias on one vector per text."""

    def __init__(self, model: nn.Sequential, classes: int, pooling: Pooling) -> None:
        super().__init__()
        *layers, head = model
        self.layers = nn.Sequential(*layers)
        self.norm = head.norm
        self.score = nn.Linear(head.lm_head.in_features, classes, bias=False, device=head.norm.weight.device)
        self.pooling = pooling

    def forward(self, ids: Tensor, real: Tensor, kinds: Tensor | None = None) -> Tensor:
        """Return logits that do not depend on how much padding there is, where it is, or on other rows.

        Padding is moved to the end of each row, where a causal model does not see it: no mask is needed.

        Args:
            ids: [b, s].
            real: [b, s] bool, False for padding; at least one True per row.
            kinds: not used.

        Returns:
            [b, classes].
        """
        ids = ids.gather(1, (~real).long().argsort(dim=1, stable=True))
        x = self.norm(self.layers(ids))  # [b, s, h]
        lengths = real.sum(dim=1)  # [b]
        if self.pooling == "last":
            pooled = x[torch.arange(len(x), device=x.device), lengths - 1]  # [b, h]
        else:
            inside = torch.arange(x.shape[1], device=x.device) < lengths[:, None]  # [b, s]
            pooled = (x * inside[..., None]).sum(dim=1) / lengths[:, None]
        return self.score(pooled)


class LlamaBackbone:
    """A model folder of ours; see `Backbone`."""

    def __init__(self, folder: str | os.PathLike[str], task: ClassificationTask, max_tokens: int | None = None,
                 pooling: Pooling = "last") -> None:
        """Open the folder.

        Args:
            folder: as `tools/convert_to_hf.py` writes it.
            task: what it is to learn.
            max_tokens: longer texts lose their end; None: as many as the model has positions.
            pooling: "last": the head sees the last token of the text; "mean": the mean over all.

        Raises:
            UserError: the folder or a file in it is missing or wrong.
        """
        opened = open_model_folder(folder, "cpu")
        self.scored = describe_folder(opened.directory, opened.config)
        self._model, self._tokenizer = opened.model, opened.tokenizer
        self.pad_id = opened.tokenizer.pad_id
        longest = opened.config.max_position_embeddings
        self.record = ClassifierRecord(
            family="llama", base=self.scored.name, base_checksum=self.scored.checksum, task=task, pooling=pooling,
            max_tokens=min(max_tokens or longest, longest), add_bos=opened.add_bos, model=opened.config)
        between = len(opened.tokenizer.encode(task.separator)) if len(task.texts) == 2 else 0
        if self.record.max_tokens - between < _FEWEST_TOKENS:
            raise ConfigError(f"task {task.name!r}: its separator takes {between} of {self.record.max_tokens} tokens; at "
                              f"least {_FEWEST_TOKENS} must be left for the texts; choose a shorter one, or more "
                              "--max-tokens")

    def encode(self, texts: Sequence[tuple[str, ...]]) -> list[Encoded]:
        """Return the ids of texts, or of pairs of texts."""
        return encode(texts, self._tokenizer, self.record)

    def build(self, seed: int, untrained: bool, device: torch.device) -> LlamaClassifier:
        """Return a classifier with weights of its own."""
        config = self.record.model
        assert config is not None
        model = build_model(config, seed if untrained else None)
        if not untrained:
            model.load_state_dict(self._model.state_dict())
        module = LlamaClassifier(model, len(self.record.task.labels), self.record.pooling)
        with torch.no_grad():
            module.score.weight.normal_(0.0, _HEAD_STD, generator=torch.Generator().manual_seed(seed))
        return module.to(device)

    def write(self, module: nn.Module, folder: Path) -> None:
        """Write weights by Hugging Face's names, tokenizer and record; transformers reads it too (pooling "last")."""
        config, labels = self.record.model, self.record.task.label_names
        assert config is not None
        state = module.state_dict()
        tensors = {_HEAD: state[_HEAD]}
        for name in packed_names(config)[:-1]:
            tensors |= split_to_hf(name, state[_own_name(name)], config)
        write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
        copy_tokenizer(self._tokenizer.directory, folder, HF_FILES, HF_FILES)
        write_json(folder / RECORD, self.record.model_dump(mode="json"))
        if self.record.pooling == "last":
            write_json(folder / "config.json", {
                **hf_config(config, self._tokenizer, "float32"), "architectures": ["LlamaForSequenceClassification"],
                "id2label": {str(number): label for number, label in enumerate(labels)},
                "label2id": {label: number for number, label in enumerate(labels)}})


def _own_name(packed: str) -> str:
    """Return the name in `LlamaClassifier` of a weight of the whole model."""
    return "norm.weight" if packed.endswith(".norm.weight") else f"layers.{packed}"


def encode(texts: Sequence[tuple[str, ...]], tokenizer: Tokenizer, record: ClassifierRecord) -> list[Encoded]:
    """Encode texts: BOS if the model begins with it, the text, or the first text, the separator and the second.

    What does not fit loses its end; of a pair the longer text is cut first, until both are equally long.
    """
    bos = [tokenizer.bos_id] if record.add_bos else []
    separator = tokenizer.encode(record.task.separator)
    found = []
    for ids in zip(*(tokenizer.encode_batch(list(side)) for side in zip(*texts, strict=True)), strict=True):
        room = record.max_tokens - len(bos) - (len(separator) if len(ids) == 2 else 0)
        kept = cut_to_fit(ids, room)
        body = kept[0] if len(kept) == 1 else [*kept[0], *separator, *kept[1]]
        found.append(Encoded([*bos, *body], [], kept != list(ids)))
    return found


def cut_to_fit(ids: Sequence[list[int]], room: int) -> list[list[int]]:
    """Cut the ends of one or two lists so that together they have at most `room` ids; the longer one is cut first."""
    if len(ids) == 1 or sum(map(len, ids)) <= room:
        return [ids[0][:room], *ids[1:]]
    first, second = ids
    keep = max(room - len(second), min(len(first), room - room // 2))
    return [first[:keep], second[: room - min(keep, len(first))]]


def load_llama_classifier(folder: Path, record: ClassifierRecord, device: torch.device) -> Classifier:
    """Read the folder of a `LlamaClassifier`.

    Raises:
        CheckpointError: weights are missing, damaged, or of another shape.
        DataError: the tokenizer is missing or wrong.
    """
    config = record.model
    if config is None:
        raise CheckpointError(f"{folder / RECORD}: model: is missing; a Llama's must be there; {CURE}")
    expected = {_HEAD: (len(record.task.labels), config.hidden_size), **hf_shapes(config)}
    del expected["lm_head.weight"]
    try:
        with open_tensors(folder / WEIGHTS) as handle:
            found = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}
            raise_faults(CheckpointError, (
                f"{folder / WEIGHTS}: {name}: has shape {found.get(name)}; {RECORD} asks for {expected.get(name)}; {CURE}"
                for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)))
            tensors = {name: handle.get_tensor(name) for name in expected}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder / WEIGHTS}: is no readable safetensors file ({error}); it must be one; "
                              f"{CURE}") from None
    module = LlamaClassifier(build_model(config, None), len(record.task.labels), record.pooling)
    state = {_own_name(name): join_from_hf(name, {hf: tensors[hf] for hf in hf_names(name, config)}, config)
             for name in packed_names(config)[:-1]}
    module.load_state_dict({**state, _HEAD: tensors[_HEAD]})
    tokenizer = Tokenizer.load(folder)
    return Classifier(record, module.to(device).eval(), tokenizer.pad_id, lambda texts: encode(texts, tokenizer, record))
