"""Every reader of a file that someone else may have written, fed with bytes: a value or a fault, nothing else.

The table `TARGETS` is what both the short form (hypothesis) and the long form (`fuzz_atheris.py`) read.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import re
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import safe_open
from small_settings import RUN
from tiny_folder import documents, write_dataset, write_tokenizer

from megatron_ttl.checkpoint.bounded_json import parse_json_object
from megatron_ttl.checkpoint.hf_config import hf_config, read_hf_config
from megatron_ttl.checkpoint.hf_weights import find_weights, write_weights
from megatron_ttl.checkpoint.manifest import RECORD, FileEntry, Manifest, TensorEntry
from megatron_ttl.checkpoint.names import hf_shapes
from megatron_ttl.checkpoint.store import CheckpointStore
from megatron_ttl.checkpoint.tensor_file import write_tensors
from megatron_ttl.config.load import load_settings, read_settings
from megatron_ttl.config.schema import ModelConfig
from megatron_ttl.data import manifest as dataset_manifest
from megatron_ttl.data.documents import DocumentReader
from megatron_ttl.data.index_file import IndexFile
from megatron_ttl.data.indexed_dataset import IndexedDataset
from megatron_ttl.errors import ConfigError, UserError, raise_faults
from megatron_ttl.files import checksum_bytes
from megatron_ttl.tokenizer.tokenizer import Tokenizer
from megatron_ttl.train.energy import carry_on
from megatron_ttl.row_file import trim_rows
from megatron_ttl.train.run_folder import RunFolder

MOST_SECONDS = 2.0
MOST_BYTES = 256 << 20
_FORM = re.compile(r".+: .+; .+; .+")

PROFILE = '{"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}}'
FULL_PROFILE = """{"_comment": ["why"], "train_micro_batch_size_per_gpu": 2, "optimizer": "auto",
 "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 500000},
 "bf16": {"enabled": true}, "communication_data_type": "bf16", "recompute": "full",
 "parallel": {"tensor": 2, "pipeline": 1, "sequence": true, "replica_check_steps": null}}"""
OVERRIDES = 'optimizer.lr=2e-3\ntrain.steps=none\ntrain.tokens=51200\ndata.sources=[{prefix="a"}, {prefix="b", weight=2}]'
MODEL = ModelConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                    num_key_value_heads=1, vocab_size=8, max_position_embeddings=8)


@dataclass(frozen=True)
class Target:
    """One reader."""

    name: str
    prepare: Callable[[Path], tuple[bytes, ...]]
    """Write into an empty folder what the reader needs besides, and return valid payloads."""
    feed: Callable[[bytes, Path], object]
    """Read a payload."""


def check(target: Target, payload: bytes, folder: Path, most_seconds: float = MOST_SECONDS) -> bool:
    """Feed a payload; return whether it was accepted.

    Raises:
        AssertionError: a fault that is no sentence of ours, or too much time or memory.
        Exception: whatever the reader raised that is no `UserError`.
    """
    accepted, faults = True, []
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as door:
        door.write("5")  # the peak of memory begins anew
    memory, begin = _peak_bytes(), time.process_time()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            target.feed(payload, folder)
    except UserError as error:
        accepted, faults = False, error.faults
        assert faults, "an error without a fault"
    seconds, grown = time.process_time() - begin, _peak_bytes() - memory
    assert seconds <= most_seconds, f"{seconds:.1f} s"
    assert grown <= MOST_BYTES, f"{grown:,} bytes"
    for fault in faults:
        assert _FORM.fullmatch(fault) and fault.isprintable(), f"not the form of a fault: {fault!r}"
        assert len(fault) <= 30_000, f"a fault of {len(fault):,} characters: {fault[:300]!r}"
    return accepted


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# --- datasets ---

def _dataset(folder: Path) -> Path:
    write_dataset(folder / "d", write_tokenizer(folder / "tokenizer"), documents(12))
    return folder / "d.idx"


def _index_seeds(folder: Path) -> tuple[bytes, ...]:
    ours = _dataset(folder).read_bytes()
    (folder / "d.json").unlink()
    empty = b"MMIDIDX\0\0" + (1).to_bytes(8, "little") + b"\4" + bytes(8) + (1).to_bytes(8, "little") + bytes(8)
    split = (b"MMIDIDX\0\0" + (1).to_bytes(8, "little") + b"\10" + (3).to_bytes(8, "little") + (3).to_bytes(8, "little")
             + b"".join(n.to_bytes(4, "little") for n in (2, 3, 1))
             + b"".join(n.to_bytes(8, "little") for n in (0, 4, 10, 0, 2, 3)))
    return ours, empty, split


def _feed_index(payload: bytes, folder: Path) -> None:
    _write(folder / "x.idx", payload)
    index = IndexFile(folder / "x.idx")
    assert len(index.lengths) == len(index.pointers) and index.checksum() == checksum_bytes(payload)
    # The size of the .bin is the size that a hostile index asks for, when that is small.
    if index.token_count <= 10_000:
        _write(folder / "x.bin", bytes(index.token_count * index.dtype.itemsize))
        dataset = IndexedDataset(folder / "x")
        lengths = [len(dataset.document(number)) for number in range(min(dataset.document_count, 50))]
        assert sum(lengths) <= dataset.token_count and len(dataset.document_ends()) == dataset.document_count


def _feed_dataset(payload: bytes, folder: Path) -> None:
    """An index beside the data of another one, and its manifest."""
    _write(folder / "d.idx", payload)
    dataset = IndexedDataset(folder / "d", verify=True)
    for number in range(min(dataset.document_count, 50)):
        dataset.document(number)


def _feed_dataset_manifest(payload: bytes, folder: Path) -> None:
    _write(folder / "d.json", payload)
    dataset_manifest.dump_manifest(dataset_manifest.read_manifest(folder / "d.json"))
    IndexedDataset(folder / "d")


def _lines(folder: Path) -> tuple[bytes, ...]:
    rows = [{"text": "a menina viu o rio\n"}, {"id": 7, "text": "日本 🙂 \\"}, {"text": "b", "meta": {"text": [1, None]}}]
    plain = "".join(json.dumps(row, ensure_ascii=number == 1) + "\n" for number, row in enumerate(rows)).encode()
    return plain, b"\xef\xbb\xbf" + plain.replace(b"\n", b"\r\n"), gzip.compress(plain * 9, mtime=0), plain + b'{"text": "x"}'


def _feed_lines(payload: bytes, folder: Path) -> None:
    _write(folder / "x.jsonl", payload)
    for text in DocumentReader([folder / "x.jsonl"], max_bad_fraction=0.5):
        assert text.strip() and text.encode()


# --- checkpoints ---

def _state() -> dict[str, dict[str, torch.Tensor]]:
    weights = {"a": torch.arange(6.0).reshape(2, 3), "norm.weight": torch.ones(3, dtype=torch.bfloat16)}
    return {"weights": weights, "rng": {"torch": torch.arange(4, dtype=torch.uint8)}}


def _checkpoints(folder: Path) -> tuple[bytes, ...]:
    """Write the files of a checkpoint of one process and of two into one folder; return the two manifests."""
    from store_peers import save

    CheckpointStore(folder / "one").save(3, _state(), {"step": 3})
    save(folder / "two", 3, 2)
    place, manifests = folder / "step-00000003", []
    place.mkdir()
    for store in ("one", "two"):
        source = folder / store / "step-00000003"
        for path in source.iterdir():
            (place / path.name).write_bytes(path.read_bytes())
        manifests.append((source / "manifest.json").read_bytes())
    return tuple(manifests)


def _feed_manifest(payload: bytes, folder: Path) -> None:
    place = folder / "step-00000003"
    _write(place / "manifest.json", payload)
    checkpoint = CheckpointStore(folder).open(place)
    for group in checkpoint.groups:
        for name, tensor in checkpoint.tensors(group).items():
            assert tuple(tensor.shape) == checkpoint.shape(group, name)


def _feed_sealed_manifest(payload: bytes, folder: Path) -> None:
    """With a right checksum of its own, as whoever forges one would write it."""
    content = parse_json_object(payload, folder / "manifest.json")
    content.pop("checksum", None)
    try:
        sealed = Manifest.model_validate(content).encode()
    except (ValidationError, ValueError):
        sealed = payload
    _feed_manifest(sealed, folder)


def _tensor_seeds(folder: Path) -> tuple[bytes, ...]:
    weights = _state()["weights"]
    write_tensors(folder / "one", weights)
    write_tensors(folder / "two", weights, {"format": "pt"})
    (folder / "step-00000003").mkdir()
    (folder / "step-00000003" / RECORD).write_bytes(b"{}\n")
    return (folder / "one").read_bytes(), (folder / "two").read_bytes()


def _feed_tensors(payload: bytes, folder: Path) -> None:
    """A file of tensors whose checksum is right, so that only its own table can be wrong."""
    place = folder / "step-00000003"
    _write(place / "weights.safetensors", payload)
    entries = {"a": TensorEntry(dtype="F32", shape=[2, 3]), "norm.weight": TensorEntry(dtype="BF16", shape=[3])}
    files = {"weights.safetensors": FileEntry(bytes=len(payload), checksum=checksum_bytes(payload)),
             RECORD: FileEntry(bytes=3, checksum=checksum_bytes(b"{}\n"))}
    _write(place / "manifest.json", Manifest(step=3, files=files, groups={"weights": entries}).encode())
    found = CheckpointStore(folder).open(place).tensors("weights")
    assert [tuple(tensor.shape) for tensor in found.values()] == [(2, 3), (3,)]


# --- model folders ---

def _model_seeds(folder: Path, shard_bytes: int, file: str) -> tuple[bytes, ...]:
    tensors = {name: torch.full(shape, 0.5) for name, shape in hf_shapes(MODEL).items()}
    write_weights(folder, tensors, MODEL, torch.bfloat16, shard_bytes, lambda _: None)
    return ((folder / file).read_bytes(),)


def _feed_model(payload: bytes, folder: Path, file: str) -> None:
    _write(folder / file, payload)
    weights = find_weights(folder, MODEL)
    for name, shape in hf_shapes(MODEL).items():
        with safe_open(weights.folder / weights.file_of[name], framework="pt") as handle:
            assert tuple(handle.get_tensor(name).shape) == shape


def _config_seeds(folder: Path) -> tuple[bytes, ...]:
    class Ids:
        bos_id, eos_id, pad_id = 1, 2, 3

    ours = hf_config(MODEL, Ids, "float32")  # type: ignore[arg-type]
    short = {key: ours[key] for key in ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers",
                                        "num_attention_heads", "vocab_size", "rope_theta", "head_dim")}
    return json.dumps(ours, indent=2).encode(), json.dumps(short).encode()


def _feed_config(payload: bytes, folder: Path) -> None:
    _write(folder / "config.json", payload)
    hf_shapes(read_hf_config(folder / "config.json"))


def _tokenizer_seeds(folder: Path) -> tuple[bytes, ...]:
    return ((write_tokenizer(folder / "tokenizer") / "tokenizer.model").read_bytes(),)


def _feed_tokenizer(payload: bytes, folder: Path) -> None:
    _write(folder / "tokenizer/tokenizer.model", payload)
    tokenizer = Tokenizer.load(folder / "tokenizer")
    ids = tokenizer.encode("a menina viu o rio\n日本 🙂 \u2581")
    assert tokenizer.decode(ids) and all(0 <= number < tokenizer.vocab_size for number in ids)


# --- settings, and what a run leaves behind ---

def _settings_seeds(folder: Path, *seeds: str) -> tuple[bytes, ...]:
    (folder / "r.toml").write_text(RUN)
    (folder / "m.json").write_text(PROFILE)
    return tuple(seed.encode() for seed in seeds)


def _feed_settings(payload: bytes, folder: Path, file: str = "", overrides: bool = False) -> None:
    given = payload.decode("utf-8", "surrogateescape").split("\n") if overrides else []
    if file:
        _write(folder / file, payload)
    reading = read_settings(folder / "m.json", folder / "r.toml", given, world_size=4)
    raise_faults(ConfigError, reading.faults)
    json.dumps(reading.settings.run.model_dump(mode="json"), allow_nan=False).encode()


@cache
def _run_folder(folder: Path) -> RunFolder:
    return RunFolder(load_settings(folder / "m.json", folder / "r.toml", [f"run.dir={folder}/run"]))


def _run_seeds(folder: Path) -> tuple[bytes, ...]:
    _settings_seeds(folder)
    settings = _run_folder(folder).settings
    stored = {"run": settings.run.model_dump(mode="json"), "versions": {}}
    record = {"step": 3, "consumed_samples": 24, "consumed_tokens": 768, "run": stored["run"]}
    CheckpointStore(folder / "run/checkpoints").save(3, {"rng": _state()["rng"]}, record)
    return json.dumps(stored, indent=2).encode(), json.dumps(stored).encode()


def _feed_run(payload: bytes, folder: Path) -> None:
    """The settings.json of a run that is gone on with."""
    _write(folder / "run/settings.json", payload)
    checkpoint, warnings = _run_folder(folder).starting_point()
    assert checkpoint is not None and not warnings


def _row_seeds(folder: Path) -> tuple[bytes, ...]:
    rows = [{"step": step, "loss": 3.5, "energy_kwh": 0.1, "emissions_kg_co2e": 0.2} for step in range(1, 5)]
    return "".join(json.dumps(row) + "\n" for row in [{"event": "start"}, *rows]).encode(), b""


def _feed_rows(payload: bytes, folder: Path) -> None:
    _write(folder / "metrics.jsonl", payload)
    carry_on({"energy_kwh": 0.05}, trim_rows(folder / "metrics.jsonl", 3))
    assert payload.startswith((folder / "metrics.jsonl").read_bytes())


def _write(path: Path, payload: bytes) -> None:
    # Anew every time: a file that is cut while it is mapped would end the process (SIGBUS).
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    with open(path, "xb", buffering=0) as handle:
        handle.write(payload)


TARGETS = {target.name: target for target in (
    Target("index", _index_seeds, _feed_index),
    Target("dataset", lambda folder: (_dataset(folder).read_bytes(),), _feed_dataset),
    Target("dataset manifest", lambda folder: (_dataset(folder).with_suffix(".json").read_bytes(),),
           _feed_dataset_manifest),
    Target("documents", _lines, _feed_lines),
    Target("manifest", _checkpoints, _feed_manifest),
    Target("sealed manifest", _checkpoints, _feed_sealed_manifest),
    Target("tensors", _tensor_seeds, _feed_tensors),
    Target("model weights", partial(_model_seeds, shard_bytes=1 << 30, file="model.safetensors"),
           partial(_feed_model, file="model.safetensors")),
    Target("model index", partial(_model_seeds, shard_bytes=600, file="model.safetensors.index.json"),
           partial(_feed_model, file="model.safetensors.index.json")),
    Target("model config", _config_seeds, _feed_config),
    Target("tokenizer", _tokenizer_seeds, _feed_tokenizer),
    Target("run file", lambda folder: _settings_seeds(folder, RUN), partial(_feed_settings, file="r.toml")),
    Target("profile", lambda folder: _settings_seeds(folder, PROFILE, FULL_PROFILE),
           partial(_feed_settings, file="m.json")),
    Target("overrides", lambda folder: _settings_seeds(folder, OVERRIDES, "run.dir=/x/y"),
           partial(_feed_settings, overrides=True)),
    Target("run settings", _run_seeds, _feed_run),
    Target("metrics", _row_seeds, _feed_rows),
)}
