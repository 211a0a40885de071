"""The one place that unpickles: a process of its own, run by `foreign.py`, which trusts nothing of what it leaves.

Run as a script and isolated (`python -I`), so it imports nothing of the package but the jail. Standard input is the
foreign file; the arguments are the file of tensors to write and the file of the answer, JSON:
`{"faults": [...], "left_out": [...]}`.

torch's restricted unpickler takes tensors and plain values only. It was broken before (CVE-2025-32434, CVE-2026-24747),
so what a break could use is closed first: network, processes, other files, memory without end.
"""

from __future__ import annotations

import json
import os
import re
import resource
import sys
from typing import Any

if not __package__:  # isolated: the package lies on no path
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
from megatron_ttl.jail import die_with_parent, leave_the_network, set_limits

if not __package__:
    del sys.path[0]
_MIB = 1 << 20
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_FORBIDDEN = (
    "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "subprocess.Popen", "socket.", "os.remove",
    "os.rename", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.chown", "os.mkdir", "os.truncate",
    "os.putenv", "os.kill",
    "shutil.", "ctypes.", "pty.", "urllib.", "ftplib.", "webbrowser.")
_WRAPPERS = ("state_dict", "model", "module")


def close_doors(file_bytes: int, writable: tuple[str, ...]) -> None:
    """Set limits on everything, and let Python itself refuse what no state dict needs. Cannot be undone."""
    with open("/proc/self/statm", encoding="ascii") as handle:
        mapped = int(handle.read().split()[0]) * resource.getpagesize()
    set_limits({resource.RLIMIT_AS: mapped + 4 * file_bytes + 512 * _MIB, resource.RLIMIT_CPU: cpu_seconds(file_bytes),
                resource.RLIMIT_FSIZE: 2 * file_bytes + 64 * _MIB, resource.RLIMIT_NOFILE: 64, resource.RLIMIT_NPROC: 0,
                resource.RLIMIT_CORE: 0})

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES
        if event.startswith(_FORBIDDEN) or (writes and arguments[0] not in writable):
            raise PermissionError(f"{event} while a foreign file is read")

    sys.addaudithook(refuse)


def cpu_seconds(file_bytes: int) -> int:
    """Return how long a file of this size may keep the process busy."""
    return 60 + file_bytes // (50 * _MIB)


def state_dict_of(value: Any) -> tuple[dict[str, Any], list[str]]:
    """Return the tensors by name, taken out of a trainer's wrapper if there is one, and what was left out beside it."""
    if not isinstance(value, dict):
        raise ValueError(f"holds a {type(value).__name__}, not tensors by name")
    wrapper = next((key for key in _WRAPPERS if isinstance(value.get(key), dict)), None)
    if wrapper is None:
        return value, []
    return value[wrapper], sorted(str(key)[:80] for key in value if key != wrapper)


def faults_of(tensors: dict[str, Any], most_bytes: int) -> list[str]:
    """Say what keeps tensors from being written as they are."""
    import torch

    known = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
             torch.float32, torch.float64}
    faults, total = [], 0
    for name, tensor in tensors.items():
        what = repr(name)[:120]
        if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= 500:
            faults.append(f"{what} is no name of a tensor")
        elif type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            faults.append(f"{what} is a {type(tensor).__name__}, no tensor")
        elif tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.dtype not in known:
            faults.append(f"{what} is a tensor of {tensor.dtype}, {tensor.layout}, {tensor.device}; only plain ones "
                          "can be kept")
        else:
            total += tensor.numel() * tensor.element_size()
    if total > most_bytes:
        faults.append(f"unfolds to {total:,} bytes; a state dict of this size has at most {most_bytes:,}")
    return faults if tensors else ["holds no tensor"]


def own_memory(tensors: dict[str, Any]) -> dict[str, Any]:
    """Return contiguous tensors that share no memory: tied weights become two."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        place = tensor.untyped_storage().data_ptr()
        whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        result[name] = tensor if whole and place not in seen else tensor.contiguous().clone()
        seen.add(place)
    return result


def reason_of(error: BaseException) -> str:
    """Say in one line why a file could not be read; torch's own words would advise to read it without restrictions."""
    text = str(error)
    named = re.search(r"GLOBAL ([\w.]{1,100})", text)
    if named is not None:
        return f"asks for {named[1]}, which is no tensor: it would be run"
    if type(error).__name__ == "UnpicklingError" or "weights_only" in text:
        return "is no pickle of tensors, or a damaged one"
    return f"{type(error).__name__}: {(text.strip().splitlines() or [''])[0][:200]}"


def main(tensor_path: str, answer_path: str) -> None:
    """Read the foreign file, write its tensors and the answer."""
    networked = not leave_the_network()
    die_with_parent()
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    size = os.fstat(0).st_size
    close_doors(size, (tensor_path, answer_path))
    faults, left_out = [], []
    try:
        with open(0, "rb") as handle:
            value = torch.load(handle, map_location="cpu", weights_only=True)
        tensors, left_out = state_dict_of(value)
        faults = faults_of(tensors, 2 * size + 64 * _MIB)
        if not faults:
            save_file(own_memory(tensors), tensor_path)
    except BaseException as error:  # whatever a hostile file provokes: it is one fault
        faults = [reason_of(error)]
    with open(answer_path, "w", encoding="utf-8") as handle:
        json.dump({"faults": faults[:40], "left_out": left_out[:40], "networked": networked}, handle)


if __name__ == "__main__":
    main(*sys.argv[1:])
