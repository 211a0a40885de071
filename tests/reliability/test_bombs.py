"""Small files that would become large: refused within two seconds of work and a quarter of a gigabyte."""

from __future__ import annotations

import gzip
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import in_fork
from patience import processor
from strangers import MANIFEST, Place, begin, export, look_at_data, open_model, read_documents, resume, tokenise

from megatron_ttl.checkpoint.manifest import Manifest
from megatron_ttl.checkpoint.store import CheckpointStore
from megatron_ttl.data.index_file import HEADER, MAGIC
from megatron_ttl.tokenizer.tokenizer import Tokenizer

CPU_S, BYTES = 2.0, 256 << 20
DEEP = 100_000
GIB = 1 << 30


def open_checkpoint(place: Place) -> None:
    """Open the checkpoint, every byte of it."""
    CheckpointStore(place.run / "checkpoints").open(4)


def manifest(place: Place, change: Callable[[dict], None]) -> None:
    """Forge a manifest; where ours could not even be made of it, its plain bytes."""
    path = place.checkpoint / MANIFEST
    content = json.loads(path.read_text())
    content.pop("checksum")
    change(content)
    path.write_bytes(Manifest.model_validate(content).encode())


def sparse(path: Path, size: int, head: bytes = b"") -> None:
    """Write a file of zeros that takes no room."""
    with open(path, "wb") as handle:
        handle.write(head)
        handle.truncate(size)


def safetensors(path: Path, header: bytes, length: int | None = None, size: int = 0) -> None:
    sparse(path, max(size, 8 + len(header)), struct.pack("<Q", len(header) if length is None else length) + header)


def many_tensors(count: int) -> bytes:
    entry = '"t%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    return ("{" + ",".join(entry % number for number in range(count)) + "}").encode()


def gzip_bomb(path: Path, block: bytes, count: int) -> None:
    with gzip.open(path, "wb", compresslevel=9) as handle:
        handle.write(b'{"text": "')
        for _ in range(count):
            handle.write(block)


def index(path: Path, count: int, boundaries: int, size: int | None = None) -> None:
    sparse(path, size or HEADER.size, HEADER.pack(MAGIC, 1, 8, count, boundaries))


def sparse_pieces(place: Place) -> None:
    """A consistent manifest of a tensor file whose room is in no tensor."""
    path = place.checkpoint / "weights.safetensors"
    os.truncate(path, 1 << 40)
    manifest(place, lambda content: content["files"]["weights.safetensors"].update(bytes=1 << 40))


def grid(place: Place) -> None:
    """A tensor in 40,000 pieces, as many as a manifest holds, none overlapping."""
    def cut(content: dict) -> None:
        content["version"] = 2
        pieces = [{"file": f"weights-{row * 200 + column:05d}.safetensors", "offset": [row, column], "shape": [1, 1]}
                  for row in range(200) for column in range(200)]
        content["groups"] = {"weights": {"a": {"dtype": "F32", "shape": [200, 200], "pieces": pieces}}}
        entry = content["files"].pop("weights.safetensors")
        content["files"] = {"record.json": content["files"]["record.json"], pieces[0]["file"]: entry}
    manifest(place, cut)


