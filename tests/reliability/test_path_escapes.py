"""No name and no link leads out of a folder, and what is no file keeps nobody waiting."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import in_fork
from strangers import MANIFEST, Place, begin, export, look_at_data, open_model, resume, tokenise

from megatron_ttl.checkpoint.manifest import Manifest
from megatron_ttl.checkpoint.store import CheckpointStore
from megatron_ttl.errors import ConfigError
from megatron_ttl.files import atomic_directory, write_json
from megatron_ttl.tokenizer.tokenizer import Tokenizer
from megatron_ttl.train.open_data import open_data

SECRET = "the secret of another folder"

NAMES = {
    "parent": "../outside.safetensors", "absolute": "/etc/passwd", "nul": "weights\x00.safetensors",
    "very long": "w" * 300 + ".safetensors", "backslash": "..\\outside.safetensors", "case": "Weights.safetensors",
    "dot": ".", "dots": "..", "lookalike slash": "..／outside.safetensors", "lookalike dots": "․․/outside.safetensors",
    "fullwidth": "ｗeights.safetensors", "newline": "weights.safetensors\n", "empty": "",
    "percent": "%2e%2e%2foutside.safetensors",
    "home": "~/outside.safetensors", "inside and out": "a/../../outside.safetensors",
}


def rename_in_checkpoint(place: Place, name: str) -> Callable[[], object]:
    path = place.checkpoint / MANIFEST
    content = json.loads(path.read_text())
    content.pop("checksum")
    content["files"][name] = content["files"].pop("weights.safetensors")
    path.write_bytes(Manifest.model_validate(content).encode())
    return lambda: CheckpointStore(place.run / "checkpoints").open(4)


def rename_in_index(place: Place, name: str) -> Callable[[], object]:
    (place.model / "model.safetensors").rename(place.folder / "outside.safetensors")
    shutil.copy(place.folder / "outside.safetensors", place.model / "weights.safetensors")
    (place.model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    return lambda: open_model(place)


def rename_tokenizer(place: Place, name: str) -> Callable[[], object]:
    path = place.data / "train.json"
    content = json.loads(path.read_text())
    content["tokenizer"]["directory"] = name
    path.write_text(json.dumps(content))
    shutil.copytree(place.data / "tokenizer", place.folder / "outside.safetensors")
    return lambda: begin(place)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rename", [rename_in_checkpoint, rename_in_index, rename_tokenizer])
def test_names_in_files_stay_in_their_folder(place: Place, rename, name):
    """A manifest, an index and a data set name neighbours and nothing else."""
    outcome = in_fork(rename(place, NAMES[name]))
    assert outcome.kind == "refused", outcome
    assert not (place.folder / "fresh").exists() or not any((place.folder / "fresh").rglob("tokenizer.model"))


@pytest.mark.parametrize("group", ["../x", "/etc/x", "a/b", "A", "a" * 80, "", "a\x00", "ａ"])
def test_groups_of_a_checkpoint_are_plain_names(place: Place, group):
    """Groups become file names."""
    path = place.checkpoint / MANIFEST
    content = json.loads(path.read_text())
    content.pop("checksum")
    content["groups"][group] = content["groups"].pop("weights")
    content["files"][f"{group}.safetensors"] = content["files"].pop("weights.safetensors")
    path.write_bytes(Manifest.model_validate(content).encode())
    outcome = in_fork(lambda: CheckpointStore(place.run / "checkpoints").open(4))
    assert outcome.kind == "refused" and "its name must be lower-case letters" in outcome.text, outcome


READ = {  # file -> what reads it
    "run/checkpoints/step-00000004/manifest.json": lambda p: CheckpointStore(p.run / "checkpoints").open(4),
    "run/checkpoints/step-00000004/record.json": lambda p: CheckpointStore(p.run / "checkpoints").open(4),
    "run/checkpoints/step-00000004/weights.safetensors": lambda p: CheckpointStore(p.run / "checkpoints").open(4),
    "run/settings.json": resume, "run/metrics.jsonl": resume, "run/run.lock": resume,
    "run/tokenizer/tokenizer_config.json": export, "run/tokenizer/tokenizer.model": export,
    "data/train.json": look_at_data, "data/train.idx": look_at_data, "data/train.bin": look_at_data,
    "data/train.tokenizer/training.json": begin, "data/held.json": begin,
    "data/tokenizer/tokenizer.model": lambda place: Tokenizer.load(place.data / "tokenizer"),
    "model/config.json": open_model, "model/model.safetensors": open_model, "model/tokenizer.model": open_model,
    "model/tokenizer_config.json": open_model,
    "run.toml": lambda place: place.settings(), "machine.json": lambda place: place.settings(),
    "new.jsonl": tokenise,
}


@pytest.mark.parametrize("kind", ["fifo", "device", *(pytest.param(kind, marks=pytest.mark.long)
                                                      for kind in ("folder", "endless link", "socket"))])
@pytest.mark.parametrize("file", READ)
def test_what_is_no_file_is_refused_and_nobody_waits(place: Place, file, kind):
    """Pipes, devices without end, folders, links in a circle in the place of every file."""
    path = place.folder / file
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "endless link":
        path.symlink_to(path.name)
    else:
        import socket

        here = os.getcwd()
        os.chdir(path.parent)  # a socket's path is short
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
        os.chdir(here)
    outcome = in_fork(lambda: READ[file](place), timeout_s=20)
    assert outcome.kind == "refused", outcome
    assert outcome.extra_bytes < 256 << 20


@pytest.fixture
def outside(place: Place) -> Path:
    """A file of somebody else."""
    path = place.folder / "outside.txt"
    path.write_text(SECRET)
    return path


WRITTEN = {  # file of a stranger's folder that we write to -> what writes
    "run/run.lock": resume, "run/metrics.jsonl": resume,
    "run/.settings.json.tmp-{pid}": lambda place: write_json(place.run / "settings.json", {}),
    "tokenised.rejected.jsonl": tokenise, ".tokenised.rejected.jsonl.partial": tokenise,
    ".tokenised.bin.partial": tokenise, ".tokenised.idx.partial": tokenise, ".tokenised.json.partial": tokenise,
    "tokenised.bin": tokenise, "tokenised.json": tokenise,
}


@pytest.mark.parametrize("link", ["symbolic", "hard"])
@pytest.mark.parametrize("file", WRITTEN)
def test_nothing_is_written_through_a_link(place: Place, outside, file, link):
    """A link where we write: refused, or replaced; the file that it leads to keeps its bytes."""
    (place.folder / "new.jsonl").write_text('{"text": "uma casa"}\nno json\n')

    def write() -> None:
        path = place.folder / file.format(pid=os.getpid())
        path.unlink(missing_ok=True)
        (path.symlink_to if link == "symbolic" else path.hardlink_to)(outside)
        WRITTEN[file](place)

    assert in_fork(write).kind in ("refused", "returned")
    assert outside.read_text() == SECRET


@pytest.mark.parametrize("link", ["symbolic", "hard"])
@pytest.mark.parametrize(("file", "call"), [
    ("run/tokenizer/tokenizer_config.json", export), ("run/tokenizer/special_tokens_map.json", export),
    ("run/tokenizer/tokenizer.model", export), ("data/train.tokenizer/training.json", begin),
    ("data/train.tokenizer/tokenizer_config.json", begin), ("data/tokenizer/training.json", tokenise),
])
def test_no_private_file_is_copied(place: Place, outside, file, call, link):
    """A link in a stranger's tokenizer folder to a private file, JSON too: it never comes into what travels."""
    (place.folder / "new.jsonl").write_text('{"text": "uma casa"}\n')
    for text in (SECRET, json.dumps({"private_key": SECRET})):
        outside.write_text(text)
        (place.folder / file).unlink(missing_ok=True)
        (getattr(place.folder / file, "symlink_to" if link == "symbolic" else "hardlink_to"))(outside)
        assert in_fork(lambda: call(place)).kind == "refused"
        for made in ("export", "fresh", "tokenised.tokenizer"):
            assert not any(SECRET in path.read_text(errors="replace")
                           for path in (place.folder / made).rglob("*") if path.is_file())


