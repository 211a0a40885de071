"""Fine-tune a model on a task from several seeds, then, once and at the end, open the test split."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_ttl.checkpoint.bounded_json import read_json_object
from megatron_ttl.config.validate import dotted
from megatron_ttl.console import progress
from megatron_ttl.errors import ConfigError, DataError, UserError, collected, raise_faults
from megatron_ttl.evaluate.model_places import require_model_folder
from megatron_ttl.files import or_disk_error, require_free_space, write_json, write_text
from megatron_ttl.finetune.backbone import Backbone, Pooling, settings_of
from megatron_ttl.finetune.classifier import all_logits, load_classifier, open_backbone
from megatron_ttl.finetune.metrics import majority, measure
from megatron_ttl.finetune.results import PREDICTIONS, RESULT, summarize, write_records
from megatron_ttl.finetune.rows import Row, TestSplit, class_faults, cut, read_rows, rows_checksum, without_repeats
from megatron_ttl.finetune.sources import TaskFiles, find_files, prepare_files
from megatron_ttl.finetune.tasks import ClassificationTask, find_task
from megatron_ttl.finetune.training import CLASSIFIER, HyperParameters, LabelledTexts, train_seed
from megatron_ttl.generate.open_folder import choose_device
from megatron_ttl.runtime import environment_report

SETTINGS, TRAINING = "settings.json", "training.json"
_FEWEST_TOKENS = 8


@dataclass(frozen=True)
class Request:
    """What is to be done."""

    task: str
    model: str
    data: str
    output: str = ""
    """Folder; empty: finetuned/<task>/<model>, with -untrained behind it where that is asked."""
    seeds: int = 3
    """Numbers 0, 1, ... so many."""
    untrained: bool = False
    pooling: Pooling = "last"
    max_tokens: int | None = None
    validation: float = 0.1
    """Share of the training rows that choose the epoch."""
    test_fraction: float = 0.2
    """Share of the rows that become the test split, where the data are one file."""
    split_seed: int = 0
    """Of both cuts, the same for every training seed."""
    device: str = "auto"
    task_files: Sequence[str] = ()
    training: HyperParameters = field(default_factory=HyperParameters)

    @property
    def folder(self) -> Path:
        """The output folder."""
        name = Path(self.model).resolve().name + ("-untrained" if self.untrained else "")
        return Path(self.output) if self.output else Path("finetuned", self.task, name)


def fine_tune(request: Request) -> dict[str, Any]:
    """Train all seeds, measure them on the test split, and write everything below the output folder.

    What is done already is not done again: finished seeds are kept, and a finished experiment is only read.

    Returns:
        What stands in `result.json`.

    Raises:
        UserError: a setting, the task, the data or the model is wrong, or the output belongs to another experiment.
    """
    faults = list(_request_faults(request))
    for check in (lambda: choose_device(request.device), lambda: require_model_folder(Path(request.model)),
                  lambda: find_files(find_task(request.task, request.task_files), request.data)):
        with collected(faults):
            check()
    raise_faults(UserError, faults)
    device, task, output = choose_device(request.device), find_task(request.task, request.task_files), request.folder
    with or_disk_error(output):
        files = prepare_files(task, request.data, output, request.test_fraction, request.split_seed)
    rows, left_out = without_repeats(read_rows(files.train, task))
    train, validation = cut(rows, request.validation, request.split_seed)
    raise_faults(DataError, [*class_faults(train, task, f"{files.train}: without the validation part it"),
                             *class_faults(validation, task, f"{files.train}: its validation part")])
    backbone = open_backbone(request.model, task, request.max_tokens, request.pooling)
    settings = _settings(request, task, files, rows, backbone)
    _claim(output, settings)
    if (output / RESULT).is_file():
        return read_json_object(output / RESULT)
    require_free_space(output, (request.seeds + 1) * 4 * backbone.scored.parameters, "one classifier per seed")
    test = TestSplit(files.test, task, [f"seed {seed}" for seed in range(request.seeds)])
    encoded = [LabelledTexts(backbone.encode([row.texts for row in part]), [row.label for row in part])
               for part in (train, validation)]
    seeds = _train_all(request, task, backbone, encoded[0], encoded[1], test, device)
    counts = {**left_out, "train": len(train), "validation": len(validation),
              **{f"cut_{name}": sum(text.cut for text in part.encoded)
                 for name, part in zip(("train", "validation"), encoded, strict=True)}}
    return _judge(request, task, files, rows, test, seeds, settings, counts, device)


def _request_faults(request: Request) -> Iterator[str]:
    training = request.training
    for option, value, lowest in (("--seeds", request.seeds, 1), ("--epochs", training.epochs, 1),
                                  ("--batch", training.batch, 1),
                                  ("--max-tokens", _FEWEST_TOKENS if request.max_tokens is None else request.max_tokens,
                                   _FEWEST_TOKENS)):
        if value < lowest:
            yield f"{option}: is {value}; it must be at least {lowest}; leave it out for the usual value"
    for option, share in (("--learning-rate", training.learning_rate), ("--epsilon", training.epsilon)):
        if not 0 < share < 1:
            yield f"{option}: is {share}; it must be between 0 and 1; leave it out for the usual value"
    if not 0 <= training.weight_decay < 10:
        yield f"--weight-decay: is {training.weight_decay}; it must be from 0 to 10; leave it out for the usual value"
    if not training.clip > 0:
        yield f"--clip: is {training.clip}; it must be over 0; leave it out for the usual value"
    for option, share in (("--validation", request.validation), ("--test-fraction", request.test_fraction)):
        if not 0 < share <= 0.5:
            yield f"{option}: is {share}; it must be over 0 and at most 0.5; leave it out for the usual value"
    if not 0 <= training.warmup < 1:
        yield f"--warmup: is {training.warmup}; it must be from 0 to 1; it is a share of the steps"
    if not 0 <= request.split_seed < 2**63:
        yield f"--split-seed: is {request.split_seed}; it must be from 0 to 2^63 - 1; choose another"


def _settings(request: Request, task: ClassificationTask, files: TaskFiles, rows: Sequence[Row],
              backbone: Backbone) -> dict[str, Any]:
    """Return all that decides what is learnt; a change of it is another experiment."""
    return {"task": task.model_dump(mode="json"), "model": backbone.scored.model_dump(mode="json"),
            "untrained": request.untrained, "seed_count": request.seeds, "split_seed": request.split_seed,
            "validation": request.validation, "training": asdict(request.training), **settings_of(backbone.record),
            "data": {"origin": files.origin, "sample": files.sample, "train_checksum": rows_checksum(rows)}}


def _claim(output: Path, settings: dict[str, Any]) -> None:
    """Write the settings, or compare them with those that the output was begun with.

    Raises:
        ConfigError: they differ; with every difference.
    """
    path = output / SETTINGS
    if not path.exists():
        with or_disk_error(path):
            write_json(path, settings)
        return
    before, now = _flat(read_json_object(path)), _flat(json.loads(json.dumps(settings)))
    raise_faults(ConfigError, (
        f"{output}: was begun with {key} = {json.dumps(before.get(key))}, now it is {json.dumps(now.get(key))}; an output "
        "holds one experiment, whose test split is opened once; choose another --output"
        for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)))


def _flat(value: dict[str, Any], place: tuple[str, ...] = ()) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, (*place, key)) if isinstance(item, dict) else {dotted((*place, key)): item}
    return flat


def _train_all(request: Request, task: ClassificationTask, backbone: Backbone, train: LabelledTexts,
               validation: LabelledTexts, test: TestSplit, device: torch.device) -> list[dict[str, Any]]:
    found = []
    for seed in range(request.seeds):
        folder = request.folder / f"seed-{seed}"
        if not (folder / TRAINING).is_file():
            label, total = f"{task.name}, seed {seed}", request.training.epochs * len(train.labels)
            try:
                with progress(label, total, "texts") as report:
                    row = train_seed(backbone, train, validation, task.label_names, task.metric, request.training, seed,
                                     folder, device, request.untrained, report)
            except KeyboardInterrupt:
                print(f"{request.folder}: {seed} of {request.seeds} seeds are done and kept; the same command goes on",
                      file=sys.stderr)
                raise
            with or_disk_error(folder):
                write_json(folder / TRAINING, row)
        found.append(read_json_object(folder / TRAINING))
        test.finished(f"seed {seed}")
    return found


def _judge(request: Request, task: ClassificationTask, files: TaskFiles, rows: Sequence[Row], test: TestSplit,
           seeds: list[dict[str, Any]], settings: dict[str, Any], counts: dict[str, int],
           device: torch.device) -> dict[str, Any]:
    """Open the test split, measure every seed's classifier, write the result."""
    output, names = request.folder, task.label_names
    every = test.open_once(f"the score of {len(seeds)} seeds")
    seen = {row.key for row in rows}
    judged = [row for row in every if row.key not in seen]
    if not judged:
        raise DataError(f"{test.path}: all of its {len(every)} rows stand in the training file too; a test row must be new; "
                        "correct the files")
    targets, checksum = [row.label for row in judged], rows_checksum(judged)
    texts = [row.texts for row in judged]
    for row in seeds:
        folder = output / f"seed-{row['seed']}"
        classifier = load_classifier(folder / CLASSIFIER, request.device)
        encoded = classifier.encode(texts)
        with progress(f"{task.name}, test, seed {row['seed']}", len(encoded), "texts") as report:
            logits = all_logits(classifier.module, encoded, classifier.pad_id, 2 * request.training.batch, device,
                                request.training.dtype, report)
        predicted = logits.argmax(-1).tolist()
        row["test"] = measure(targets, predicted, names)
        with or_disk_error(folder):
            write_text(folder / PREDICTIONS, json.dumps({"test_checksum": checksum, "targets": targets,
                                                         "predicted": predicted}) + "\n")
    counts |= {"test": len(judged), "test_rows_seen_in_training": len(every) - len(judged),
               "cut_test": sum(text.cut for text in encoded)}
    result = {"format": "megatron_ttl fine-tuning", "version": 1, **settings,
              "data": {**settings["data"], "test_checksum": checksum, "split": files.split}, "rows": counts,
              "seeds": seeds, "baselines": {"majority": majority([row.label for row in rows], targets, names)},
              "summary": summarize(seeds), "device": str(device), "versions": environment_report()}
    with or_disk_error(output):
        write_records(output, result)
        write_json(output / RESULT, result)
    return result
