"""Foreign pickles: good ones become the same tensors, hostile ones one sentence, and nothing is run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import hostile_files
import pytest
import torch
from forked import in_fork
from tiny_folder import write_model_folder, write_tokenizer

from megatron_ttl.checkpoint import foreign, foreign_child
from megatron_ttl.checkpoint.foreign import import_weights
from megatron_ttl.errors import CheckpointError, ConfigError
from megatron_ttl.generate.open_folder import open_model_folder


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of transformers, with safetensors."""
    folder = tmp_path_factory.mktemp("theirs")
    return write_model_folder(folder / "model", write_tokenizer(folder / "tokenizer"))


def llama(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)


def converted(folder: Path, theirs: Path) -> Path:
    for path in theirs.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, folder)
    return folder


def write_sharded(folder: Path, state: dict[str, Any]) -> Path:
    folder.mkdir()
    weight_map = {name: f"pytorch_model-{1 + number % 2:05d}-of-00002.bin" for number, name in enumerate(state)}
    for file in set(weight_map.values()):
        hostile_files.save_torch({name: state[name] for name in state if weight_map[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", [
    "file", pytest.param("shards", marks=pytest.mark.long), pytest.param("legacy", marks=pytest.mark.long)])
def test_good_weights_are_the_same_to_the_bit(tmp_path, theirs, kind):
    """transformers saved them, transformers loads the result: all tensors equal; so does our reader."""
    model = llama(theirs)
    state = model.state_dict()
    if kind == "shards":
        source = write_sharded(tmp_path / "in", state)
    else:
        source = hostile_files.save_torch(state, tmp_path / "in.bin", _use_new_zipfile_serialization=kind == "file")
    result = import_weights(source, tmp_path / "out", pickle_allowed=True)
    assert result["tensors"] == len(state) and result["left_out"] == "nothing"
    assert os.listdir(tmp_path / "out") == ["model.safetensors"]
    again = llama(converted(tmp_path / "out", theirs)).state_dict()
    assert list(again) == list(state) and all(torch.equal(again[name], state[name]) for name in state)
    ours = [open_model_folder(folder, "cpu").model.state_dict() for folder in (theirs, tmp_path / "out")]
    assert all(torch.equal(ours[0][name], ours[1][name]) for name in ours[0])


def hostile(canary: Path) -> dict[str, bytes]:
    """Twenty-odd files that are no plain state dicts."""
    made = {name: payload for name, payload in hostile_files.pickled(canary).items()
            if name.startswith("torch-") or "protocol2" in name or name in ("pickle-by-hand", "numpy-object-array")}
    made.pop("torch-storage-swapped")  # a good file with bad numbers
    values = {
        "expanded": {"a": torch.zeros(1).expand(1 << 33)}, "list": [torch.zeros(1)], "text": {"a": "b"},
        "numbered": {1: torch.zeros(1)}, "sparse": {"a": torch.eye(3).to_sparse()},
        "meta": {"a": torch.zeros(3, device="meta")},
        "complex": {"a": torch.zeros(3, dtype=torch.complex64)}, "control": {"a\x1b[2J": torch.zeros(1)}, "empty": {},
        "long name": {"a" * 600: torch.zeros(1)}, "function": {"a": os.getcwd}, "module": torch.nn.Linear(2, 2),
    }
    for name, value in values.items():
        path = hostile_files.save_torch(value, canary.with_name("made.bin"))
        made[f"value-{name}"] = path.read_bytes()
        path.unlink()
    good = made["value-numbered"]
    return made | {"cut": good[: len(good) // 2], "zeros": bytes(10_000), "nothing": b"",
                   "script": b"#!/bin/sh\nmkdir -p " + str(canary).encode()}


def test_hostile_weights_are_refused(tmp_path):
    """Each is read by the child's code in a fork of this process, as the process of its own would; none is run."""
    canary = tmp_path / "CANARY"
    found = hostile(canary)
    assert len(found) >= 20
    for name, payload in found.items():
        (tmp_path / "in.bin").write_bytes(payload)

        def read() -> None:
            descriptor = os.open(tmp_path / "in.bin", os.O_RDONLY)
            os.dup2(descriptor, 0)
            foreign_child.main(str(tmp_path / "out.safetensors"), str(tmp_path / "answer.json"))

        outcome = in_fork(read)
        assert outcome.kind == "returned" and not canary.exists(), (name, outcome)
        answer = json.loads((tmp_path / "answer.json").read_text())
        assert answer["faults"], name
        assert "weights_only" not in str(answer) and not (tmp_path / "out.safetensors").exists(), name
        (tmp_path / "answer.json").unlink()


@pytest.mark.slow
@pytest.mark.parametrize("name", [
    "torch-zip",
    *[pytest.param(name, marks=pytest.mark.long) for name in (
        "zeros", "torch-legacy", "torch-script", "torch-metadata", "torch-list", "torch-pickle-swapped",
        "torch-zip-protocol4",
        "pickle-mkdir-protocol2", "pickle-system-protocol2", "pickle-exec-protocol2", "pickle-eval-protocol2",
        "pickle-popen-protocol2", "pickle-by-hand", "numpy-object-array", "value-expanded", "value-module",
        "value-meta",
        "value-text", "value-sparse", "cut", "nothing")]])
def test_the_command_refuses_hostile_weights(tmp_path, repository, name):
    """Exit code 2, one fault, nothing left, nothing run."""
    canary = tmp_path / "CANARY"
    (tmp_path / "in.bin").write_bytes(hostile(canary)[name])
    command = [sys.executable, str(repository / "tools" / "import_weights.py"), "--input", str(tmp_path / "in.bin"),
               "--output", str(tmp_path / "out"), "--allow-pickle"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200,
                          env={**os.environ, "PYTHONPATH": str(repository)})
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr and "weights_only" not in done.stderr
    assert os.listdir(tmp_path) == ["in.bin"]


def test_a_pickle_must_be_asked_for(tmp_path):
    """Without --allow-pickle nothing is opened."""
    with pytest.raises(ConfigError, match="is a pickle, and a pickle is a program that opening runs; it must be asked"):
        import_weights(tmp_path / "absent.bin", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def replace_shard(name: Any):
    def change(folder: Path) -> None:
        index = json.loads((folder / "pytorch_model.bin.index.json").read_text())
        index["weight_map"]["a"] = name
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return change


def link_shard(folder: Path) -> None:
    shard = folder / "pytorch_model-00001-of-00002.bin"
    shutil.move(shard, folder.parent / "elsewhere.bin")
    shard.symlink_to(folder.parent / "elsewhere.bin")


def pipe_shard(folder: Path) -> None:
    (folder / "pytorch_model-00001-of-00002.bin").unlink()
    os.mkfifo(folder / "pytorch_model-00001-of-00002.bin")


@pytest.mark.parametrize(("change", "message"), [
    (replace_shard("../elsewhere.bin"), r"file '../elsewhere.bin'; it must be a .bin file of this folder"),
    (replace_shard("/etc/passwd"), "file '/etc/passwd'"), (replace_shard("a\x00.bin"), "file 'a"),
    (replace_shard("..\\a.bin"), "it must be a .bin file"),
    (replace_shard("a" * 300 + ".bin"), "it must be a .bin file"),
    (replace_shard(7), "file '7'"), (replace_shard("sub/a.bin"), "file 'sub/a.bin'"),
    (replace_shard("․․／a.bin"), "it must be a .bin file"),
    (link_shard, "00001-of-00002.bin: is a symbolic link"), (pipe_shard, "00001-of-00002.bin: is missing or no file"),
    (replace_shard("absent.bin"), "absent.bin: is missing or no file"),
    (lambda folder: (folder / "pytorch_model.bin.index.json").write_text("{}"), "has no weight_map"),
    (lambda folder: (folder / "pytorch_model.bin.index.json").unlink(), "has neither pytorch_model.bin nor"),
    (lambda folder: (folder / "pytorch_model.bin").symlink_to("/etc/passwd"), "pytorch_model.bin: is a symbolic link"),
])
def test_an_index_leads_nowhere_else(tmp_path, change, message):
    """Files of the folder itself, and no others; nothing is begun."""
    source = write_sharded(tmp_path / "in", {"a": torch.zeros(2), "b": torch.ones(2)})
    change(source)
    with pytest.raises(CheckpointError, match=message):
        import_weights(source, tmp_path / "out", pickle_allowed=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_child_that_dies_is_one_fault(tmp_path, monkeypatch):
    """Killed, or ending without an answer: named, and nothing is left."""
    path = hostile_files.save_torch({"a": torch.zeros(2)}, tmp_path / "in.bin")
    for text, what in (("import os; os.kill(os.getpid(), 11)", "died of SIGSEGV"),
                       ("raise SystemExit(3)", "ended with code 3"), ("pass", "ended with code 0")):
        (tmp_path / "child.py").write_text(text)
        monkeypatch.setattr(foreign_child, "__file__", str(tmp_path / "child.py"))
        with pytest.raises(CheckpointError, match=f"in.bin: the process that read it {what}"):
            import_weights(path, tmp_path / "out", pickle_allowed=True)
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_child_that_lies_is_found_out(tmp_path, monkeypatch):
    """Whatever it leaves as tensors is looked into: no file, a link, another format."""
    path = hostile_files.save_torch({"a": torch.zeros(2)}, tmp_path / "in.bin")
    answer = "import json, os, sys\njson.dump({'faults': [], 'left_out': []}, open(sys.argv[2], 'w'))\n"
    for text in ("", "os.mkfifo(sys.argv[1])\n", "open(sys.argv[1], 'wb').write(b'\\xff' * 100)\n",
                 "os.symlink('/dev/zero', sys.argv[1])\n"):
        (tmp_path / "child.py").write_text(answer + text)
        monkeypatch.setattr(foreign_child, "__file__", str(tmp_path / "child.py"))
        with pytest.raises(CheckpointError, match="in.bin: what was read of it is no safetensors file"):
            import_weights(path, tmp_path / "out", pickle_allowed=True)
        assert not (tmp_path / "out").exists()


def test_weights_are_not_overwritten(tmp_path):
    """A folder that has some is left alone."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_text("")
    with pytest.raises(ConfigError, match="weights are not overwritten unasked"):
        import_weights(tmp_path / "in.bin", tmp_path / "out", pickle_allowed=True)
    assert foreign.SINGLE in os.listdir(tmp_path / "out")


DOORS = {
    "os.system": lambda folder: hostile_files.run_shell("true"),
    "subprocess": lambda folder: subprocess.run(["true"], check=True),
    "fork": lambda folder: os.fork() or os._exit(0),
    "write": lambda folder: (folder / "x").write_text("x"),
    "append": lambda folder: open(folder / "in.bin", "ab"),
    "remove": lambda folder: os.remove(folder / "in.bin"),
    "rename": lambda folder: os.rename(folder / "in.bin", folder / "y"),
    "link": lambda folder: os.symlink("/etc/passwd", folder / "y"),
    "socket": lambda folder: __import__("socket").create_connection(("127.0.0.1", 9)),
    "memory": lambda folder: bytearray(3 << 30),
    "spawn": lambda folder: __import__("multiprocessing").get_context("spawn").Process(target=print).start(),
}


@pytest.mark.parametrize("door", DOORS)
def test_the_doors_of_the_child_are_closed(tmp_path, door):
    """What a broken unpickler could try: processes, network, other files, memory."""
    (tmp_path / "in.bin").write_text("x")

    def attempt() -> None:
        try:
            DOORS[door](tmp_path)
        except (PermissionError, MemoryError) as error:
            raise ConfigError(f"closed: {error}") from None

    def closed() -> None:
        foreign_child.close_doors(1, ())
        attempt()

    outcome = in_fork(closed)
    assert outcome.kind == "refused" and "closed" in outcome.text, outcome
    assert sorted(os.listdir(tmp_path)) == ["in.bin"]


def test_the_child_knows_no_network(tmp_path):
    """Where the system permits it, not even the machine itself can be reached."""
    def look() -> None:
        left = foreign_child.leave_the_network()
        names = Path("/proc/self/net/dev").read_text().count(":")
        raise ConfigError(f"left={left} interfaces={names}")

    text = in_fork(look).text
    assert "left=False" in text or "interfaces=1" in text, text  # the loopback, which is down


def test_help_is_quick(repository):
    """Without torch."""
    tool = repository / "tools" / "import_weights.py"
    heavy = subprocess.run([sys.executable, "-X", "importtime", str(tool), "--help"], capture_output=True, text=True,
                           timeout=60)
    assert heavy.returncode == 0 and "--allow-pickle" in heavy.stdout and "torch" not in heavy.stderr