def test_other_files_of_a_tokenizer_folder_stay_where_they_are(place: Place, outside):
    """What is no part of a tokenizer is not carried along."""
    (place.data / "train.tokenizer" / "keys.json").symlink_to(outside)
    begin(place)
    assert sorted(os.listdir(place.folder / "fresh" / "tokenizer")) == [
        "special_tokens_map.json", "tokenizer.model", "tokenizer_config.json", "training.json"]


@pytest.mark.parametrize("value", ["a\\u0000b", "a\\u001b[2J", "x" * 300, "x/" * 3000 + "y", " ", "a\\u202eb"])
@pytest.mark.parametrize("key", ["run.dir", "run.start_from", "data.sources", "evaluation.prefixes"])
def test_paths_in_settings_are_paths(original: Place, key, value):
    """NUL, control characters, names that no file system takes."""
    text = {"data.sources": f'[{{prefix = "{value}"}}]', "evaluation.prefixes": f'["{value}"]'}.get(key, f'"{value}"')
    with pytest.raises(ConfigError, match=r"must be a path of printable characters|must have at most 3,800, and 200"):
        original.settings(f"{key}={text}")


@pytest.mark.parametrize("prefix", ["../../etc/passwd", "/dev/zero", "/proc/self/mem",
                                    "held\\\\..\\\\x", "HELD", "ｈeld"])
def test_data_that_is_none_is_refused(place: Place, prefix):
    """Prefixes that lead elsewhere, to devices, or look like one that is there."""
    settings = place.settings(f'evaluation.prefixes=["{place.data}/{prefix}"]')
    assert in_fork(lambda: open_data(settings.run)).kind == "refused"


def test_a_linked_folder_is_replaced_and_not_filled(tmp_path):
    """An output that is a link: what it leads to stays as it is."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text(SECRET)
    (tmp_path / "out").symlink_to(tmp_path / "theirs")
    with atomic_directory(tmp_path / "out") as folder:
        (folder / "config.json").write_text("new")
    assert (tmp_path / "theirs" / "config.json").read_text() == SECRET
    assert sorted(os.listdir(tmp_path)) == ["out", "theirs"]


@pytest.mark.slow
@pytest.mark.parametrize("tool", [
    "show_config.py --deepspeed_config {long} --config {long}",
    pytest.param("generate.py --model {long}", marks=pytest.mark.long),
    pytest.param("convert_to_hf.py --run {long} --output x", marks=pytest.mark.long),
    pytest.param("inspect_data.py --prefix {long}", marks=pytest.mark.long),
    pytest.param("import_weights.py --allow-pickle --input {long} --output x", marks=pytest.mark.long),
    pytest.param("preprocess_data.py --input {long} --tokenizer {long} --output-prefix {long}", marks=pytest.mark.long),
    pytest.param("train_tokenizer.py --input {long} --output {long}", marks=pytest.mark.long),
])
def test_names_that_no_file_system_takes(repository, tmp_path, tool):
    """A sentence and code 2."""
    name, *arguments = tool.format(long="x" * 5000).split()
    done = subprocess.run([sys.executable, str(repository / "tools" / name), *arguments], cwd=tmp_path, text=True,
                          capture_output=True, timeout=120, env={**os.environ, "PYTHONPATH": str(repository)})
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-2000:]
