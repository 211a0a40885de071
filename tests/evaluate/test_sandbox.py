"""Programs that want out: every door is tried by a program that would find it open."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import patience
import pytest

from megatron_ttl import jail
from megatron_ttl.errors import ConfigError
from megatron_ttl.evaluate import sandbox
from megatron_ttl.evaluate.sandbox import Limits, require_sandbox, run_programs

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is made of Linux")
SHORT = Limits(seconds=1, wall_seconds=30.0)


@pytest.fixture(params=["all walls", "seccomp alone"])
def walls(request, monkeypatch, tmp_path):
    """Every wall that this system has, and the one without which nothing is run."""
    if request.param == "seccomp alone":
        change_jail(monkeypatch, tmp_path, ("return any(libc.unshare", "return any(False and libc.unshare"),
                    ("    if version < 1:", "    if True:"))
        assert require_sandbox() == "seccomp, no network namespace, no Landlock: files can be read"


def change_jail(monkeypatch, folder: Path, *changes: tuple[str, str]) -> None:
    """Run programs in a jail of which some lines are others."""
    text = Path(jail.__file__).read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (folder / "jail.py").write_text(text)
    monkeypatch.setattr(jail, "__file__", str(folder / "jail.py"))


def run(program: str, limits: Limits = SHORT) -> sandbox.Outcome:
    return run_programs([program], limits)[0]


def require_refusals(lines: list[str], *errors: str) -> None:
    """Run each line by itself; one of these errors, by name, must be what it raises."""
    outcomes = run_programs((f"import fcntl, multiprocessing, os, resource, socket, subprocess\ntry:\n    {line}\n"
                             "except BaseException as error:\n    print(type(error).__name__)\n" for line in lines), SHORT)
    for line, outcome in zip(lines, outcomes, strict=True):
        assert outcome.kind == "ended" and outcome.output.strip() in errors, (line, outcome)


def test_what_a_program_prints_comes_back_exactly():
    outcome = run("import sys\nprint('ação', [1, 2])\nsys.stderr.write('oops')\nsys.exit(3)\n")
    assert outcome == sandbox.Outcome("ended", 3, "ação [1, 2]\n", "oops")
    ordinary = ("import collections, datetime, decimal, hashlib, heapq, itertools, math, random, re, threading\n"
                "done = []\nthread = threading.Thread(target=done.append, args=(hashlib.md5(b'a').hexdigest()[:4],))\n"
                "thread.start(); thread.join()\nprint(done, math.comb(5, 2), datetime.date(2024, 1, 1).isoformat())\n")
    assert run(ordinary).output == "['0cc1'] 10 2024-01-01\n"
    order = "print(list({'a', 'b', 'c', 'd', 'e'}))"
    assert run(order) == run(order)  # of a set: not left to chance
    bare = run("import os, sys\nprint(__name__, dict(os.environ), repr(sys.stdin.read()))").output
    assert bare == "__main__ {'PYTHONHASHSEED': '0', 'PYTHONCOERCECLOCALE': '0'} ''\n"


ENDLESS = {
    "while True: pass": "timed out",
    "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass": "timed out",
    "import os\nos.close(1)\nos.close(2)\nwhile True: pass": "timed out",
    "while True: print('x' * 100000)": "too much output",
    "import sys\nwhile True: sys.stderr.write('x' * 100000)": "too much output",
    "print('\ud800')": "refused",
    "#" * (2 << 20): "refused",
}


def test_what_never_ends_is_ended():
    began = time.monotonic()
    outcomes = run_programs(ENDLESS, SHORT)
    assert [outcome.kind for outcome in outcomes] == list(ENDLESS.values())
    assert max(len(outcome.output) for outcome in outcomes) == SHORT.output_bytes
    assert time.monotonic() - began < patience.patient(15)


def test_waiting_is_bounded_by_the_clock():
    began = time.monotonic()
    assert run("import time\ntime.sleep(1000)", Limits(wall_seconds=0.5)).kind == "timed out"
    assert time.monotonic() - began < patience.patient(5)


def test_memory_is_bounded():
    require_refusals(["bytearray(1 << 30)"], "MemoryError")
    assert run("x = []\nwhile True: x.append(' ' * 1000000)").errors.endswith("MemoryError\n")
    bomb = run("import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(1,)).start()")
    assert bomb.kind == "timed out" or "can't start new thread" in bomb.errors


@pytest.mark.usefixtures("walls")
def test_no_second_process():
    """So there is no fork bomb, and nothing that outlives the program."""
    require_refusals(["os.fork()", "subprocess.run(['/bin/true'])", "os.posix_spawn('/bin/true', ['true'], {})",
                      "multiprocessing.get_context('fork').Process(target=print).start()",
                      "import ctypes; assert ctypes.CDLL(None).vfork() >= 0",
                      "import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == 0"],
                     "PermissionError", "OSError", "AssertionError")


@pytest.mark.usefixtures("walls")
def test_no_network(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        port, place = server.getsockname()[1], str(tmp_path / "socket")
        local.bind(place)
        local.listen()
        require_refusals([f"socket.create_connection(('127.0.0.1', {port}), 2)",
                          f"socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {port}))",
                          f"socket.socket(socket.AF_UNIX).connect({place!r})", "socket.socketpair()",
                          f"import urllib.request; urllib.request.urlopen('http://127.0.0.1:{port}', timeout=2)"],
                         "OSError", "PermissionError", "URLError")
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.usefixtures("walls")
def test_nothing_is_written(tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("as it was")
    os.chmod(mine, 0o600)
    other = tmp_path / "other"
    require_refusals([f"open({str(mine)!r}, 'w')", f"open({str(mine)!r}, 'a')", f"open({str(mine)!r}, 'r+')",
                      "open('new', 'w')", f"open({str(other)!r}, 'x')", f"os.remove({str(mine)!r})",
                      f"os.rename({str(mine)!r}, {str(other)!r})", f"os.chmod({str(mine)!r}, 0)",
                      f"os.utime({str(mine)!r}, (0, 0))", f"os.truncate({str(mine)!r}, 0)", "os.mkdir('d')",
                      f"os.symlink({str(mine)!r}, 'l')", f"os.link({str(mine)!r}, 'l')", "os.mkfifo('f')",
                      "os.memfd_create('m')", "os.setxattr('.', 'user.x', b'1')"], "PermissionError", "OSError")
    assert mine.read_text() == "as it was" and os.stat(mine).st_mode & 0o777 == 0o600 and not other.exists()


def test_secrets_are_not_read(tmp_path):
    if "no Landlock" in require_sandbox():
        pytest.skip("this kernel has no Landlock: programs can read files, and still send them nowhere")
    (tmp_path / "secret").write_text("1234")
    require_refusals([f"print(open({str(tmp_path / 'secret')!r}).read())", f"print(os.listdir({str(tmp_path)!r}))",
                      "print(open('/etc/passwd').read())", "print(os.listdir('/'))",
                      "print(open('/proc/self/environ').read())", "print(os.listdir('.'))",
                      f"print(open('/proc/{os.getpid()}/environ').read())"], "PermissionError")


@pytest.mark.usefixtures("walls")
def test_other_processes_are_left_alone():
    require_refusals(["os.kill(os.getppid(), 9)", "os.kill(-1, 9)", "os.kill(0, 9)", "os.killpg(0, 9)",
                      "resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))",
                      "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)", "os.sched_setaffinity(os.getppid(), {0})",
                      "fcntl.fcntl(1, fcntl.F_SETOWN, os.getppid())", "os.setuid(1)", "os.setsid()", "os.chroot('/')",
                      "resource.setrlimit(resource.RLIMIT_CPU, (99, 99))"], "PermissionError", "OSError", "ValueError")


def test_the_limits_of_the_child_hold_for_what_it_becomes():
    """It may become another program, inside of the same walls; only Python can be reached."""
    program = ("import os, sys\n"
               "try: os.execv('/bin/sh', ['sh', '-c', 'echo out'])\nexcept OSError: print('closed', flush=True)\n"
               "os.execv(sys.executable, [sys.executable, '-S', '-c', 'import os; os.fork()'])\n")
    outcome = run(program)
    assert outcome.code == 1 and "Error" in outcome.errors
    assert outcome.output == "closed\n" or "no Landlock" in require_sandbox()


def test_without_walls_nothing_is_run(monkeypatch, tmp_path):
    change_jail(monkeypatch, tmp_path, ("return libc.prctl(_SET_SECCOMP", "return False and libc.prctl(_SET_SECCOMP"))
    with pytest.raises(ConfigError, match="cannot be shut in: the kernel does not refuse system calls"):
        run_programs(["print(1)"])
    monkeypatch.setattr(sandbox, "require_sandbox", lambda: "")
    outcome = run("print(1)")  # a kernel that changes its mind
    assert outcome.output == "" and outcome.code == 1
    monkeypatch.undo()
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ConfigError, match="cannot be shut in on darwin"):
        run_programs(["print(1)"])


def children_of(parent: int) -> list[int]:
    """Return the numbers of the processes whose parent this is."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            number, rest = path.parent.name, path.read_text().rpartition(") ")[2]
        except OSError:
            continue
        if int(rest.split()[1]) == parent and rest[0] != "Z":
            found.append(int(number))
    return found


