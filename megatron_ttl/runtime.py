"""The process: who it is among its peers, where its randomness starts, what machine it runs on.

The only reader of RANK and its relatives; everything else is told.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import random
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from megatron_ttl.errors import ConfigError

_LAUNCHERS = (
    # (name, rank, world size, local rank, local world size) in the words of each launcher
    ("torchrun or deepspeed", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    ("Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
     "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("Slurm", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
)
# Programs that start our processes and look after them. Slurm's ends them by itself.
_LAUNCHER_PROGRAMS = {"torchrun", "torch.distributed.run", "torch.distributed.launch", "deepspeed", "ds",
                      "deepspeed.launcher.launch", "deepspeed.launcher.runner", "mpirun", "mpiexec", "prterun", "prted"}


@dataclass(frozen=True)
class Ranks:
    """This process among all processes of the run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    master_address: str | None = None
    master_port: int | None = None
    launcher: str = "none"
    local_world_size: int = 1
    """How many the launcher starts on this machine; 1 where it does not say."""

    @property
    def is_first(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0


def discover_ranks(environment: Mapping[str, str] | None = None) -> Ranks:
    """Read the launcher's variables: torchrun's and deepspeed's, Open MPI's, or Slurm's; alone without any.

    Raises:
        ConfigError: words where numbers must be; or prterun, which tells a process too little, and no mpi4py.
    """
    env = os.environ if environment is None else environment
    for name, rank_key, world_key, local_key, local_world_key in _LAUNCHERS:
        # `sbatch` without `srun` sets SLURM_PROCID too: only a step (srun) starts several of us.
        if rank_key not in env or world_key not in env or (name == "Slurm" and "SLURM_STEP_ID" not in env):
            continue
        try:
            rank, world, local = (int(env.get(key, "0")) for key in (rank_key, world_key, local_key))
            port = int(env.get("MASTER_PORT", "29511"))
            beside = env.get(local_world_key) or env.get("LOCAL_SIZE", "")  # deepspeed's word
        except ValueError:
            raise ConfigError(f"environment: {rank_key}={env[rank_key]!r}, {world_key}={env[world_key]!r}; "
                              f"they must be whole numbers; start again through {name}") from None
        return Ranks(rank, world, local, env.get("MASTER_ADDR"), port, name, int(beside) if beside.isdigit() else 1)
    if "PRTE_LAUNCHED" in env and "PMIX_RANK" in env:  # prterun, what is below mpirun: no word of how many there are
        return _ask_mpi("prterun")
    return Ranks()


def find_meeting_place(ranks: Ranks) -> Ranks:
    """Return the ranks with an address where they can meet: the launcher's, or one agreed on through MPI.

    Every process must call.

    Raises:
        ConfigError: there are several processes and no such address.
    """
    if ranks.world_size == 1 or ranks.master_address is not None:
        return ranks
    if ranks.launcher != "Open MPI":
        raise ConfigError(f"environment: {ranks.world_size} processes started by {ranks.launcher} and no MASTER_ADDR; "
                          "they must know where to meet; export MASTER_ADDR=<host of rank 0> (see examples/slurm)")
    agreed = _ask_mpi(ranks.launcher)
    return replace(ranks, master_address=agreed.master_address, master_port=agreed.master_port)


def _ask_mpi(launcher: str) -> Ranks:
    """Let MPI say who this process is, and the first one tell an address of its machine and a port that is free there.

    MPI is used for nothing else; DeepSpeed's own discovery would take the first address that `hostname -I` prints and
    always the same port.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ConfigError(f"environment: several processes started by {launcher}, no MASTER_ADDR, and mpi4py cannot be "
                          f"used ({error}); they must know where to meet; pip install 'megatron_ttl[mpi]', or mpirun -x "
                          "MASTER_ADDR=<host of rank 0>") from None
    everywhere = MPI.COMM_WORLD
    here = everywhere.Split_type(MPI.COMM_TYPE_SHARED)
    rank, world, local = everywhere.Get_rank(), everywhere.Get_size(), here.Get_rank()
    found = ["127.0.0.1" if here.Get_size() == world else socket.gethostname(), free_port()] if rank == 0 else None
    address, port = json.loads(_broadcast_text(everywhere, json.dumps(found)))
    # Finalised here: at the exit it would wait for processes that a crash has ended.
    MPI.Finalize()
    return Ranks(rank, world, local, address, port, launcher)


def available_memory_bytes() -> int:
    """Return how much memory may still be taken without swapping, as the kernel estimates it; Linux only."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))


def free_port() -> int:
    """Return a port of this machine that nobody listens on, below those that outgoing connections take."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 200):  # processes of two containers may share a number
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise ConfigError("environment: 200 ports between 20,000 and 32,000 are all taken; one must be free; export "
                      "MASTER_ADDR and MASTER_PORT")


def _broadcast_text(communicator: Any, text: str) -> str:
    """Send the first process's text to all; bytes, for mpi4py would pickle a string."""
    buffer = bytearray(text.encode().ljust(512))
    communicator.Bcast(buffer, root=0)
    return buffer.decode().strip()


def announce_ranks(ranks: Ranks) -> None:
    """Put the ranks into the environment in torchrun's words, where DeepSpeed looks for them."""
    os.environ.update(RANK=str(ranks.rank), WORLD_SIZE=str(ranks.world_size), LOCAL_RANK=str(ranks.local_rank),
                      MASTER_ADDR=ranks.master_address or "127.0.0.1", MASTER_PORT=str(ranks.master_port or 29511))


def set_default_variable(name: str, value: str) -> None:
    """Set an environment variable that a library reads, unless the user has set it."""
    os.environ.setdefault(name, value)


def output_is_forwarded() -> bool:
    """Return whether mpirun stands between this process and the reader.

    It gives its processes a terminal of their own even where all they print goes into a file.
    """
    return "PRTE_LAUNCHED" in os.environ or "OMPI_COMM_WORLD_RANK" in os.environ


def leave_word(message: str, traceback: str) -> None:
    """Tell torchrun, if it is there, why this process fails: its summary ends with that.

    Without a word it names the process that it saw end first, and prints the address of a manual.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        word = {"message": message, "extraInfo": {"py_callstack": traceback, "timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as handle:
            json.dump({"message": word}, handle)


def describe_process() -> str:
    """Return host, process and, under Slurm, job: whom to ask who holds a run folder."""
    job = f", Slurm job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""
    return f"host {socket.gethostname()}, pid {os.getpid()}{job}"


def end_at_once(code: int) -> NoReturn:
    """End a process that has closed everything, without the interpreter's own farewell.

    There gloo's threads, giving back the last tensors they sent, now and then abort the process: run done, status 134.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def stop_with_launcher() -> None:
    """Have this process asked to stop, as by SIGTERM, when the launcher above it is gone.

    Killed by force, a launcher cannot end its processes, and they would go on with nobody to look after them. Looked at
    once in a while, for the kernel tells a child of its parent alone, and `deepspeed` is a grandparent. Whoever was
    started by hand has no launcher and outlives its shell. Linux alone has /proc; elsewhere nothing happens.
    """
    chain = _way_to_launcher()

    def look() -> None:
        while all(_parent(child) == parent for child, parent in chain):
            time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)

    if chain:
        threading.Thread(target=look, name="launcher", daemon=True).start()


