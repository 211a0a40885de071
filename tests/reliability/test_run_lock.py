"""One run folder has one run: whoever comes second leaves at once, and no lock outlives its owner."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from launcher_environment import environment
from patience import patient
from tiny_session import write_data, write_settings

from megatron_ttl.errors import ConfigError
from megatron_ttl.runtime import free_port
from megatron_ttl.train import run_lock
from megatron_ttl.train.run_lock import RunLock

IN_USE = (r"run.dir: '.*' is in use by host \S+, pid {pid}(, Slurm job \d+)?, since .*; "
          "a run folder has one run at a time")


def lock_text(run_dir):
    return (run_dir / "run.lock").read_text()


@contextmanager
def running(words, **settings):
    """Start a process; kill it at the end of the block, however that ends."""
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, **settings)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@contextmanager
def hold(run_dir, **environment):
    """Start a process that takes the folder and keeps it; go on once it has."""
    code = ("import sys, time; from megatron_ttl.train.run_lock import RunLock; lock = RunLock();"
            "lock.take(sys.argv[1]); print('taken', flush=True); time.sleep(600)")
    root = Path(run_lock.__file__).parents[2]
    with running([sys.executable, "-c", code, str(run_dir)], cwd=root, env={**os.environ, **environment}) as process:
        assert process.stdout.readline() == "taken\n"
        yield process


def test_the_owner_is_named_with_host_process_and_job(tmp_path):
    with hold(tmp_path / "run", SLURM_JOB_ID="4711") as owner:
        with pytest.raises(ConfigError, match=IN_USE.format(pid=owner.pid)) as refused:
            RunLock().take(tmp_path / "run")
        assert f"host {socket.gethostname()}, pid {owner.pid}, Slurm job 4711, since " in str(refused.value)


def test_a_killed_owner_leaves_no_lock(tmp_path):
    """kill -9: the text stays, the lock does not."""
    with hold(tmp_path / "run") as owner:
        owner.kill()
        owner.wait()
    assert f"pid {owner.pid}" in lock_text(tmp_path / "run")
    with RunLock() as lock:
        lock.take(tmp_path / "run")
        assert f"pid {os.getpid()}," in lock_text(tmp_path / "run")


@pytest.mark.parametrize("text", ["", "host {here}, pid 2147483646, since 2020-01-01 00:00:00\n",
                                  "host elsewhere, pid 1, Slurm job 7, since 2020-01-01 00:00:00\n",
                                  "\0\x1b[31m\xff" * 99])
def test_the_text_of_a_file_that_nobody_holds_means_nothing(tmp_path, text):
    """A dead process, another machine, rubbish: taken and overwritten at once."""
    (tmp_path / "run.lock").write_bytes(text.format(here=socket.gethostname()).encode("latin-1"))
    began = time.monotonic()
    with RunLock() as lock:
        lock.take(tmp_path)
        assert re.fullmatch(rf"host \S+, pid {os.getpid()}(, Slurm job \d+)?, since .*\n", lock_text(tmp_path))
    assert time.monotonic() - began < patient(0.5)


def test_an_owner_that_has_not_written_yet_is_waited_for(tmp_path):
    """Between its taking the lock and its writing the text of a dead owner would be read."""
    path = tmp_path / "run.lock"
    path.write_text(f"host {socket.gethostname()}, pid 2147483646, since 2020-01-01 00:00:00\n")
    code = ("import fcntl, sys, time; f = open(sys.argv[1], 'r+'); fcntl.flock(f, fcntl.LOCK_EX);"
            "print('', flush=True); time.sleep(0.3); f.write('host h, pid 1, since now\\n');"
            "f.truncate(); f.flush(); time.sleep(600)")
    with running([sys.executable, "-c", code, str(path)]) as owner:
        owner.stdout.readline()
        with pytest.raises(ConfigError, match="in use by host h, pid 1, since now; a run folder"):
            RunLock().take(tmp_path)


def test_what_a_stranger_wrote_cannot_paint_the_screen(tmp_path):
    path = tmp_path / "run.lock"
    path.write_bytes(b"host x, pid 1\x1b[2J\n" + b"y" * 5000)
    with open(path) as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(ConfigError) as refused:
            RunLock().take(tmp_path)
    assert "\x1b" not in str(refused.value) and len(str(refused.value)) < 600


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, capsys, code):
    """Lustre is often mounted so; the run goes on, and its owner can still be read."""
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(run_lock.fcntl, "flock", refuse)
    with RunLock() as lock:
        lock.take(tmp_path)
        assert f"pid {os.getpid()}," in lock_text(tmp_path)
    warning = capsys.readouterr().err
    assert warning.count("warning: run.dir: ") == 1 and "is on a file system without locks" in warning


def test_a_full_disk_takes_the_lock_all_the_same(tmp_path, monkeypatch):
    """What is too little space is said by those who need space."""
    class Full(io.FileIO):
        def write(self, _text) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_lock, "open_own", lambda path, *_: Full(path, "w+"))
    with RunLock() as lock:
        lock.take(tmp_path)


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_lock_that_is_no_file_is_refused(tmp_path, kind):
    """A link would lead the text into another file, a pipe would wait for a reader."""
    path, other = tmp_path / "run/run.lock", tmp_path / "precious"
    path.parent.mkdir()
    other.write_text("kept")
    {"link": lambda: path.symlink_to(other), "pipe": lambda: os.mkfifo(path), "folder": path.mkdir}[kind]()
    with pytest.raises(ConfigError, match=r"run.dir: '.*' cannot be written .*; it must be a folder of yours"):
        RunLock().take(path.parent)
    assert other.read_text() == "kept"


@pytest.mark.parametrize(("text", "overrides", "found"), [
    ('[run]\ndir = "runs/a"\n', [], "runs/a"),
    ('[run]\ndir = "runs/a"\n', ["run.dir=runs/b c", "train.steps=3"], "runs/b c"),
    ('[run]\ndir = "runs/a"\n', ["run.dir = 'runs/d'"], "runs/d"),
    ('[run]\ndir = 5\n', [], ""), ("[run]\n", [], ""), ("run = 1\n", [], ""), ("broken", ["run.dir=x"], ""),
    ('[run]\ndir = "a"\n', ["run.dir='broken"], ""), ("[" * 5000, [], ""), ("\ufeff[run]\ndir = 'b'\n", [], "b"),
])
def test_the_folder_at_a_glance(tmp_path, text, overrides, found):
    """What is not plain is left to the check, which says what is wrong."""
    (tmp_path / "run.toml").write_text(text)
    assert run_lock._run_dir_at_a_glance(str(tmp_path / "run.toml"), overrides) == found
    assert run_lock._run_dir_at_a_glance(str(tmp_path / "missing.toml"), overrides) == ""


def test_faulty_settings_leave_nothing_behind(tmp_path, monkeypatch):
    """The early look makes no folder and no file, and what it took is let go when the check says another folder."""
    (tmp_path / "run.toml").write_text(f'[run]\ndir = "{tmp_path}/run"\n')
    with RunLock() as lock:
        lock.take_early(str(tmp_path / "run.toml"), [])
        assert not (tmp_path / "run").exists()
        for name in ("run", "other"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "run.lock").touch()
        lock.take_early(str(tmp_path / "run.toml"), [])
        with pytest.raises(ConfigError, match="in use"):
            RunLock().take(tmp_path / "run")
        lock.take(tmp_path / "other")
        with RunLock() as second:
            second.take(tmp_path / "run")
    with RunLock(takes=False) as third, RunLock(takes=False) as fourth:
        third.take(tmp_path / "run")
        fourth.take(tmp_path / "run")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("locks")
    write_data(folder / "data")
    return folder


def command(repository, place, run_dir, launcher=(sys.executable,), overrides=()):
    deepspeed, run = write_settings(place, place / "data", run_dir)
    return [*launcher, str(repository / "pretrain_ttl.py"), "--deepspeed_config", str(deepspeed), "--config", str(run),
            *overrides]


@pytest.mark.slow
@pytest.mark.parametrize(("starts", "fresh"), [(12, True), pytest.param(50, True, marks=pytest.mark.long),
                                               pytest.param(50, False, marks=pytest.mark.long)])
def test_simultaneous_starts_have_one_winner(repository, place, tmp_path, starts, fresh):
    """The losers are out before the winner has imported torch, with code 2 and its name; times are printed (-s)."""
    run_dir = tmp_path / "run"
    if not fresh:
        run_dir.mkdir()
        (run_dir / "run.lock").touch()
    words = command(repository, place, run_dir, overrides=["train.steps=100000"])
    processes, ends = [], {}
    try:
        for number in range(starts):
            with open(tmp_path / f"said-{number}", "w") as said:
                began = time.monotonic()
                processes.append((began, subprocess.Popen(words, cwd=repository, env=environment(), stderr=said,
                                                          stdout=subprocess.DEVNULL)))
        while len(ends) < starts - 1 and time.monotonic() - processes[0][0] < 120:
            for number, (began, process) in enumerate(processes):
                if number not in ends and process.poll() is not None:
                    ends[number] = time.monotonic() - began
            time.sleep(0.005)
        assert len(ends) == starts - 1
        assert {processes[number][1].returncode for number in ends} == {2}
        (winner,) = set(range(starts)) - set(ends)
        assert processes[winner][1].poll() is None
        said = IN_USE.format(pid=processes[winner][1].pid)
        assert all(re.search(said, (tmp_path / f"said-{number}").read_text()) for number in ends)
        assert "torch" not in (tmp_path / f"said-{winner}").read_text()
    finally:
        for _, process in processes:
            process.kill()
            process.wait()
    last = sorted(ends.values())
    print(f"{starts} starts, {'fresh' if fresh else 'known'} folder: out after {last[len(last) // 2]:.2f} s (median), "
          f"{last[-1]:.2f} s (last)")


def test_a_loser_imports_neither_torch_nor_pydantic(repository, place, tmp_path):
    """What it takes to be told is the start of Python and a look at the run file."""
    with hold(tmp_path / "run") as owner:
        words = command(repository, place, tmp_path / "run", [sys.executable, "-X", "importtime"])
        done = subprocess.run(words, cwd=repository, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert re.search(IN_USE.format(pid=owner.pid), done.stderr)
    imported = {line.split("|")[2].strip() for line in done.stderr.splitlines() if line.count("|") == 2}
    assert "tomllib" in imported
    assert not imported & {"torch", "pydantic", "deepspeed", "numpy", "megatron_ttl.config.load"}


LAUNCHERS = {
    "torchrun": lambda: ["torchrun", "--standalone", "--nproc_per_node", "2"],
    "deepspeed": lambda: ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port())],
    "mpirun": lambda: ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", "2", sys.executable],
}


def launcher(name):
    if name == "mpirun" and not shutil.which("mpirun", path=environment()["PATH"]):
        pytest.skip("mpirun is not installed")
    return LAUNCHERS[name]()


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("torchrun", marks=pytest.mark.long),
                                  pytest.param("deepspeed", marks=pytest.mark.long), "mpirun"])
def test_a_job_whose_folder_is_taken_ends_as_a_whole(repository, place, tmp_path, name):
    """Its first process leaves; the others do not wait for it, and it is said once."""
    with hold(tmp_path / "run") as owner:
        words = command(repository, place, tmp_path / "run", launcher(name))
        with running(words, cwd=repository, env=environment(), stderr=subprocess.STDOUT) as job:
            said, told = "", None
            for line in job.stdout:
                said += line
                told = told or ("in use by" in line and time.monotonic())
            job.wait()
            ended = time.monotonic()
    assert told and ended - told < 10, said
    assert len(re.findall(IN_USE.format(pid=owner.pid), said)) == 1, said
    assert job.returncode == (1 if name == "torchrun" else 2), said
    assert "PMIX" not in said, said  # mpirun saw a process come while it ended the job, which it may not survive


def listening_ports(pid):
    """Return the TCP ports on which a process listens."""
    sockets = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            sockets.add(os.readlink(link).removeprefix("socket:[").removesuffix("]"))
        except OSError:
            continue
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and words[9] in sockets:
                found.add(int(words[1].rpartition(":")[2], 16))
    return found


@pytest.mark.long
def test_one_process_needs_no_port(repository, place, tmp_path):
    """MASTER_PORT is put into its environment, for DeepSpeed looks for it; nobody binds it."""
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    words = command(repository, place, tmp_path / "run", overrides=["train.steps=100000"])
    with running(words, cwd=repository, env=environment(), stderr=subprocess.DEVNULL) as process:
        assert any(line.startswith("step 3/") for line in process.stdout)
        ports = listening_ports(process.pid)
    assert all(low <= port <= high for port in ports), f"a fixed port: {ports}"


MEET = """
import torch, torch.distributed as dist
from megatron_ttl.runtime import announce_ranks, discover_ranks, end_at_once, find_meeting_place
ranks = find_meeting_place(discover_ranks())
announce_ranks(ranks)
dist.init_process_group("gloo", rank=ranks.rank, world_size=ranks.world_size)
total = torch.tensor([ranks.rank + 1])
dist.all_reduce(total)
assert total.item() == 3
end_at_once(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "times"), [("mpirun", 1), pytest.param("torchrun", 20, marks=pytest.mark.long),
                                             pytest.param("mpirun", 20, marks=pytest.mark.long)])
