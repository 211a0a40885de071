"""metrics.jsonl survives kills, resumes and a full disk."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys

import pytest

from megatron_ttl.row_file import RowFile, read_rows, trim_rows


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, steps) -> None:
    file = RowFile(path)
    for step in steps:
        file.append({"step": step, "energy_kwh": step / 10})
    file.close()


def test_rows_are_appended_over_several_openings(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    write(path, (1, 2))
    write(path, (3,))
    assert [row["step"] for row in rows_of(path)] == [1, 2, 3]


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b'{"step": 3}', b"\0" * 50, b'{"step": 3\n', b"[1]\n"])
def test_a_torn_last_line_is_cut_and_said(tmp_path, capsys, torn):
    path = tmp_path / "metrics.jsonl"
    write(path, (1, 2))
    with open(path, "ab") as handle:
        handle.write(torn)
    write(path, (3,))
    assert [row["step"] for row in rows_of(path)] == [1, 2, 3]
    assert f"the last {len(torn)} bytes were not a whole row; they are cut" in capsys.readouterr().err


def test_a_damaged_line_in_the_middle_costs_nothing_after_it(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n#?!\n{"step": 2}\n')
    write(path, (3,))
    assert path.read_bytes().count(b"\n") == 4
    assert capsys.readouterr().err == ""


def test_a_killed_writer_leaves_whole_rows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    code = ("import sys; from pathlib import Path; from megatron_ttl.row_file import RowFile\n"
            "file, step = RowFile(Path(sys.argv[1])), 0\n"
            "while True:\n"
            "    step += 1; file.append({'step': step, 'text': 'x' * 300})\n"
            "    if step == 50: print('go', flush=True)\n")
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE) as writer:
        writer.stdout.readline()
        os.kill(writer.pid, signal.SIGKILL)
    RowFile(path).close()
    steps = [row["step"] for row in rows_of(path)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 50


def test_rows_after_the_checkpoint_are_cut_and_the_last_one_is_known(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    assert trim_rows(path, 0) is None
    write(path, (10, 20, 20, 30, 40))
    assert trim_rows(path, 20) == {"step": 40, "energy_kwh": 4.0}
    assert [row["step"] for row in rows_of(path)] == [10, 20, 20]
    assert "2 rows after step 20 are cut" in capsys.readouterr().err
    assert trim_rows(path, 20) == {"step": 20, "energy_kwh": 2.0}
    assert capsys.readouterr().err == ""


def test_json_has_no_nan(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = RowFile(path)
    file.append({"step": 1, "loss": float("nan"), "more": {"a": [float("inf"), 1.0]}})
    assert rows_of(path) == [{"step": 1, "loss": None, "more": {"a": [None, 1.0]}}]


class FullDisk:
    """Takes so many bytes and no more, as a full disk does."""

    def __init__(self, handle, free_bytes) -> None:
        self.handle, self.free_bytes, self.closed = handle, free_bytes, False

    def write(self, payload) -> int:
        if not self.free_bytes:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = payload[:self.free_bytes]
        self.free_bytes -= len(taken)
        return self.handle.write(taken)


def test_a_full_disk_is_one_warning_and_no_row_is_lost(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    file = RowFile(path)
    file._handle = FullDisk(file._handle, free_bytes=20)
    for step in (1, 2, 3):
        file.append({"step": step, "energy_kwh": 0.1})
    file._handle.free_bytes = 10**6
    file.append({"step": 4})
    assert [row["step"] for row in rows_of(path)] == [1, 2, 3, 4]
    assert capsys.readouterr().err.count("a row could not be written") == 1


def test_rows_are_read_while_they_are_written_and_a_pipe_blocks_nobody(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'{"step": 1}\nno row\n{"step": 2}\n{"ste')
    assert list(read_rows(tmp_path / "rows.jsonl")) == [{"step": 1}, None, {"step": 2}, None]
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(OSError, match="no regular file"):
        list(read_rows(tmp_path / "pipe.jsonl"))
