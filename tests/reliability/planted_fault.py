"""pretrain_ttl.py with a fault planted on one rank.

`planted_fault.py <section> <rank> <kind> <file> <arguments of pretrain_ttl.py>`; the file is given the time of the fault,
in seconds since 1970, just before it happens.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import resource
import signal
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pretrain_ttl  # noqa: E402
from megatron_ttl.console import run_tool  # noqa: E402
from megatron_ttl.errors import DataError  # noqa: E402

SECTIONS = ("start", "met", "data", "step", "save", "evaluate")
DEATHS = ("kill", "raise", "exit", "segfault", "abort", "memory")
HANGS = ("stopped", "gil", "fifo")
SLOW_S = 0.6  # "slow": no fault, but time enough to hit a section from outside


def fail(kind: str, told: Path) -> None:
    """Do what the kind says: die, raise, hang, or dawdle."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    told.write_text(repr(time.time()))
    match kind:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "raise":
            raise ZeroDivisionError("planted")
        case "user error":
            raise DataError("data/x.bin: is cut short; it must be whole; copy it again")
        case "exit":
            os._exit(0)
        case "segfault":
            faulthandler.disable()
            faulthandler._sigsegv()
        case "abort":
            os.abort()
        case "memory":  # as under `ulimit -v`; what the kernel does without such a limit is "kill"
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (64 << 20),) * 2)
            bytearray(1 << 34)
        case "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(3600)  # woken up it has still not moved
        case "gil":
            lock = ctypes.create_string_buffer(64)  # two calls that keep the interpreter; no signal ends the second
            ctypes.PyDLL(None).pthread_mutex_lock(lock)
            ctypes.PyDLL(None).pthread_mutex_lock(lock)
        case "fifo":
            os.mkfifo(fifo := told.with_suffix(".fifo"))
            fifo.read_bytes()
        case "slow":
            return time.sleep(SLOW_S)
    raise AssertionError(f"{kind} did not happen")


def plant(section: str, victim: int, kind: str, told: Path) -> None:
    """Let `victim` fail in a section: before the processes meet, after it, in the third read, step, ..."""
    from megatron_ttl.checkpoint import store
    from megatron_ttl.data.causal_lm_dataset import CausalLMDataset
    from megatron_ttl.train import loop
    from megatron_ttl.train.engine import Engine

    owner, name, nth = {"start": (loop, "join", 1), "met": (loop, "prepare", 1), "data": (CausalLMDataset, "samples", 3),
                        "step": (Engine, "train_step", 3), "save": (store, "_write_pieces", 2),
                        "evaluate": (Engine, "held_out_nats", 2)}[section]
    real, calls = getattr(owner, name), []

    def failing(*arguments, **named):
        calls.append(None)
        if len(calls) == nth and int(os.environ.get("RANK", os.environ.get("OMPI_COMM_WORLD_RANK", "0"))) == victim:
            fail(kind, told)
        return real(*arguments, **named)

    setattr(owner, name, failing)


def main(arguments: list[str] | None = None) -> int:
    """Plant, and train."""
    given = [text for text in arguments or sys.argv[1:] if not text.startswith("--local_rank")]  # deepspeed's
    section, victim, kind, told, *rest = given
    plant(section, int(victim), kind, Path(told))
    return pretrain_ttl.main(rest)


if __name__ == "__main__":
    run_tool(main)
