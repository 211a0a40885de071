"""One of everything that the project opens: data, settings, tokenizer, run folder with a checkpoint, model folder."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tiny_folder import write_dataset
from tiny_session import write_data, write_settings

from megatron_ttl.checkpoint.hf import export_model_folder, export_run
from megatron_ttl.checkpoint.manifest import MANIFEST, FileEntry, Manifest
from megatron_ttl.checkpoint.names import split_to_hf
from megatron_ttl.checkpoint.store import CheckpointStore
from megatron_ttl.config.load import Settings, load_settings
from megatron_ttl.data.documents import DocumentReader
from megatron_ttl.data.encode import EncodeSettings
from megatron_ttl.data.indexed_dataset import IndexedDataset
from megatron_ttl.data.inspect import decoded_documents, inspect_dataset
from megatron_ttl.data.preprocess import preprocess
from megatron_ttl.files import checksum_bytes, write_json
from megatron_ttl.generate.open_folder import open_model_folder
from megatron_ttl.model.llama import build_model
from megatron_ttl.plan.forecast import dry_run
from megatron_ttl.tokenizer.folder import copy_tokenizer
from megatron_ttl.tokenizer.tokenizer import Tokenizer
from megatron_ttl.train.open_data import open_data, tokenizer_directory
from megatron_ttl.row_file import RowFile, trim_rows
from megatron_ttl.train.run_folder import RunFolder, open_checkpoint

STEP = 4


@dataclass(frozen=True)
class Place:
    """Where everything lies."""

    folder: Path
    machine: Path
    run_file: Path

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def checkpoint(self) -> Path:
        return self.run / "checkpoints" / f"step-{STEP:08d}"

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def settings(self, *overrides: str) -> Settings:
        return load_settings(self.machine, self.run_file, ["train.steps=8", *overrides])

    def copy(self, folder: Path) -> Place:
        """Return a copy whose settings name the copy."""
        shutil.copytree(self.folder, folder)
        for path in (folder / self.run_file.name, folder / "run" / "settings.json"):
            path.write_text(path.read_text().replace(str(self.folder), str(folder)))
        copied = Place(folder, folder / self.machine.name, folder / self.run_file.name)
        seal(copied.checkpoint, "record.json",
             (copied.checkpoint / "record.json").read_text().replace(str(self.folder), str(folder)).encode())
        return copied


def make_place(folder: Path) -> Place:
    """Write everything, small."""
    machine, run_file = write_settings(folder, write_data(folder / "data"), folder / "run")
    place = Place(folder, machine, run_file)
    settings = place.settings()
    model = settings.run.model
    generator = torch.Generator().manual_seed(5)
    weights = {hf: piece for name, tensor in build_model(model, seed=1).state_dict().items()
               for hf, piece in split_to_hf(name, torch.randn(tensor.shape, generator=generator) * 0.1, model).items()}
    store = CheckpointStore(place.run / "checkpoints")
    run = settings.run.model_dump(mode="json")
    store.save(STEP, {"weights": weights}, {
        "step": STEP, "consumed_samples": 8 * STEP, "consumed_tokens": 256 * STEP, "run": run, "bos": True})
    write_json(place.run / "settings.json", {"run": run})
    (place.run / "metrics.jsonl").write_text(json.dumps({"event": "train", "step": 1, "loss": 5.0}) + "\n")
    (place.run / "tokenizer").mkdir()
    copy_tokenizer(place.data / "tokenizer", place.run / "tokenizer")
    export_model_folder(store.open(STEP), model, place.run / "tokenizer", place.model, verify=False)
    return place


def seal(checkpoint: Path, name: str, payload: bytes) -> None:
    """Replace a file of a checkpoint, and let the manifest vouch for the new one."""
    content = json.loads((checkpoint / MANIFEST).read_text())
    content.pop("checksum")
    manifest = Manifest.model_validate(content)
    entry = FileEntry(bytes=len(payload), checksum=checksum_bytes(payload))
    (checkpoint / name).write_bytes(payload)
    (checkpoint / MANIFEST).write_bytes(manifest.model_copy(update={"files": {**manifest.files, name: entry}}).encode())


def resume(place: Place) -> None:
    """Do what a run does with its folder before it trains."""
    folder = RunFolder(place.settings())
    folder.claim()
    try:
        folder.starting_point()
        trim_rows(folder.metrics_path, STEP)
        RowFile(folder.metrics_path).close()
    finally:
        folder.release()


def branch(place: Place) -> None:
    """Begin another run at the checkpoint."""
    RunFolder(place.settings(f"run.dir={place.folder}/other", f"run.start_from={place.checkpoint}")).starting_point()


def begin(place: Place) -> None:
    """Open the data of a run and take its tokenizer into a new run folder."""
    settings = place.settings(f"run.dir={place.folder}/fresh")
    dataset, _ = open_data(settings.run)
    shutil.rmtree(place.folder / "fresh", ignore_errors=True)
    RunFolder(settings).describe({}, {}, tokenizer_directory(dataset))


def export(place: Place) -> None:
    """Convert the run, without asking transformers."""
    shutil.rmtree(place.folder / "export", ignore_errors=True)
    export_run(place.run, place.folder / "export", verify=False)


def tokenise(place: Place, source: str = "new.jsonl", max_bad_fraction: float = 1.0) -> None:
    """Make a dataset of a file of documents with the tokenizer."""
    preprocess([place.folder / source], place.folder / "tokenised", EncodeSettings(str(place.data / "tokenizer")),
               max_bad_fraction=max_bad_fraction, overwrite=True)


def read_documents(place: Place) -> None:
    """Read a file of documents, as the training of a tokenizer does."""
    list(DocumentReader([place.folder / "new.jsonl"], max_bad_fraction=1.0))


def look_at_data(place: Place) -> None:
    """Open, inspect and decode a dataset."""
    IndexedDataset(place.data / "train", verify=True)
    inspect_dataset(place.data / "train", verify=True)
    list(decoded_documents(place.data / "train", 1))


def open_model(place: Place) -> None:
    """Open a model folder, as evaluation and generation do."""
    open_model_folder(place.model, "cpu")


ENTRIES: list[tuple[str, str, Callable[[Place], object], bool]] = [
    # (file, entry point, call, whether anything but the right file must be refused)
    ("run/checkpoints/step-00000004/manifest.json", "CheckpointStore.open",
     lambda place: CheckpointStore(place.run / "checkpoints").open(STEP), True),
    ("run/checkpoints/step-00000004/manifest.json", "open_checkpoint", lambda p: open_checkpoint(p.checkpoint), True),
    ("run/checkpoints/step-00000004/record.json", "resume", resume, True),
    ("run/checkpoints/step-00000004/record.json", "start_from", branch, True),
    ("run/checkpoints/step-00000004/weights.safetensors", "resume", resume, True),
    ("run/checkpoints/step-00000004/weights.safetensors", "export", export, True),
    ("run/settings.json", "resume", resume, True),
    ("run/settings.json", "export", export, True),
    ("run/metrics.jsonl", "resume", resume, False),
    ("run/run.lock", "resume", resume, False),
    ("run/STOP", "resume", resume, False),
    ("run/tokenizer/tokenizer.model", "export", export, True),
    ("run/tokenizer/tokenizer_config.json", "export", export, True),
    ("run/tokenizer/special_tokens_map.json", "export", export, True),
    ("data/train.idx", "IndexedDataset", look_at_data, True),
    ("data/train.bin", "IndexedDataset", look_at_data, True),
    ("data/train.json", "IndexedDataset", look_at_data, True),
    ("data/train.tokenizer/tokenizer.model", "inspect_data --show", look_at_data, True),
    ("data/train.tokenizer/tokenizer_config.json", "begin", begin, True),
    ("data/train.tokenizer/training.json", "begin", begin, True),
    ("data/held.idx", "begin", begin, True),
    ("data/tokenizer/tokenizer.model", "Tokenizer.load", lambda place: Tokenizer.load(place.data / "tokenizer"), True),
    ("data/tokenizer/special_tokens_map.json", "preprocess", tokenise, False),  # kept where a copy is there
    ("run.toml", "load_settings", lambda place: place.settings(), True),
    ("machine.json", "load_settings", lambda place: place.settings(), True),
    ("run.toml", "dry_run", lambda place: dry_run(place.machine, place.run_file, ["train.steps=8"], 1), True),
    ("model/config.json", "open_model_folder", open_model, True),
    ("model/generation_config.json", "open_model_folder", open_model, False),  # never read
    ("model/special_tokens_map.json", "open_model_folder", open_model, False),  # never read
    ("model/tokenizer_config.json", "open_model_folder", open_model, False),
    ("model/tokenizer.model", "open_model_folder", open_model, True),
    ("model/model.safetensors", "open_model_folder", open_model, True),
    ("model/megatron_ttl.json", "open_model_folder", open_model, False),  # never read
    ("new.jsonl", "DocumentReader", read_documents, False),
    ("new.jsonl", "preprocess", tokenise, False),
]


def put(place: Place, name: str, payload: bytes) -> Callable[[], None]:
    """Replace a file by a payload; return what puts the old one back."""
    path = place.folder / name
    kept = {p: p.read_bytes() if p.exists() else None for p in (path, place.checkpoint / MANIFEST)}
    if path.parent == place.checkpoint and path.name != MANIFEST:
        seal(place.checkpoint, path.name, payload)
    else:
        path.write_bytes(payload)

    def back() -> None:
        for old, content in kept.items():
            if content is None:
                old.unlink(missing_ok=True)
            else:
                old.write_bytes(content)
    return back


def identifier(text: str) -> str:
    """Return a text that pytest shows well."""
    return re.sub(r"[^\w.=-]+", "-", text)[:60]


def write_documents(place: Place) -> None:
    """Write a good file of documents where the hostile ones will stand."""
    write_dataset(place.folder / "new", place.data / "tokenizer", ["uma casa", "um rio"])
