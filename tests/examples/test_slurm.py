"""The batch scripts: what they start, where the processes meet, and when a job goes back into the queue."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SINGLE, MULTI = "pretrain_single.sbatch", "pretrain_multi_node.sbatch"

# srun: notes how it was called, then leaves with the code that the scenario has for this start.
FAKE_SRUN = """#!{python}
import json, os, sys
folder, start = {folder!r}, int(os.environ["SLURM_RESTART_COUNT"])
wanted = ("MASTER_ADDR", "MASTER_PORT", "PWD", "PATH")
with open(folder + "/calls.jsonl", "a") as calls:
    call = {{"argv": sys.argv[1:], **{{key: os.environ.get(key) for key in wanted}}}}
    calls.write(json.dumps(call) + "\\n")
sys.exit(json.load(open(folder + "/codes.json"))[start])
"""

FAKE_SCONTROL = """#!{python}
import sys
if sys.argv[1:3] == ["show", "hostnames"]:
    print({{"gpu[07-08]": "gpu07\\ngpu08", "n1": "n1"}}[sys.argv[3]])
elif sys.argv[1] == "requeue":
    open({folder!r} + "/requeued", "a").write(sys.argv[2] + "\\n")
else:
    sys.exit("scontrol: what is " + " ".join(sys.argv[1:]))
"""


class Cluster:
    """Starts a job as sbatch does, and again as long as the job asks to be requeued."""

    def __init__(self, repository: Path, folder: Path) -> None:
        self.scripts, self.folder = repository / "examples" / "slurm", folder
        (folder / "bin").mkdir()
        (folder / "submitted from here").mkdir()
        for name, text in (("srun", FAKE_SRUN), ("scontrol", FAKE_SCONTROL)):
            path = folder / "bin" / name
            path.write_text(text.format(python=sys.executable, folder=str(folder)))
            path.chmod(0o755)

    def run(self, script: str, codes: list[int], *arguments: str, nodes: str = "n1",
            **more: str) -> list[int]:
        """Return the exit codes of all starts; `codes` are those of the training at each start."""
        (self.folder / "codes.json").write_text(json.dumps(codes))
        seen: list[int] = []
        while True:
            before = self.requeued()
            environment = {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "123456",
                           "SLURM_SUBMIT_DIR": str(self.folder / "submitted from here"),
                           "SLURM_CPUS_PER_TASK": "8", "SLURM_JOB_NODELIST": nodes,
                           "SLURM_RESTART_COUNT": str(len(seen)), **more}
            done = subprocess.run(["bash", str(self.scripts / script), *arguments], env=environment,
                                  timeout=60, capture_output=True, text=True, check=False)
            assert done.stderr == ""
            seen.append(done.returncode)
            if self.requeued() == before:
                return seen

    def requeued(self) -> int:
        path = self.folder / "requeued"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def calls(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "calls.jsonl").read_text().splitlines()]


@pytest.fixture
def cluster(repository, tmp_path) -> Cluster:
    return Cluster(repository, tmp_path)


@pytest.mark.parametrize("script", [SINGLE, MULTI])
def test_the_shell_accepts_the_script(repository, script):
    subprocess.run(["bash", "-n", str(repository / "examples" / "slurm" / script)], check=True)


@pytest.mark.parametrize("script", [SINGLE, MULTI])
def test_a_finished_job_never_goes_back(cluster, script):
    assert cluster.run(script, [0]) == [0]
    assert cluster.requeued() == 0


@pytest.mark.parametrize("script", [SINGLE, MULTI])
def test_a_preempted_job_goes_back_until_it_is_done(cluster, script):
    assert cluster.run(script, [85, 85, 85, 85, 85, 0]) == [85] * 5 + [0]
    assert cluster.requeued() == 5
    assert len({json.dumps(call) for call in cluster.calls()}) == 1, "every start is the same command"


@pytest.mark.parametrize("script", [SINGLE, MULTI])
@pytest.mark.parametrize("code", [1, 2, 70, 75, 137, 143])
def test_a_failed_job_stays_out_of_the_queue(cluster, script, code):
    assert cluster.run(script, [code]) == [code]
    assert cluster.requeued() == 0


def test_a_job_that_fails_after_a_preemption_stays_out(cluster):
    assert cluster.run(SINGLE, [85, 1]) == [85, 1]
    assert cluster.requeued() == 1


@pytest.mark.parametrize(("script", "machine", "run"), [(SINGLE, "a100_single", "ttl_160m"),
                                                        (MULTI, "slurm_2x8", "tinyllama_1b1")])
def test_the_training_command_is_the_documented_one(cluster, script, machine, run):
    cluster.run(script, [0])
    sources = 'data.sources=[{prefix="a b"}]'
    cluster.run(script, [0], "configs/cpu.json", "my run.toml", "train.steps=5", sources)
    first, second = cluster.calls()
    assert first["argv"] == ["--cpus-per-task=8", "--kill-on-bad-exit=0", "--wait=120", "python", "-u",
                             "pretrain_ttl.py", "--deepspeed_config", f"configs/{machine}.json", "--config",
                             f"configs/{run}.toml"]
    assert second["argv"][6:] == ["--deepspeed_config", "configs/cpu.json", "--config", "my run.toml",
                                  "train.steps=5", sources]
    assert first["PWD"] == str(cluster.folder / "submitted from here")
    assert first["PATH"].startswith(first["PWD"] + "/.venv/bin:")


def test_processes_of_one_machine_meet_on_it(cluster):
    cluster.run(SINGLE, [0], MASTER_ADDR="left.over.from.elsewhere")
    call, = cluster.calls()
    assert (call["MASTER_ADDR"], call["MASTER_PORT"]) == ("127.0.0.1", str(20000 + 123456 % 20000))


def test_processes_of_several_machines_meet_on_the_first(cluster):
    cluster.run(MULTI, [0], nodes="gpu[07-08]")
    cluster.run(MULTI, [0], nodes="gpu[07-08]", MASTER_ADDR="10.0.0.7")
    assert [call["MASTER_ADDR"] for call in cluster.calls()] == ["gpu07", "10.0.0.7"]


@pytest.mark.parametrize("script", [SINGLE, MULTI])
def test_the_directives_belong_together(repository, script):
    lines = (repository / "examples" / "slurm" / script).read_text().splitlines()
    directives = dict(line[len("#SBATCH --"):].split("#")[0].strip().partition("=")[::2]
                      for line in lines if line.startswith("#SBATCH"))
    assert directives["signal"].startswith("USR1@"), "to the processes; B:USR1 would reach the shell alone"
    assert {"requeue", "open-mode"} <= set(directives)
    assert directives["open-mode"] == "append"
    assert directives["ntasks-per-node"] == directives["gpus-per-node"]
    last = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert lines.index("set -euo pipefail") > last, "Slurm reads no directive after the first command"
