"""Files that would run code if they were unpickled, evaluated, rendered or imported: each makes the folder `canary`.

The one file of the tests that may pickle: the architecture test names it.
"""

from __future__ import annotations

import builtins
import gzip
import io
import json
import marshal
import os
import pickle
import subprocess
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch


class Trap:
    """An object whose unpickling calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def springs(payload: bytes, kind: str) -> None:
    """Open a payload as a careless program would."""
    if kind == "pickle":
        pickle.loads(payload)
    elif kind == "torch":
        torch.load(io.BytesIO(payload), weights_only=False)
    elif kind == "numpy":
        np.load(io.BytesIO(payload), allow_pickle=True)


def traps(canary: Path) -> dict[str, Trap]:
    """Return objects that make the canary in different ways."""
    code = f"import os; os.path.isdir({str(canary)!r}) or os.mkdir({str(canary)!r})"
    return {
        "mkdir": Trap(os.mkdir, str(canary)),
        "system": Trap(os.system, f"mkdir -p '{canary}'"),
        "exec": Trap(builtins.exec, code),
        "eval": Trap(builtins.eval, f"__import__('os').mkdir({str(canary)!r})"),
        "popen": Trap(subprocess.check_call, ["mkdir", "-p", str(canary)]),
    }


def pickled(canary: Path) -> dict[str, bytes]:
    """Return pickles of every protocol, bare and in the formats that carry them."""
    made = {f"pickle-{name}-protocol{protocol}": pickle.dumps({"weight": trap}, protocol)
            for protocol in range(6) for name, trap in traps(canary).items()
            if protocol in (0, 2, 4) or name == "mkdir"}
    made["pickle-by-hand"] = b"cposix\nmkdir\n(S'" + str(canary).encode() + b"'\ntR."
    made["pickle-inst"] = b"(S'" + str(canary).encode() + b"'\niposix\nmkdir\n."
    made["pickle-stack-global"] = (b"\x80\x04\x8c\x05posix\x8c\x05mkdir\x93\x8c" + bytes([len(str(canary))])
                                   + str(canary).encode() + b"\x85R.")
    made["joblib-zlib"] = zlib.compress(made["pickle-mkdir-protocol4"])
    made["pickle-gzip"] = gzip.compress(made["pickle-mkdir-protocol4"])
    made["pickle-after-text"] = b"{}\n" + made["pickle-mkdir-protocol0"]
    return made | torch_files(canary) | numpy_files(canary)


def torch_files(canary: Path) -> dict[str, bytes]:
    """Return files of torch.save: the zip, the legacy format, and traps in unusual places of them."""
    trap = traps(canary)["mkdir"]
    made: dict[str, bytes] = {}

    def save(name: str, value: Any, **options: Any) -> bytes:
        buffer = io.BytesIO()
        torch.save(value, buffer, **options)
        made[f"torch-{name}"] = buffer.getvalue()
        return made[f"torch-{name}"]

    save("zip", {"weight": trap})
    save("legacy", {"weight": trap}, _use_new_zipfile_serialization=False)
    save("zip-protocol4", {"weight": trap}, pickle_protocol=4)
    save("list", [torch.zeros(2), trap])
    save("metadata", OrderedDict(weight=torch.zeros(2), _metadata={"version": trap}))
    inner = torch.frombuffer(bytearray(pickle.dumps(trap)), dtype=torch.uint8)
    save("storage-of-pickle", {"weight": inner, "outer": trap})
    clean = save("clean", {"weight": torch.ones(4)})
    made["torch-pickle-swapped"] = _swap(clean, "data.pkl", pickle.dumps({"weight": trap}, 2))
    made["torch-storage-swapped"] = _swap(clean, "data/0", pickle.dumps(trap, 2), added={"data.pkl2": b""})
    made["torch-script"] = _swap(clean, "byteorder", b"little", added={
        "constants.pkl": pickle.dumps(trap, 2),
        "code/__torch__.py": f"import os\nos.mkdir({str(canary)!r})".encode()})
    del made["torch-clean"]
    return made


def _swap(payload: bytes, ending: str, content: bytes, added: dict[str, bytes] | None = None) -> bytes:
    """Return a zip with one record replaced and others added."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(payload)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            new.writestr(name, content if name.endswith(ending) else old.read(name))
        for name, extra in (added or {}).items():
            new.writestr(f"archive/{name}", extra)
    return buffer.getvalue()


def numpy_files(canary: Path) -> dict[str, bytes]:
    """Return arrays of objects."""
    array = np.array([traps(canary)["mkdir"]], dtype=object)
    one, many = io.BytesIO(), io.BytesIO()
    np.save(one, array, allow_pickle=True)
    np.savez(many, weights=array)
    return {"numpy-object-array": one.getvalue(), "numpy-archive": many.getvalue()}