def siblings() -> frozenset[int]:
    """Return the living processes of this machine that the same launcher started, this one included (Linux)."""
    parent = os.getppid()
    if not _is_launcher(parent):
        return frozenset()
    found = set()
    for path in Path(f"/proc/{parent}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the launcher has ended
            for pid in path.read_text().split():
                with contextlib.suppress(OSError):  # it has ended
                    if os.readlink(f"/proc/{pid}/exe") == os.readlink("/proc/self/exe"):
                        found.add(int(pid))
    return frozenset(found)


def _way_to_launcher() -> list[tuple[int, int]]:
    """Return (child, parent) from this process up to the topmost launcher; nothing if there is none."""
    chain, length, pid = [], 0, os.getpid()
    while (parent := _parent(pid)) > 1:
        chain.append((pid, parent))
        length = len(chain) if _is_launcher(parent) else length
        pid = parent
    return chain[:length]


def _parent(pid: int) -> int:
    try:  # after the name, which is in brackets and may hold any character: state, parent
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])
    except OSError:
        return 0


def _is_launcher(pid: int) -> bool:
    """Return whether a launcher is what runs there: `torchrun ...`, `python -u -m torch.distributed.run ...`."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    if os.path.basename(words[0]).startswith("python"):  # what it runs: the first word that is no option
        words = [word for word in words[1:] if not word.startswith("-")]
    return os.path.basename(words[0] if words else "") in _LAUNCHER_PROGRAMS


def seed_everything(seed: int) -> None:
    """Seed Python's and torch's generators; the model has no dropout, so nothing draws from them by itself."""
    import torch

    random.seed(seed)
    torch.manual_seed(seed)


def environment_report() -> dict[str, str]:
    """Return versions and device names for the run's records."""
    import importlib.metadata as metadata

    import torch

    report = {"megatron_ttl": metadata.version("megatron_ttl"), "python": sys.version.split()[0],
              "platform": platform.platform(terse=True)}
    for package in ("torch", "deepspeed", "numpy", "safetensors", "sentencepiece", "transformers", "codecarbon"):
        try:
            report[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            report[package] = "absent"
    report["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine() + " CPU"
    return report


def cuda_compiler() -> Path | None:
    """Return CUDA's compiler: of CUDA_HOME or CUDA_PATH, on the PATH, or where NVIDIA's packages put it."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for home in (*homes, None, "/usr/local/cuda"):
        found = shutil.which("nvcc") if home is None else shutil.which("nvcc", path=os.path.join(home, "bin"))
        if found:
            return Path(found)
    return None


def cache_folder() -> Path:
    """Return where things are kept that can be made again: XDG_CACHE_HOME, or `.cache` in the home folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron_ttl"
