"""Killed at any point and started again, a corpus has the same bytes; a worker that dies ends the run with a reason."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import planted_corpus as planted
import pytest
from patience import patient

from megatron_ttl.data.corpus import cleaning
from megatron_ttl.data.corpus.plan import make_plan
from megatron_ttl.data.corpus.run import prepare

_POINTS = ("replace", "fsync", "unlink", "rename")  # what changes the disk for good


def in_fork_killed_at(number: int, config: Path) -> int:
    """Prepare in a fork that kills itself before the `number`-th change of the disk; return the changes it made."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        made = 0

        def counting(change):
            def counted(*arguments, **options):
                nonlocal made
                if made == number:
                    os.write(writer, str(made).encode())
                    os.kill(os.getpid(), signal.SIGKILL)
                made += 1
                return change(*arguments, **options)
            return counted

        status = 1
        try:
            for name in _POINTS:
                setattr(os, name, counting(getattr(os, name)))
            prepare(make_plan(config))
            os.write(writer, str(made).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with open(reader, "rb") as handle:
        made = int(handle.read())
    _, status = os.waitpid(child, 0)
    assert (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL) or status == 0
    return made


@pytest.fixture
def whole(tmp_path, repository, monkeypatch) -> tuple[Path, dict[str, bytes], int]:
    """A corpus file, what an undisturbed run of it writes, and how often that changes the disk."""
    monkeypatch.setattr(cleaning, "UNIT_BYTES", 10_000)
    config = planted.plant(tmp_path, repository)
    changes = in_fork_killed_at(10**9, config)
    expected = planted.contents(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "undisturbed")
    return config, expected, changes


def killed_and_started_again(config: Path, expected: dict[str, bytes], points: list[int]) -> None:
    """Kill the first run at the first point, the next one at the second, and so on; then let one end."""
    for point in points:
        in_fork_killed_at(point, config)
        left = planted.contents(config.parent / "out")
        assert "corpus.json" not in left or left.items() >= expected.items(), "complete, or without its manifest"
    prepare(make_plan(config))
    assert planted.contents(config.parent / "out") == expected


def test_killed_at_several_points_and_started_again_it_gives_the_same_bytes(whole, tmp_path):
    config, expected, changes = whole
    assert changes > 60
    for share in (0.02, 0.2, 0.4, 0.6, 0.75, 0.9, 0.97):
        killed_and_started_again(config, expected, [int(share * changes)])
        (tmp_path / "out").rename(tmp_path / f"out-{share}")
    killed_and_started_again(config, expected, [3, 20, 35, 50, 40, changes // 2, 8])


@pytest.mark.long
def test_killed_at_a_hundred_points_and_started_again_it_gives_the_same_bytes(whole, tmp_path):
    config, expected, changes = whole
    draw = random.Random(0)
    for trial in range(100):
        killed_and_started_again(config, expected, [draw.randrange(changes) for _ in range(draw.choice((1, 1, 3)))])
        (tmp_path / "out").rename(tmp_path / f"out-{trial}")


def started(config: Path, repository: Path, workers: int = 2) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, str(repository / "tools/prepare_corpus.py"), "--config", str(config),
                             "--workers", str(workers)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
                            env={**os.environ, "PYTHONPATH": str(repository)})


def large_corpus(tmp_path: Path, repository: Path) -> Path:
    """Plant a corpus of several megabytes, in ten files: seconds of work."""
    config = planted.plant(tmp_path, repository)
    text = planted.good_texts(repository)
    draw = random.Random(1)
    for number in range(10):
        (tmp_path / f"raw/web-large-{number}.jsonl").write_bytes(b"".join(
            planted.line(" ".join(draw.sample(text[draw.randrange(len(text))].split(), 60))) for _ in range(400)))
    return config


def after_units(config: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Wait until so many units are complete."""
    units = config.parent / "out/work/units"
    while process.poll() is None:
        if units.is_dir() and sum(path.name[-5:] == ".json" for path in units.iterdir()) >= count:
            return
        time.sleep(0.005)
    raise AssertionError(process.stderr and process.stderr.read())


def children_of(pid: int) -> list[int]:
    return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def spawned_workers(pid: int) -> list[int]:
    return [child for child in children_of(pid) if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


@pytest.mark.slow
def test_killed_with_its_workers_at_work_it_goes_on(tmp_path, repository):
    config = large_corpus(tmp_path, repository)
    prepare(make_plan(config))
    expected = planted.contents(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "undisturbed")
    for count in (1, 5):
        process = started(config, repository)
        after_units(config, count, process)
        workers = spawned_workers(process.pid)
        process.kill()
        process.wait()
        ends = time.monotonic() + 5
        while any(map(is_alive, workers)):
            assert time.monotonic() < ends, "workers end with their parent"
            time.sleep(0.01)
    last = started(config, repository)
    assert last.wait() == 0
    assert planted.contents(tmp_path / "out") == expected


@pytest.mark.slow
def test_a_worker_that_dies_is_an_error_within_five_seconds(tmp_path, repository):
    config = large_corpus(tmp_path, repository)
    process = started(config, repository)
    after_units(config, 2, process)
    os.kill(spawned_workers(process.pid)[0], signal.SIGKILL)
    since = time.monotonic()
    _, said = process.communicate(timeout=30)
    assert process.returncode == 2 and time.monotonic() - since < patient(5)
    assert "error: a worker process died; the system may have stopped it for want of memory" in said
    assert "Traceback" not in said
    prepare(make_plan(config), workers=2)