def written(canary: Path) -> dict[str, bytes]:
    """Return texts and programs that some reader of such files would run, render or resolve."""
    call = f"__import__('os').mkdir('{canary}')"
    inside = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.mkdir('%s') }}" % canary
    code = compile(call, "x", "eval")
    texts = {
        "yaml-apply": f"!!python/object/apply:os.mkdir ['{canary}']",
        "yaml-new": f"!!python/object/new:os.mkdir ['{canary}']",
        "yaml-nested": f"run: &a\n  dir: !!python/object/apply:os.system [\"mkdir -p '{canary}'\"]\n",
        "yaml-name": "weights: !!python/name:os.system\n",
        "jinja": inside,
        "jinja-json": json.dumps({"chat_template": inside, "text": inside}),
        "jinja-toml": f"[run]\ndir = '''{inside}'''\n",
        "python": f"import os\nos.mkdir({str(canary)!r})\n",
        "python-json": json.dumps({"text": call, "format": call, "weight_map": {call: call}}),
        "python-toml": f"[run]\ndir = \"{call}\"\nseed = \"{call}\"\n",
        "shell": f"#!/bin/sh\nmkdir -p '{canary}'\n",
        "shell-toml": f"[run]\ndir = \"$(mkdir -p '{canary}')\"\nstart_from = \"`mkdir -p '{canary}'`\"\n",
        "shell-json": json.dumps({"text": f"$(mkdir -p '{canary}')", "_comment": f"`mkdir -p '{canary}'`"}),
        "hydra": json.dumps({"_target_": "os.mkdir", "_args_": [str(canary)], "path": str(canary)}),
        "hydra-nested": json.dumps({"model": {"_target_": "builtins.eval", "_args_": [call]}, "text": "x"}),
        "hydra-toml": f"[model]\n_target_ = \"os.mkdir\"\n_args_ = [\"{canary}\"]\n",
        "jsonpickle": json.dumps({"py/object": "os.mkdir", "py/reduce": [{"py/function": "os.mkdir"}, [str(canary)]]}),
        "json-class": json.dumps({"__class__": "os.mkdir", "__reduce__": [str(canary)], "__init__": call}),
        "json-prototype": json.dumps({"__proto__": {"a": 1}, "constructor": call, "text": "a"}),
        "json-deep-comment": '{"a": 1 /* */, // ' + call + '\n "b": 2}',
        "json-interpolation": json.dumps({"path": "${oc.env:HOME}", "dir": "${eval:" + call + "}"}),
        "toml-date": f"dir = 1979-05-27T07:32:00Z\n\"{call}\" = 1\n[run]\n\"__class__\" = \"os\"\n",
        "toml-table-clash": f"[run]\ndir = \"a\"\n[run.dir]\n_target_ = \"{call}\"\n",
        "format-string": json.dumps({"text": "{0.__class__.__init__.__globals__}", "format": "%(asctime)s {os}"}),
        "ini-import": f"[settings]\nimport = {call}\n",
        "pth": f"import os; os.mkdir({str(canary)!r})\n",
        "xml-entity": "<?xml version='1.0'?><!DOCTYPE a [<!ENTITY x SYSTEM 'file:///etc/passwd'>]><a>&x;</a>",
        "pdf-js": "%PDF-1.7 /OpenAction << /S /JavaScript /JS (" + call + ") >>",
        "ndjson-auto-map": json.dumps({"auto_map": {"AutoConfig": "modeling_x.X"}, "text": "x",
                                         "trust_remote_code": True}),
        "desktop-entry": f"[Desktop Entry]\nExec=mkdir -p {canary}\n",
    }
    made = {f"text-{name}": text.encode() for name, text in texts.items()}
    made["marshal-code"] = marshal.dumps(code)
    made["pyc"] = b"\xa7\x0d\x0d\x0a" + bytes(12) + marshal.dumps(code)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("__main__.py", texts["python"])
        zipped.writestr("../../escape.py", texts["python"])
    made["zip-application"] = archive.getvalue()
    inner = pickle.dumps(traps(canary)["mkdir"], 0).decode("latin1")
    header = json.dumps({"__metadata__": {"format": "pt", "pickle": inner},
                         "weight": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}}).encode()
    made["safetensors-metadata"] = len(header).to_bytes(8, "little") + header + bytes(8)
    made["elf"] = b"\x7fELF\x02\x01\x01" + bytes(57)
    made["gguf"] = b"GGUF\x03\x00\x00\x00" + b"\xff" * 16 + inside.encode()
    made["hdf5"] = b"\x89HDF\r\n\x1a\n" + pickle.dumps(traps(canary)["mkdir"])
    return made


def beside(folder: Path, canary: Path) -> None:
    """Put files into a folder that Python or a library would run if it took the folder for a place of code."""
    code = f"import os\nos.path.isdir({str(canary)!r}) or os.mkdir({str(canary)!r})\n"
    names = ("sitecustomize", "usercustomize", "conftest", "__init__", "__main__", "modeling_x", "configuration_x",
             "tokenization_x", "json", "torch", "numpy", "transformers", "sentencepiece", "megatron_ttl", "setup")
    for name in names:
        (folder / f"{name}.py").write_text(code)
    (folder / "evil.pth").write_text(f"import os; os.path.isdir({str(canary)!r}) or os.mkdir({str(canary)!r})\n")
    (folder / ".env").write_text("PYTHONSTARTUP=sitecustomize.py\n")
    (folder / "pyproject.toml").write_text("[tool.pytest.ini_options]\naddopts = '-p conftest'\n")
    (folder / "pytorch_model.bin").write_bytes(torch_files(canary)["torch-zip"])
    (folder / "training_args.bin").write_bytes(pickled(canary)["pickle-mkdir-protocol2"])
    (folder / "rng_state.pth").write_bytes(torch_files(canary)["torch-zip"])


def run_shell(command: str) -> int:
    """Do what a payload would: ask the shell."""
    return os.system(command)


def save_torch(value: Any, path: Path, **options: Any) -> Path:
    """Write a file of torch.save."""
    torch.save(value, path, **options)
    return path
