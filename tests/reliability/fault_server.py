"""A process with the shim and torch loaded once, which forks a child for every question: trials in milliseconds.

    python fault_server.py     reads {"function": "module:name", "arguments": {...}} line by line, answers alike
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
FOLDERS = [HERE.parents[1], HERE, *(HERE.parent / name for name in ("", "checkpoint", "train"))]
HUNG_S = 180  # no trial takes nearly so long, on a busy machine neither


class Server:
    """The tests' end."""

    def __init__(self, library: Path, log: Path, preload: list[str]) -> None:
        environment = {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": os.pathsep.join(map(str, FOLDERS)),
                       "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "DS_ACCELERATOR": "cpu"}
        self._log = log
        self._process = subprocess.Popen([sys.executable, str(HERE / "fault_server.py"), *preload], text=True,
                                         env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         stderr=log.open("w"))

    def ask(self, function: Callable[..., Any], **arguments: Any) -> Any:
        """Call a function of a module in a fork; arguments and answer are what JSON can say."""
        assert self._process.stdin and self._process.stdout
        name = f"{function.__module__}:{function.__name__}"
        self._process.stdin.write(json.dumps({"function": name, "arguments": arguments}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the server is gone:\n{self._log.read_text()[-4000:]}"
        answer = json.loads(line)
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def close(self) -> None:
        """End it, and what it may be at."""
        self._process.kill()
        self._process.wait()


def in_fork(action: Callable[[], int | None], hung_s: int = HUNG_S) -> int:
    """Start a child that ends with what it returns, or with 1 and a traceback; SIGALRM ends what hangs."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        signal.alarm(hung_s)
        status = action() or 0
    except BaseException:  # noqa: BLE001: a fork must never go back into its parent's code
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait_for(*children: int) -> list[int]:
    """Return exit statuses: minus the signal's number where one ended it."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _answer(line: str, replies: int) -> None:
    request = json.loads(line)
    module, _, name = request["function"].partition(":")
    try:
        answer = {"result": getattr(import_module(module), name)(**request["arguments"])}
    except BaseException:  # noqa: BLE001: it is the test's to look at
        answer = {"error": traceback.format_exc()}
    with open(replies, "w", encoding="utf-8", closefd=False) as handle:
        handle.write(json.dumps(answer) + "\n")


def main() -> None:
    """Answer until nobody asks."""
    replies = os.dup(1)
    os.dup2(2, 1)
    for name in sys.argv[1:]:
        import_module(name)
    for line in sys.stdin:
        status = wait_for(in_fork(lambda line=line: _answer(line, replies), hung_s=1200))[0]
        if status:
            os.write(replies, json.dumps({"error": f"the child ended with {status}"}).encode() + b"\n")


if __name__ == "__main__":
    main()
