"""Jobs of several processes for fault campaigns: the ranks are forked from a process that has all imported.

A start takes a fraction of a second instead of eight. Everything else is the real thing: `planted_fault.main` or
`pretrain_ttl.main` in processes of their own, which meet over TCP, under torchrun's agent or under a launcher of a few
lines that behaves like it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import planted_fault
from job_processes import JobProcesses
from patience import patient
from tiny_session import write_settings

import pretrain_ttl
from megatron_ttl import testing
from megatron_ttl.console import run_tool

TENSOR_DATA = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}, "parallel": {"tensor": 2}}
TENSOR_PIPELINE = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1},
                   "parallel": {"tensor": 2, "pipeline": 2}}
_STEPS = {"optimizer.lr": "1e-3", "train.steps": 8, "schedule.warmup_steps": 2, "checkpoint.every_steps": 2,
          "evaluation.every_steps": 4}


class ForkedJob(JobProcesses):
    """One start of a run; every process of it is in one session, by which orphans are found."""

    def __init__(self, folder: Path, data: Path, processes: int, profile: dict | None = None,
                 fault: tuple[str, ...] = (), agent: bool = False, overrides: dict[str, object] | None = None) -> None:
        """Start.

        Args:
            folder: holds settings, the run folder and the log; another job on the same folder resumes.
            data: from `write_data`.
            processes: number of ranks.
            profile: DeepSpeed JSON.
            fault: section, rank and kind of `planted_fault.py`.
            agent: torchrun's agent instead of the launcher of a few lines.
            overrides: settings other than the usual eight steps, a checkpoint every two, an evaluation every four.
        """
        folder.mkdir(exist_ok=True)
        self.folder = folder
        arguments = command_line(folder, data, profile, fault, overrides)
        for name in ("pids", "codes", "fault-at"):
            (folder / name).unlink(missing_ok=True)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*testing._PRELOAD, "torch.distributed.run"])
        self.process = context.Process(target=_launch, args=(str(folder), arguments, processes, bool(fault), agent))
        self.started = time.time()
        self.process.start()

    @property
    def log(self) -> str:
        """All that launcher and ranks printed, in this start and the ones before."""
        return (self.folder / "log").read_text()

    def pids(self) -> list[int]:
        """Wait until the ranks are there; their process ids by rank."""
        return self._read("pids")

    def codes(self) -> list[int]:
        """Exit codes of the ranks, negative for a signal; only of a launcher that was not killed."""
        return self._read("codes")

    def _read(self, name: str) -> list[int]:
        deadline = time.monotonic() + patient(20)
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, ValueError):
                return json.loads((self.folder / name).read_text())
            time.sleep(0.005)
        raise AssertionError(f"no {name}:\n{self.log}")

    def reached(self, timeout_s: float = 30) -> bool:
        """Wait until the planted fault happens; whether it did before the job ended."""
        deadline = time.monotonic() + patient(timeout_s)
        while not (there := (self.folder / "fault-at").exists()) and self.process.is_alive():
            assert time.monotonic() < deadline, self.log
            time.sleep(0.005)
        return there

    def wait(self, timeout_s: float = 240) -> int:
        """Wait for the launcher; its exit code."""
        self.process.join(timeout_s)
        if self.process.exitcode is None:
            self.end()
            raise AssertionError(f"the job still runs after {timeout_s} s:\n{self.log}")
        return self.process.exitcode

    def members(self) -> list[int]:
        """Living processes of the job, launcher included."""
        found = []
        for entry in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, _, _, session = entry.read_bytes().rpartition(b")")[2].split()[:4]
                if int(session) == self.process.pid and state != b"Z":
                    found.append(int(entry.parent.name))
        return found


def command_line(folder: Path, data: Path, profile: dict | None, fault: tuple[str, ...],
                 overrides: dict[str, object] | None) -> list[str]:
    """Write the settings into the folder; return the arguments of pretrain_ttl.py, or of planted_fault.py."""
    deepspeed, run = write_settings(folder, data, folder / "run", profile)
    front = [*fault, str(folder / "fault-at")] if fault else []
    changes = [f"{key}={value}" for key, value in {**_STEPS, **(overrides or {})}.items()]
    return [*front, "--deepspeed_config", str(deepspeed), "--config", str(run), *changes]


def digest(folder: Path) -> tuple[str, str]:
    """Name of the last checkpoint and sha256 over its tensor files."""
    last = max((folder / "run/checkpoints").glob("step-????????"))
    total = hashlib.sha256()
    for path in sorted(last.rglob("*.safetensors")):
        total.update(path.name.encode() + path.read_bytes())
    return last.name, total.hexdigest()


def finished(folder: Path, data: Path, processes: int, profile: dict) -> tuple[tuple[str, str], list[tuple[int, float]]]:
    """Run, or go on with, a run to its end; its digest and curve."""
    job = ForkedJob(folder, data, processes, profile)
    assert job.wait() == 0, job.log
    return digest(folder), curve(folder)


def curve(folder: Path) -> list[tuple[int, float]]:
    """Step and loss of every row, but one that is being written."""
    path = folder / "run/metrics.jsonl"
    lines = path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []
    rows = map(json.loads, lines)
    return [(row["step"], row["loss"]) for row in rows if row["event"] == "train"]


def shared_memory() -> set[str]:
    """Files in /dev/shm that no living process has open: what a killed one left behind.

    Not the semaphores of Python's multiprocessing, which the tests use and the ranks do not.
    """
    found = {entry.name for entry in os.scandir("/dev/shm")
             if entry.is_file(follow_symlinks=False) and not entry.name.startswith("sem.mp-")}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            maps = (entry / "maps").read_text()
            found -= {name for name in found if f"/dev/shm/{name}" in maps}
            found -= {os.path.basename(os.readlink(path)) for path in (entry / "fd").iterdir()}
    return found


def _launch(folder: str, arguments: list[str], processes: int, planted: bool, agent: bool) -> None:
    """Be the launcher."""
    from megatron_ttl import runtime

    os.setsid()
    os.chdir(folder)
    log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    launcher = os.getpid()
    runtime._is_launcher = lambda pid: pid == launcher  # by its command line it is the fork server
    if agent:
        _elastic(arguments, processes, planted)
    pids = []
    port = runtime.free_port()
    for rank in range(processes):
        pids.append(os.fork())
        if pids[-1] == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                           "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            _rank(arguments, planted)
    _look_after(pids)


def _rank(arguments: list[str], planted: bool, returns: bool = False) -> None:
    import torch

    torch.set_num_threads(1)
    code = 1
    try:
        run_tool(lambda: (planted_fault if planted else pretrain_ttl).main(arguments))
    except SystemExit as left:
        code = int(left.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
    if code or not returns:
        os._exit(code)


def _look_after(pids: list[int]) -> None:
    """End the others when one fails, as launchers do; pass on what asks this process to end."""
    codes: dict[int, int] = {}
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: asked.append(number))
    Path("pids.part").write_text(json.dumps(pids))
    os.replace("pids.part", "pids")
    kill_at = None
    while len(codes) < len(pids):
        ended, status = os.waitpid(-1, os.WNOHANG)
        if ended:
            codes[ended] = os.waitstatus_to_exitcode(status)
        failed = any(codes.values())
        if (failed or asked) and kill_at is None:
            kill_at = time.monotonic() + 30
            _signal_all(set(pids) - set(codes), asked[0] if asked else signal.SIGTERM)
        if kill_at and time.monotonic() > kill_at:
            _signal_all(set(pids) - set(codes), signal.SIGKILL)
        time.sleep(0 if ended else 0.02)
    Path("codes.part").write_text(json.dumps([codes[pid] for pid in pids]))
    os.replace("codes.part", "codes")
    os._exit(1 if any(codes.values()) else 0)


def _signal_all(pids: set[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _elastic(arguments: list[str], processes: int, planted: bool) -> None:
    """torchrun without its command line: its agent, its store, its summary; the ranks are forked."""
    from torch.distributed.elastic.multiprocessing.errors import record
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=processes, rdzv_backend="c10d",
                          rdzv_endpoint="localhost:0", run_id=f"job-{os.getpid()}", max_restarts=0, monitor_interval=0.1,
                          start_method="fork")
    code = 1
    try:
        record(lambda: elastic_launch(config, _rank)(arguments, planted, True))()
        code = 0
    except SystemExit as left:
        code = int(left.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
