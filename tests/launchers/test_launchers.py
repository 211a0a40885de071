"""Every launcher starts the same run: same losses, exit code 0; and what a failing one leaves to read."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launcher_environment import environment
from patience import patient
from tiny_session import write_data, write_settings

from megatron_ttl.runtime import free_port

pytestmark = pytest.mark.slow
TENSOR = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}, "parallel": {"tensor": 2}}
GENTLE = ["optimizer.lr=1e-3", "train.steps=4", "evaluation.every_steps=4", "schedule.warmup_steps=1"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launchers")
    write_data(folder / "data")
    return folder


def start(repository, place, name, launcher, profile=None, script="pretrain_ttl.py", front=(), **more):
    """Start a run under a launcher; return the process."""
    folder = place / name
    folder.mkdir(exist_ok=True)
    deepspeed, run = write_settings(folder, place / "data", folder / "run", profile)
    command = [*launcher, str(repository / script), *front, "--deepspeed_config", str(deepspeed), "--config", str(run),
               *GENTLE]
    return subprocess.Popen(command, cwd=repository, env=environment(**more), stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, start_new_session=True)


def finish(process, timeout=120):
    """Wait; return what it printed and its exit code."""
    printed, _ = process.communicate(timeout=timeout)
    return printed, process.returncode


def losses(place, name):
    rows = [json.loads(line) for line in (place / name / "run/metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["event"] == "train"]


@pytest.fixture(scope="module")
def alone(repository, place):
    printed, code = finish(start(repository, place, "alone", [sys.executable]))
    assert code == 0, printed
    return losses(place, "alone")


def launcher_commands():
    torchrun = ["torchrun", "--standalone", "--nproc_per_node", "2"]
    mpirun = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", "2", sys.executable]
    return {"torchrun": lambda: torchrun,
            "deepspeed": lambda: ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port())],
            "mpirun": lambda: mpirun}


@pytest.mark.parametrize(("name", "profile"), [("torchrun", TENSOR), ("deepspeed", None), ("mpirun", TENSOR)])
def test_a_launcher_gives_the_losses_of_one_process(repository, place, alone, name, profile):
    """mpirun is given no MASTER_ADDR: mpi4py tells the processes where to meet."""
    if name == "mpirun" and not shutil.which("mpirun", path=environment()["PATH"]):
        pytest.skip("mpirun is not installed")
    label = f"{name}-{'tensor' if profile else 'data'}"
    printed, code = finish(start(repository, place, label, launcher_commands()[name](), profile))
    assert code == 0, printed
    assert losses(place, label) == pytest.approx(alone, abs=1e-5)
    assert printed.count("parameters on 2 x cpu") == 1 and printed.count("done: 4 steps") == 1, "one process speaks"
    assert sum("loss" in line and " lr " in line for line in printed.splitlines()) == 4, printed


def test_a_hostfile_of_two_machines(repository, place, alone):
    """One launcher a machine, as where ssh is not allowed."""
    hostfile, port = place / "hosts", str(free_port())
    hostfile.write_text("first slots=1\nsecond slots=1\n")
    processes = []
    for rank in (0, 1):
        launcher = ["deepspeed", "--hostfile", str(hostfile), "--no_ssh", "--node_rank", str(rank), "--master_addr",
                    "127.0.0.1", "--master_port", port]
        processes.append(start(repository, place, "hostfile", launcher))
    for process in processes:
        printed, code = finish(process)
        assert code == 0, printed
    assert losses(place, "hostfile") == pytest.approx(alone, abs=1e-5)


@pytest.fixture()
def two_hosts():
    """Two network namespaces with a cable between them."""
    if not shutil.which("ip") or subprocess.run(["ip", "netns", "add", "ttl0"], capture_output=True).returncode:
        pytest.skip("network namespaces cannot be made here (needs iproute2 and root)")
    try:
        for command in ("netns add ttl1", "link add ttlv0 netns ttl0 type veth peer name ttlv1 netns ttl1",
                        "-n ttl0 addr add 10.77.0.1/24 dev ttlv0", "-n ttl1 addr add 10.77.0.2/24 dev ttlv1",
                        "-n ttl0 link set ttlv0 up", "-n ttl1 link set ttlv1 up", "-n ttl0 link set lo up",
                        "-n ttl1 link set lo up"):
            done = subprocess.run(["ip", *command.split()], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"network namespaces cannot be connected here: {done.stderr.strip()}")
        yield ["ttl0", "ttl1"]
    finally:
        for name in ("ttl0", "ttl1"):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def test_two_hosts_with_a_cable_between_them(repository, place, alone, two_hosts):
    """torchrun on each, tensor parallel across the cable."""
    processes = []
    for rank, host in enumerate(two_hosts):
        launcher = ["ip", "netns", "exec", host, "torchrun", "--nnodes", "2", "--nproc_per_node", "1", "--node_rank",
                    str(rank), "--master_addr", "10.77.0.1", "--master_port", "29533"]
        processes.append(start(repository, place, "cable", launcher, TENSOR, GLOO_SOCKET_IFNAME=f"ttlv{rank}"))
    for process in processes:
        printed, code = finish(process)
        assert code == 0, printed
    assert losses(place, "cable") == pytest.approx(alone, abs=1e-5)


def orphans(folder):
    """Processes that still name the run's folder on their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if str(folder) in (entry / "cmdline").read_bytes().decode(errors="replace"):
                    found.append(entry.name)
            except OSError:
                continue
    return found