def test_ctrl_c_leaves_no_child():
    before = set(children_of(os.getpid()))
    seen: list[int] = []
    main = threading.main_thread().ident

    def interrupt() -> None:
        until = time.monotonic() + patience.patient(20)
        while len(seen) < 2 and time.monotonic() < until:
            time.sleep(0.05)
            seen[:] = set(children_of(os.getpid())) - before
        time.sleep(0.2)
        signal.pthread_kill(main, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run_programs(["import time\ntime.sleep(100)"] * 4, Limits(wall_seconds=100.0), workers=2)
    thread.join()
    assert len(seen) == 2 and set(children_of(os.getpid())) <= before


@pytest.mark.slow
def test_a_killed_evaluation_leaves_no_child(repository):
    program = ("from megatron_ttl.evaluate.sandbox import *\n"
               "run_programs(['import time\\ntime.sleep(100)'], Limits(wall_seconds=100.0))\n")
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=repository)
    until = time.monotonic() + patience.patient(30)
    children: list[int] = []
    while time.monotonic() < until and not any(b"program.py" in command(child) and b"jail" not in command(child)
                                               for child in children):
        time.sleep(0.05)
        children = children_of(parent.pid)
    assert children
    parent.kill()
    parent.wait()
    until = time.monotonic() + patience.patient(5)
    while any(command(child) for child in children) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(command(child) for child in children)


def command(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


def test_the_order_and_the_count_are_kept():
    reported: list[float] = []
    outcomes = run_programs((f"import time\ntime.sleep({0.2 - number / 20})\nprint({number})" for number in range(5)),
                            workers=3, progress=reported.append)
    assert [outcome.output for outcome in outcomes] == [f"{number}\n" for number in range(5)]
    assert reported == [1, 2, 3, 4, 5]
    assert run_programs([]) == []


def test_a_probe_says_what_is_closed():
    answer = subprocess.run(sandbox._command("", Limits()), capture_output=True, env={}, timeout=60)
    closed = json.loads(answer.stdout)
    assert set(closed) == {"network", "files", "calls"} and closed["calls"]
    level = require_sandbox()
    assert ("no network" in level) != closed["network"] and ("no Landlock" in level) != closed["files"]
