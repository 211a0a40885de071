"""Turn someone else's pickled weights (`pytorch_model.bin`, `*.pt`) into safetensors, where the user insists.

A pickle is a program. It is read by a process of its own, without network and with little room
(`foreign_child.py`); what comes back is a safetensors file, which is looked into like any stranger's file.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from megatron_ttl.checkpoint import foreign_child
from megatron_ttl.checkpoint.bounded_json import read_json_object
from megatron_ttl.checkpoint.hf_weights import SINGLE
from megatron_ttl.checkpoint.tensor_file import TORCH_DTYPES, open_tensors, write_tensors
from megatron_ttl.errors import CheckpointError, ConfigError, DiskError, raise_faults
from megatron_ttl.files import fsync_directory, human_bytes, open_regular, require_free_space

PICKLED = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"
_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.(?:bin|pt|pth)")
_CURE = "get the weights as safetensors, or from someone you trust"


def import_weights(source: str | os.PathLike[str], output: str | os.PathLike[str],
                   pickle_allowed: bool = False) -> dict[str, Any]:
    """Write the tensors of a pickled state dict as `model.safetensors`; it gets its name when it is complete.

    Args:
        source: a file, or a folder with `pytorch_model.bin` or its index and shards.
        output: folder to write into; it is made, and must not have a `model.safetensors`.
        pickle_allowed: the user has said that a pickle may be read.

    Returns:
        What was written, flat.

    Raises:
        ConfigError: it was not allowed, or the output is there already.
        CheckpointError: the file cannot be read as tensors alone; nothing of it was run or kept.
        DiskError: the disk cannot take it.
    """
    source, output = Path(source), Path(output)
    if not pickle_allowed:
        raise ConfigError(f"{source}: is a pickle, and a pickle is a program that opening runs; it must be asked for; "
                          "prefer safetensors, or give --allow-pickle: it is then read by a process that may do "
                          "nothing but read tensors")
    if os.path.lexists(output / SINGLE) or (output.exists() and not output.is_dir()):
        raise ConfigError(f"{output}: has a {SINGLE} or is a file; weights are not overwritten unasked; choose another "
                          "folder")
    shards = _shards(source)
    size = sum(path.stat().st_size for path in shards)
    require_free_space(output, 3 * size, "the imported weights")
    made = not output.exists()
    work = output / f".import-{os.getpid()}"
    try:
        work.mkdir(parents=True)
        left_out = [name for number, path in enumerate(shards)
                    for name in _unpickle(path, work / f"{number}.safetensors", work / f"{number}.json")]
        counts = _join(work, shards)
        os.rename(work / SINGLE, output / SINGLE)
        fsync_directory(output)
    except OSError as error:
        raise DiskError(f"{error.filename or output}: the weights could not be written ({error.strerror or error}); "
                        f"they need {human_bytes(3 * size)}; free some space or choose another folder") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if made:
            with suppress(OSError):
                output.rmdir()  # only if nothing came of it
    return {"output": str(output / SINGLE), **counts, "left_out": ", ".join(left_out) or "nothing"}


def _shards(source: Path) -> dict[Path, set[str] | None]:
    """Return the files to read, each with the names that the index promises of it."""
    if not source.is_dir():
        if not source.is_file():
            what = "is no file" if os.path.lexists(source) else "does not exist"
            raise CheckpointError(f"{source}: {what}; it must be a file of weights or a folder of them; correct "
                                  "the path")
        return {source: None}
    if os.path.lexists(source / PICKLED):
        found: dict[Path, set[str] | None] = {source / PICKLED: None}
    elif os.path.lexists(source / INDEX):
        weight_map = read_json_object(source / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{source / INDEX}: has no weight_map; it must say which file has which weight; "
                                  f"{_CURE}")
        raise_faults(CheckpointError, (
            f"{source / INDEX}: file {str(name)[:80]!r}; it must be a .bin file of this folder; {_CURE}"
            for name in sorted(set(map(str, weight_map.values()))) if not _SHARD.fullmatch(name)))
        found = {source / file: {name for name, place in weight_map.items() if place == file}
                 for file in sorted(set(weight_map.values()))}
    else:
        raise CheckpointError(f"{source}: has neither {PICKLED} nor {INDEX}; it must have one; name the file itself")
    raise_faults(CheckpointError, (
        f"{path}: {'is a symbolic link' if path.is_symlink() else 'is missing or no file'}; it must be a file of this "
        "folder; copy it there" for path in found if path.is_symlink() or not path.is_file()))
    return found


def _unpickle(path: Path, tensors: Path, answer: Path) -> list[str]:
    """Let the child read one file; return what it left out.

    Raises:
        CheckpointError: the child refuses the file, or died over it.
    """
    command = [sys.executable, "-I", "-B", foreign_child.__file__, str(tensors.absolute()), str(answer.absolute())]
    descriptor = open_regular(path)
    with open(descriptor, "rb") as handle:
        most = 2 * foreign_child.cpu_seconds(os.fstat(descriptor).st_size) + 60
        child = subprocess.Popen(command, stdin=handle, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={},
                                 cwd=tensors.parent, start_new_session=True)
        try:
            code = child.wait(most)
            what = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        except subprocess.TimeoutExpired:
            code, what = 1, f"was still at it after {most} s"
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    if code or not answer.exists():
        raise CheckpointError(f"{path}: the process that read it {what}; it must be a pickle of tensors alone; {_CURE}")
    answered = read_json_object(answer)
    faults, left_out = (answered.get(key) for key in ("faults", "left_out"))
    if not isinstance(faults, list) or not isinstance(left_out, list):
        faults, left_out = ["its answer cannot be understood"], []
    raise_faults(CheckpointError, (f"{path}: {_plain(fault)}; it must be a pickle of tensors alone; {_CURE}"
                                   for fault in faults))
    return [f"{path.name}: {_plain(name)}" for name in left_out]


def _plain(text: Any) -> str:
    """Return what the child says without what a terminal would obey."""
    return "".join(character if character.isprintable() else "?" for character in str(text)[:400])


def _join(work: Path, shards: dict[Path, set[str] | None]) -> dict[str, Any]:
    """Write the tensors of all files into one, after a look at each."""
    tensors: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for number, (path, promised) in enumerate(shards.items()):
            try:
                file = stack.enter_context(open_tensors(work / f"{number}.safetensors"))
                names = set(file.keys())
                odd = [name for name in names if file.get_slice(name).get_dtype() not in TORCH_DTYPES]
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path}: what was read of it is no safetensors file ({error}); it must be; "
                                      f"{_CURE}") from None
            differing = (names ^ promised) if promised is not None else set()
            wrong = sorted({*odd, *(names & tensors.keys()), *differing})
            if wrong:
                raise CheckpointError(f"{path}: {_plain(', '.join(wrong[:5]))}: not as the index says, twice, or of an "
                                      f"unknown type; every weight must be there once; {_CURE}")
            tensors |= {name: file.get_tensor(name) for name in names}
        write_tensors(work / SINGLE, tensors, {"format": "pt"})
    return {"files": len(shards), "tensors": len(tensors), "bytes": sum(tensor.nbytes for tensor in tensors.values())}
