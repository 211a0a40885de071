"""Jobs under the launchers that people use, for fault campaigns."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

from forked_job import command_line
from job_processes import JobProcesses
from launcher_environment import environment

from megatron_ttl.runtime import free_port



def launcher(name: str, processes: int = 2) -> list[str]:
    """Command of a launcher, up to the script."""
    return {"none": [sys.executable],
            "torchrun": ["torchrun", "--standalone", "--nproc_per_node", str(processes)],
            "deepspeed": ["deepspeed", "--num_gpus", str(processes), "--master_port", str(free_port())],
            "mpirun": ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", str(processes), sys.executable]}[name]


class LauncherJob(JobProcesses):
    """One start of a run; every process of it names the folder on its command line, by which orphans are found."""

    def __init__(self, repository: Path, folder: Path, data: Path, command: list[str], profile: dict | None = None,
                 fault: tuple[str, ...] = (), overrides: dict[str, object] | None = None) -> None:
        """Start; arguments as for `ForkedJob`."""
        folder.mkdir(exist_ok=True)
        self.folder = folder
        script = repository / ("tests/reliability/planted_fault.py" if fault else "pretrain_ttl.py")
        arguments = command_line(folder, data, profile, fault, overrides)
        with open(folder / "log", "ab") as log:
            self.process = subprocess.Popen([*command, str(script), *arguments], cwd=repository, env=environment(),
                                            stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)

    @property
    def log(self) -> str:
        """All that launcher and ranks printed."""
        return (self.folder / "log").read_text(errors="replace")

    def wait(self, timeout_s: float = 240) -> int:
        """Wait for the launcher; its exit code."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.end()
            raise AssertionError(f"the job still runs after {timeout_s} s:\n{self.log}") from None

    def members(self) -> list[int]:
        """Living processes of the job; a zombie has no command line."""
        found = []
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if f"{self.folder}/" in entry.read_bytes().decode(errors="replace"):
                    found.append(int(entry.parent.name))
        return found
