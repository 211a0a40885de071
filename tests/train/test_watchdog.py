"""A process that no longer moves is ended from outside, with its stacks; one that moves is left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from patience import patient

PROGRAM = """
import os, signal, sys, threading, time
from pathlib import Path
from megatron_ttl.config.deepspeed import WatchdogConfig
from megatron_ttl.train.watchdog import Watchdog

limits = WatchdogConfig(set_up_s=30, step_s=1, save_s=30, evaluate_s=None)
with Watchdog(limits, Path(sys.argv[1]), 3, 4) as watchdog:
    print("guardian", watchdog._guardian.pid, flush=True)
    with watchdog.section("step"):
        watchdog.beat(41)
        def the_place_where_it_hangs():
            {hang}
        the_place_where_it_hangs()
print("end")
"""
HANGS = {
    "blocked read": "os.read(os.pipe()[0], 1)",
    "stopped": "os.kill(os.getpid(), signal.SIGSTOP)",
    "lock held": "import re; re.fullmatch('(a|aa)+', 'a' * 80 + 'b')",
    "waiting for a thread": "threading.Event().wait()",
}


def start(tmp_path, hang):
    return subprocess.Popen([sys.executable, "-c", PROGRAM.format(hang=hang), str(tmp_path)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def gone(pid, seconds=5):
    deadline = time.monotonic() + seconds
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_alive(pid)


def test_a_process_that_hangs_is_ended(tmp_path):
    """Within the limit and ten seconds, status 70, or SIGKILL where the interpreter's lock is never given back."""
    began = time.monotonic()
    running = {name: start(tmp_path / name.replace(" ", "-"), hang) for name, hang in HANGS.items()}
    for name, process in running.items():
        guardian = int(process.stdout.readline().split()[1])
        said = process.stderr.read()
        process.wait()
        assert time.monotonic() - began < patient(2 + 1 + 10), name
        assert process.returncode == (-signal.SIGKILL if name == "lock held" else 70), (name, said)
        assert "rank 3 of 4" in said and "section 'step' after step 41 has not moved for 1 s" in said, (name, said)
        stacks = tmp_path / name.replace(" ", "-") / "stacks/rank-00003.txt"
        assert said.count("watchdog:") == 1 and str(stacks) in said
        assert gone(guardian) and "the_place_where_it_hangs" in stacks.read_text(), name


def test_a_process_that_moves_is_left_alone(tmp_path):
    """By beats, in a section of its own time, or where there is no limit; the guardian goes with it."""
    running = [start(tmp_path, work) for work in (
        "[(time.sleep(0.3), watchdog.beat()) for _ in range(8)]",
        "\n            with watchdog.section('save'): time.sleep(2.5)",
        "\n            with watchdog.section('evaluate'): time.sleep(2.5)")]
    for process in running:
        guardian = int(process.stdout.readline().split()[1])
        printed, said = process.stdout.read(), process.stderr.read()
        assert (process.wait(), printed.strip(), said) == (0, "end", "")
        assert gone(guardian)
    assert not (tmp_path / "stacks").exists()


def test_a_killed_process_leaves_no_guardian(tmp_path):
    with start(tmp_path, "time.sleep(60)") as process:
        guardian = int(process.stdout.readline().split()[1])
        assert is_alive(guardian)
        process.kill()
    assert gone(guardian)


def test_signals_to_the_whole_family_leave_the_guardian_at_work(tmp_path):
    """Ctrl-C and SIGTERM ask the training to stop; it may hang while it does."""
    hang = "signal.signal(signal.SIGINT, signal.SIG_IGN); print('ready', flush=True); os.read(os.pipe()[0], 1)"
    with start(tmp_path, hang) as process:
        guardian = int(process.stdout.readline().split()[1])
        process.stdout.readline()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            os.kill(guardian, number)
        assert process.wait(15) == 70
