"""The end of a run on several processes when one of them fails: its reason is told, last and once."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from megatron_ttl.console import print_faults
from megatron_ttl.errors import ExitCode, UserError
from megatron_ttl.parallel.mesh import Mesh
from megatron_ttl.runtime import describe_process


@contextmanager
def told_once(mesh: Mesh) -> Iterator[None]:
    """End the process at once when what is inside fails and there are several; alone, let the error go its way."""
    try:
        yield
    except Exception as error:
        if mesh.world_size > 1:
            _leave(mesh, error)
        raise


def _leave(mesh: Mesh, error: BaseException) -> NoReturn:
    """Say what went wrong if this process is the first to fail, and end at once.

    The others fail a moment later, when they find their connections closed; what they would say of it is no reason, so
    they are silent. Nothing is closed in good order, for that would wait for peers that no longer answer.
    """
    code = error.exit_code if isinstance(error, UserError) else ExitCode.FAILED
    if mesh.first_to_fail():
        sys.stdout.flush()
        if isinstance(error, UserError):
            print_faults(error)
        else:
            reason = "".join(traceback.format_exception(error))
            print(f"rank {mesh.rank} of {mesh.world_size} ({describe_process()}) failed:\n{reason}", end="",
                  file=sys.stderr)
        sys.stderr.flush()
    os._exit(int(code))