def test_two_jobs_on_one_machine_do_not_meet(repository, tmp_path, name, times):
    """Each finds a port of its own, and its two processes meet there as those of a run do."""
    script = tmp_path / "meet.py"
    script.write_text(MEET)
    for _ in range(times):
        jobs = [subprocess.Popen([*launcher(name), str(script)], cwd=repository, stdout=subprocess.PIPE, text=True,
                                 env=environment(PYTHONPATH=str(repository)), stderr=subprocess.STDOUT)
                for _ in range(2)]
        for job in jobs:
            said, _ = job.communicate(timeout=300)
            assert job.returncode == 0, said


@pytest.mark.skipif(sys.platform != "linux", reason="names of sockets without a file are Linux's")
def test_a_new_folder_is_taken_by_name_and_nothing_is_made(tmp_path):
    """Before settings are checked; the name goes with its owner, and is another one for another folder."""
    run_file = tmp_path / "run.toml"
    run_file.write_text(f'[run]\ndir = "{tmp_path}/new"\n')
    with RunLock() as first, RunLock() as second, RunLock() as other:
        first.take_early(str(run_file), [])
        other.take_early(str(run_file), [f"run.dir={tmp_path}/other"])
        RunLock(takes=False).take_early(str(run_file), [])
        with pytest.raises(ConfigError, match=rf"in use by host \S+, pid {os.getpid()}, since a moment ago; a run folder"):
            second.take_early(str(run_file), [])
        assert [path.name for path in tmp_path.iterdir()] == ["run.toml"]
        first.release()
        second.take_early(str(run_file), [])