@pytest.mark.parametrize(("name", "kind", "victim"), [("torchrun", "raise", 1), ("torchrun", "user error", 1),
                                                     ("torchrun", "kill", 0), ("torchrun", "kill", 1),
                                                     ("deepspeed", "raise", 0), ("deepspeed", "raise", 1),
                                                     ("mpirun", "raise", 1)])
def test_the_first_failure_is_told_once_and_last(repository, place, name, kind, victim):
    """No traceback of those who only lost a peer; non-zero status; nobody is left behind."""
    if name == "mpirun" and not shutil.which("mpirun", path=environment()["PATH"]):
        pytest.skip("mpirun is not installed")
    label = f"fails-{name}-{kind}-{victim}"
    process = start(repository, place, label, launcher_commands()[name](), script="tests/reliability/planted_fault.py",
                    front=("step", str(victim), kind, str(place / f"{label}-told")))
    printed, code = finish(process)
    assert code != 0
    deadline = time.monotonic() + 5
    while orphans(place / label) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not orphans(place / label)
    assert "\x1b" not in printed, "a progress bar where nobody looks"
    if kind == "raise":
        assert printed.count(f"rank {victim} of 2 (host") == printed.count("failed:\nTraceback") == 1, printed
        # What comes from the training itself; launchers add their own summary behind it.
        after = printed.split("ZeroDivisionError: planted")[1].split("torch/distributed/elastic")[0]
        assert "closed by peer" not in printed and "Traceback" not in after and "Warning" not in after, printed
    elif kind == "user error":
        assert printed.count("data/x.bin: is cut short; it must be whole; copy it again") == 1
        assert "failed:\nTraceback" not in printed, printed
    else:
        assert printed.count("lost another process, which ended without a word") == 1, printed
        assert f"rank {1 - victim} of 2 (host" in printed and "failed:\nTraceback" not in printed, printed
    if name == "torchrun":
        cause = printed.split("Root Cause")[1]
        assert f"rank      : {victim} " in cause, printed
        assert kind != "raise" or "ZeroDivisionError: planted" in cause, printed


def test_a_port_that_is_taken_is_named(repository, place):
    """Before the processes have met nobody can count who fails first; the one that knows the reason gives it."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        process = start(repository, place, "port", [sys.executable], RANK="0", WORLD_SIZE="2", LOCAL_RANK="0",
                        MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        printed, code = finish(process)
    assert code == 2 and "Traceback" not in printed, printed
    assert f"port {port} of 127.0.0.1 is taken; the processes meet there and it must be free" in printed


def test_sigterm_ends_a_process_that_waits_for_others(repository, place):
    """There is nothing to keep yet, and whoever asks for the end does not wait half an hour."""
    process = start(repository, place, "waits", [sys.executable], RANK="0", WORLD_SIZE="2", LOCAL_RANK="0",
                    MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    time.sleep(12)  # torch and DeepSpeed are imported
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    printed, code = finish(process)
    assert time.monotonic() - began < patient(5)
    assert code == 85 and "SIGTERM: stopped before the processes met; there is nothing to keep" in printed
