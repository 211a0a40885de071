"""pretrain_ttl.py with a fault planted on one rank: `failing_train.py <rank> <kind> <arguments of pretrain_ttl.py>`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pretrain_ttl  # noqa: E402
from megatron_ttl.console import run_tool  # noqa: E402
from megatron_ttl.errors import DataError  # noqa: E402
from megatron_ttl.train.engine import Engine  # noqa: E402


def main():
    arguments = [text for text in sys.argv[1:] if not text.startswith("--local_rank")]  # the deepspeed launcher's
    victim, kind, arguments = int(arguments[0]), arguments[1], arguments[2:]
    real, steps = Engine.train_step, []

    def train_step(self, *rest):
        steps.append(None)
        if self.mesh.rank == victim and len(steps) == 3:
            if kind == "raise":
                raise ZeroDivisionError("planted")
            if kind == "data":
                raise DataError("data/x.bin: is cut short; it must be whole; copy it again")
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, *rest)

    Engine.train_step = train_step
    return pretrain_ttl.main(arguments)


run_tool(main)