MODEL, WEIGHTS = "model/model.safetensors", "run/checkpoints/step-00000004/weights.safetensors"
RECORD, SETTINGS = "run/checkpoints/step-00000004/record.json", "run/settings.json"
BOMBS: dict[str, tuple[Callable[[Place], object], Callable[[Place], object]]] = {
    "header of 2^63": (lambda p: safetensors(p.folder / MODEL, b"{}", 1 << 63), open_model),
    "header of 2^64 - 1": (lambda p: safetensors(p.folder / MODEL, b"{}", (1 << 64) - 1), open_model),
    "header of 100 MB": (lambda p: safetensors(p.folder / MODEL, b"{}" + b" " * 99_999_998), open_model),
    "header of 99 MB of zeros": (lambda p: safetensors(p.folder / MODEL, b"", 99_000_000, 200_000_000), open_model),
    "a million tensors": (lambda p: safetensors(p.folder / MODEL, many_tensors(1_000_000)), open_model),
    "as many tensors as a header holds": (lambda p: safetensors(p.folder / MODEL, many_tensors(72_000)), open_model),
    "deep header": (lambda p: safetensors(p.folder / MODEL, b'{"a":' * DEEP), open_model),
    "sparse model": (lambda p: sparse(p.folder / MODEL, 1 << 40), open_model),
    "shape of 2^64": (lambda p: safetensors(p.folder / MODEL, json.dumps({"lm_head.weight": {
        "dtype": "F32", "shape": [1 << 32, 1 << 32], "data_offsets": [0, 8]}}).encode(), size=200), open_model),
    "sparse checkpoint": (lambda p: os.truncate(p.folder / WEIGHTS, 1 << 40), open_checkpoint),
    "sparse checkpoint, and the manifest says so": (sparse_pieces, open_checkpoint),
    "40,000 pieces": (grid, open_checkpoint),
    "shape of a million dimensions": (lambda p: (p.checkpoint / MANIFEST).write_bytes(
        (p.checkpoint / MANIFEST).read_bytes().replace(b'"shape":[', b'"shape":[' + b"9" * 19 + b",9" * 1_500_000, 1)),
        open_checkpoint),
    "manifest of 1 GB": (lambda p: sparse(p.checkpoint / MANIFEST, GIB), open_checkpoint),
    "deep manifest": (lambda p: (p.checkpoint / MANIFEST).write_text('{"a":' * DEEP), open_checkpoint),
    "wide manifest": (lambda p: (p.checkpoint / MANIFEST).write_text("[" + "{}," * 1_390_000 + "{}]"), open_checkpoint),
    "record of 1 GB": (lambda p: sparse(p.folder / RECORD, GIB), open_checkpoint),
    "settings of 1 GB": (lambda p: sparse(p.folder / SETTINGS, GIB), resume),
    "deep settings": (lambda p: (p.folder / SETTINGS).write_text('{"run":' * DEEP), resume),
    "settings as deep as Python reads": (lambda p: (p.folder / SETTINGS).write_text('{"run":' * 900 + "1" + "}" * 900),
                                         resume),
    "number of a million digits": (lambda p: (p.folder / SETTINGS).write_text('{"run":' + "9" * 1_000_000 + "}"),
                                   resume),
    "config of 1 GB": (lambda p: sparse(p.model / "config.json", GIB), open_model),
    "deep config": (lambda p: (p.model / "config.json").write_text("[" * DEEP), open_model),
    "config of 2^31 positions and layers": (lambda p: (p.model / "config.json").write_text(json.dumps({
        **json.loads((p.model / "config.json").read_text()), "max_position_embeddings": 2**31 - 1,
        "num_hidden_layers": 2**31 - 1})), open_model),
    "tokenizer_config.json of 1 GB": (lambda p: sparse(p.model / "tokenizer_config.json", GIB), open_model),
    "tokenizer.model of 1 GB": (lambda p: sparse(p.model / "tokenizer.model", GIB), open_model),
    "tokenizer.model as large as read": (lambda p: sparse(p.data / "tokenizer" / "tokenizer.model", 16 << 20),
                                         lambda p: Tokenizer.load(p.data / "tokenizer")),
    "tokenizer.model of a million pieces": (lambda p: (p.data / "tokenizer" / "tokenizer.model").write_bytes(
        b"\x0a\x08\x0a\x01a\x15\x00\x00\x00\x00" * 1_000_000), lambda p: Tokenizer.load(p.data / "tokenizer")),
    "tokenizer settings of 1 GB in an export": (lambda p: sparse(p.run / "tokenizer/tokenizer_config.json", GIB),
                                                export),
    "training.json of 1 GB": (lambda p: sparse(p.data / "train.tokenizer/training.json", GIB), begin),
    "weight map of 1 GB": (lambda p: ((p.folder / MODEL).unlink(),
                                      sparse(p.model / "model.safetensors.index.json", GIB)), open_model),
    "deep weight map": (lambda p: ((p.folder / MODEL).unlink(), (p.model / "model.safetensors.index.json").write_text(
        '{"weight_map":' * DEEP)), open_model),
    "index counts 2^62": (lambda p: index(p.data / "train.idx", 1 << 62, 1 << 62), look_at_data),
    "index counts 2^64 - 1": (lambda p: index(p.data / "train.idx", (1 << 64) - 1, 1), look_at_data),
    "sparse index of a terabyte": (lambda p: index(p.data / "train.idx", 1 << 36, 1, 34 + 12 * (1 << 36) + 8),
                                   look_at_data),
    "sparse index of documents without end": (lambda p: index(p.data / "train.idx", 0, 1 << 37, 34 + 8 * (1 << 37)),
                                              look_at_data),
    "sparse ids": (lambda p: os.truncate(p.data / "train.bin", 1 << 42), look_at_data),
    "data manifest of 1 GB": (lambda p: sparse(p.data / "train.json", GIB), look_at_data),
    "deep data manifest": (lambda p: (p.data / "train.json").write_text('{"a":' * DEEP), look_at_data),
    "run file of 1 GB": (lambda p: sparse(p.run_file, GIB), lambda p: p.settings()),
    "deep run file": (lambda p: p.run_file.write_text("a = " + "[" * DEEP), lambda p: p.settings()),
    "run file of dotted keys": (lambda p: p.run_file.write_text("a." * 60_000 + "a = 1\n"), lambda p: p.settings()),
    "many dotted keys": (lambda p: p.run_file.write_text(
        "".join(f"{'a.' * 390}b{number} = 1\n" for number in range(150))), lambda p: p.settings()),
    "run file of tables": (lambda p: p.run_file.write_text("[[a]]\n" * 20_000), lambda p: p.settings()),
    "run file of dotted tables": (lambda p: p.run_file.write_text(
        "".join(f"[{'a.' * 100}b{number}]\n" for number in range(600))), lambda p: p.settings()),
    "DeepSpeed JSON of 1 GB": (lambda p: sparse(p.machine, GIB), lambda p: p.settings()),
    "deep DeepSpeed JSON": (lambda p: p.machine.write_text('{"a":' * 20_000), lambda p: p.settings()),
    "DeepSpeed JSON of comments": (lambda p: p.machine.write_text("{\n" + "//\n" * 40_000 + "}"),
                                   lambda p: p.settings()),
    "DeepSpeed JSON of unknown keys": (lambda p: p.machine.write_text(
        json.dumps({f"k{number}": 1 for number in range(9_000)})), lambda p: p.settings()),
    "run file of unknown keys": (lambda p: p.run_file.write_text(
        "".join(f"k{number} = 1\n" for number in range(9_000))), lambda p: p.settings()),
    "gzip bomb of one line": (lambda p: gzip_bomb(p.folder / "new.jsonl.gz", b"a" * (1 << 20), 100),
                              lambda p: tokenise(p, "new.jsonl.gz")),
    "gzip bomb of one line of zeros": (lambda p: gzip_bomb(p.folder / "new.jsonl", bytes(1 << 20), 100),
                                       read_documents),
    "gzip bomb of bad lines": (lambda p: gzip_bomb(p.folder / "new.jsonl.gz", b"x\n" * (1 << 19), 100),
                               lambda p: tokenise(p, "new.jsonl.gz", 0.001)),
    "zst": (lambda p: (p.folder / "new.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(100)),
            lambda p: tokenise(p, "new.jsonl.zst")),
    "zst under another name": (
        lambda p: (p.folder / "new.jsonl").write_bytes(b"\x28\xb5\x2f\xfd\xff" + os.urandom(100)), tokenise),
    "documents of a sparse terabyte": (lambda p: sparse(p.folder / "new.jsonl", 1 << 40), read_documents),
    "deep documents": (lambda p: (p.folder / "new.jsonl").write_text('{"text":' * DEEP), lambda p: tokenise(p)),
}
LARGE = {"a million tensors", "header of 100 MB", "gzip bomb of one line of zeros", "manifest of 1 GB", "sparse model",
         "header of 99 MB of zeros", "record of 1 GB", "deep header", "config of 1 GB", "deep weight map", "zst",
         "data manifest of 1 GB", "deep settings", "deep run file", "training.json of 1 GB"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.long if name in LARGE else ())
                                  for name in BOMBS])
def test_a_bomb_does_not_go_off(place: Place, name):
    """Refused, quickly, in little memory; the work is measured in processor time, for the machine may be busy."""
    plant, call = BOMBS[name]
    plant(place)
    outcome = in_fork(lambda: call(place), timeout_s=60)
    assert outcome.kind == "refused", outcome
    assert outcome.cpu_s <= processor(CPU_S) and outcome.extra_bytes <= BYTES, outcome
