"""The result depends on shards and settings alone: not on workers, and not on how often the run was killed."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from corpus_shards import folder_bytes, write_shards
from patience import patient

from megatron_ttl.data.corpus.dedup import DedupResult, DedupSettings, find_duplicates
from megatron_ttl.errors import DataError, DiskError

SETTINGS = DedupSettings(bands=4, rows=4, min_similarity=0.5, paragraph_min_characters=40, paragraph_min_documents=2,
                         prefer=("b",))


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> list[Path]:
    """Three shards with copies, near copies and repeated paragraphs within and between them."""
    draw = random.Random(11)
    words = [f"palavra{number}" for number in range(500)]
    pool = [" ".join(draw.choice(words) for _ in range(25)) for _ in range(60)]
    texts = []
    for _ in range(240):
        pieces = [draw.choice(pool) for _ in range(draw.randint(1, 4))]
        if draw.random() < 0.5:
            pieces[0] += f" {draw.choice(words)}"
        texts.append((draw.choice("abc"), "\n\n".join(pieces)))
    return write_shards(tmp_path_factory.mktemp("in"), [texts[:90], texts[90:100], texts[100:]])


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory) -> DedupResult:
    result = find_duplicates(shards, SETTINGS, tmp_path_factory.mktemp("work"), 1)
    assert all(result.report["dropped"][rule] > 3 for rule in ("dedup.exact", "dedup.near")) and result.report["edited"] > 3
    return result


def test_three_workers_find_what_one_finds(shards, undisturbed, tmp_path):
    seen: list[float] = []
    result = find_duplicates(shards, SETTINGS, tmp_path / "work", 3, seen.append)
    assert result.folder.name == undisturbed.folder.name and folder_bytes(result.folder) == folder_bytes(undisturbed.folder)
    assert seen == sorted(seen) and seen[-1] == sum(path.stat().st_size for path in shards)


def run_until_killed(shards: list[Path], work: Path, events: int) -> bool:
    """Run in a child that kills itself at that many touches of the disk; return whether it came to its end."""
    child = os.fork()
    if child == 0:
        seen = 0

        def watch(event: str, _: object) -> None:
            nonlocal seen
            if event in ("open", "os.rename", "os.mkdir", "os.remove", "shutil.rmtree"):
                seen += 1
                if seen > events:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        try:
            find_duplicates(shards, SETTINGS, work, 1)
        finally:
            os._exit(sys.exc_info()[0] is not None)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status == 0


def test_a_run_that_is_killed_anywhere_goes_on(shards, undisturbed, tmp_path):
    """Killed ever later, each run going on where the one before stood; and once, at many places."""
    kills, step = 0, 3
    while not run_until_killed(shards, tmp_path / "work", step):
        kills, step = kills + 1, step + 2
        assert step < 200
    assert kills > 4
    for place in range(2, 150, 13):
        work = tmp_path / f"work-{place}"
        run_until_killed(shards, work, place)
        result = find_duplicates(shards, SETTINGS, work, 1)
        assert folder_bytes(result.folder) == folder_bytes(undisturbed.folder)
    result = find_duplicates(shards, SETTINGS, tmp_path / "work", 1)
    assert folder_bytes(result.folder) == folder_bytes(undisturbed.folder)
    left = {path.name.split("-")[0] for path in (tmp_path / "work").iterdir()}
    assert left == {"scan", "result"}, "nothing is left of what was killed"


PROGRAM = """
import sys
from pathlib import Path
from megatron_ttl.data.corpus.dedup import DedupSettings, find_duplicates

*shards, work = map(Path, sys.argv[1:])
find_duplicates(shards, DedupSettings(min_similarity=0.5), work, 3)
"""


@pytest.mark.long
def test_a_run_with_workers_that_is_killed_anywhere_goes_on(tmp_path):
    """Thirty kills at random moments, of a run with three workers; each run goes on where the one before stood."""
    draw = random.Random(12)
    texts = [" ".join(draw.choice(("um", "rio", "casa")) + str(draw.randrange(60)) for _ in range(80)) for _ in range(4000)]
    shards = write_shards(tmp_path / "in", [draw.choices(texts, k=1500) for _ in range(12)])
    expected = find_duplicates(shards, DedupSettings(min_similarity=0.5), tmp_path / "undisturbed", 1)
    kills, folders = 0, 0
    while kills < 30:
        folders += 1
        while True:
            run = subprocess.Popen([sys.executable, "-c", PROGRAM, *map(str, shards), str(tmp_path / f"work-{folders}")])
            try:
                assert run.wait(draw.uniform(0.3, 4)) == 0
                break
            except subprocess.TimeoutExpired:
                run.kill()
                run.wait()
                kills += 1
        found = find_duplicates(shards, DedupSettings(min_similarity=0.5), tmp_path / f"work-{folders}", 1)
        assert folder_bytes(found.folder) == folder_bytes(expected.folder)


def test_what_is_there_is_not_read_again_and_what_changed_is(shards, undisturbed, tmp_path):
    work, copies = tmp_path / "work", tmp_path / "in"
    copies.mkdir()
    mine = [Path(copies, path.name) for path in shards]
    for path, copy in zip(shards, mine, strict=True):
        copy.write_bytes(path.read_bytes())
    find_duplicates(mine, SETTINGS, work, 1)
    before = {path.name: path.stat().st_mtime_ns for path in work.iterdir()}
    find_duplicates(mine, SETTINGS, work, 1)
    assert {path.name: path.stat().st_mtime_ns for path in work.iterdir()} == before
    (write_shards(tmp_path / "other", [[("b", "um texto")]])[0]).rename(mine[1])
    result = find_duplicates(mine, SETTINGS, work, 1)
    after = {path.name for path in work.iterdir()}
    assert len(after & set(before)) == 2 and len(after) == 4, "the scans of the two other shards stay, what is old goes"
    assert result.report["documents"] == undisturbed.report["documents"] - 9


def test_a_dead_worker_is_an_error_in_seconds(shards, tmp_path):
    died = []

    def kill_one(_: float) -> None:
        died.append(time.monotonic())
        for worker in multiprocessing.active_children():
            worker.kill()
        time.sleep(0.2)  # until the executor has seen it, however fast the rest was

    many = [tmp_path / f"{number}.jsonl.zst" for number in range(40)]
    for path in many:
        path.write_bytes(shards[0].read_bytes())
    with pytest.raises(DataError, match="a worker process died; .*use fewer workers, or smaller shards"):
        find_duplicates(many, SETTINGS, tmp_path / "work", 2, kill_one)
    assert time.monotonic() - died[0] < patient(5)


def test_a_place_that_cannot_be_written_is_said(shards, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DiskError, match="file.*: could not be written"):
        find_duplicates(shards, SETTINGS, tmp_path / "file" / "work", 1)
