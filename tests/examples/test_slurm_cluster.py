"""The batch scripts under a real Slurm of two virtual machines, where Debian's slurm-wlm is installed.

A stand-in for the trainer receives the signal: what is tested is Slurm's part, which no fake can vouch for.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not all(map(shutil.which, ("slurmctld", "slurmd", "munged", "sbatch"))),
                       reason="Slurm is not installed (Debian: slurm-wlm slurmctld slurmd munge)"),
    pytest.mark.skipif(os.geteuid() != 0, reason="slurmd starts as root only"),
]

# cred_expire: a requeued job waits for so many seconds, two minutes if nothing is said.
CONFIGURATION = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1,batch_sched_delay=0
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
KillWait=10
JobRequeue=1
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=1000 State=UNKNOWN
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[3]} CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""

# Works until told to stop; then saves, rank 0 slower than the others, and leaves with 85. At its second start
# it is done.
TRAINER = """
import os, signal, sys, time
rank, start = os.environ["SLURM_PROCID"], int(os.environ.get("SLURM_RESTART_COUNT", 0))
def save(number, frame):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # whoever is pulled down now has not saved
    time.sleep(2 if rank == "0" else 0)
    print(f"rank {rank} of {os.environ['SLURM_NTASKS']} saved at {os.environ['MASTER_ADDR']}", flush=True)
    sys.exit(85)
signal.signal(signal.SIGUSR1, save)
signal.signal(signal.SIGTERM, save)
print(f"at work {start}: {' '.join(sys.argv[1:])}", flush=True)
time.sleep(0 if start else 60)
"""


def free_ports(count: int) -> list[int]:
    listeners = [socket.socket() for _ in range(count)]
    for listener in listeners:
        listener.bind(("127.0.0.1", 0))
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


class Slurm:
    """Two virtual machines on this one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        folder = self.folder
        (folder / "state").mkdir()
        (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder, ports=free_ports(4)))
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o400)
        self.call("munged", "--force", f"--key-file={folder}/munge.key", f"--socket={folder}/munge.socket",
                  f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log",
                  f"--seed-file={folder}/munge.seed")
        self.call("slurmctld", "-c", "-i")
        for node in ("n1", "n2"):
            self.call("slurmd", "-c", "-N", node)
        self.wait_for(lambda: self.call("sinfo", "-h", "-o", "%D %t").strip() == "2 idle")

    def stop(self) -> None:
        if (self.folder / "slurmctld.pid").exists():
            self.call("scancel", "--user=root")
            self.wait_for(lambda: not self.call("squeue", "-h"))
        for name in ("n1", "n2", "slurmctld", "munged"):
            path = self.folder / f"{name}.pid"
            if path.exists():
                os.kill(int(path.read_text()), 15)

    def call(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, cwd=self.folder, capture_output=True, text=True,
                              timeout=60, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def state(self, job: str) -> str:
        return self.call("squeue", "-h", "-j", job, "-o", "%T", "-t", "all").strip()

    def wait_for(self, condition, seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, (self.folder / "slurmctld.log").read_text()[-2000:]
            time.sleep(0.1)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    for folder in (cluster.folder, *cluster.folder.parents):
        if str(folder).startswith("/tmp/"):
            folder.chmod(0o711)  # munge refuses a socket in a folder that others cannot reach
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def submit(slurm: Slurm, script: Path, nodes: int) -> tuple[str, Path]:
    (slurm.folder / "pretrain_ttl.py").write_text(TRAINER)
    log = slurm.folder / f"{script.stem}-{time.monotonic_ns()}.log"
    job = slurm.call("sbatch", "--parsable", f"--nodes={nodes}", "--gpus-per-node=0", "--ntasks-per-node=1",
                     "--cpus-per-task=1", "--time=5", "--signal=USR1@10", f"--output={log}", str(script),
                     "machine.json", "run.toml", "train.steps=5").strip()
    slurm.wait_for(lambda: log.exists() and log.read_text().count("at work 0") == nodes)
    return job, log


@pytest.mark.parametrize(("script", "nodes"), [("pretrain_single.sbatch", 1),
                                               ("pretrain_multi_node.sbatch", 2)])
def test_a_preempted_job_saves_waits_in_the_queue_and_finishes(slurm, repository, script, nodes):
    job, log = submit(slurm, repository / "examples" / "slurm" / script, nodes)
    slurm.call("scancel", "--signal=USR1", job)  # what --signal does when the time is nearly up
    slurm.wait_for(lambda: slurm.state(job) == "PENDING")
    text = log.read_text()
    meeting = "127.0.0.1" if nodes == 1 else "n1"
    for rank in range(nodes):
        assert f"rank {rank} of {nodes} saved at {meeting}" in text, "a process was killed while it saved"
    slurm.wait_for(lambda: slurm.state(job) == "COMPLETED")
    again = "at work 1: --deepspeed_config machine.json --config run.toml train.steps=5"
    assert log.read_text().count(again) == nodes


def test_a_cancelled_job_saves_and_stays_out(slurm, repository):
    job, log = submit(slurm, repository / "examples" / "slurm" / "pretrain_multi_node.sbatch", 2)
    slurm.call("scancel", job)
    slurm.wait_for(lambda: "rank 0 of 2 saved" in log.read_text())
    slurm.wait_for(lambda: slurm.state(job) == "CANCELLED")
    time.sleep(1)
    assert slurm.state(job) == "CANCELLED"
    assert "back into the queue" not in log.read_text()
