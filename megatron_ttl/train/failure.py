"""The end of a run on several processes when one of them fails: its reason is told, last and once."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from megatron_ttl.checkpoint.peers import PeerFailedError
from megatron_ttl.console import print_faults
from megatron_ttl.errors import ConfigError, ExitCode, UserError
from megatron_ttl.parallel.mesh import Mesh, is_lost_peer
from megatron_ttl.runtime import Ranks, describe_process, leave_word, siblings
from megatron_ttl.train.watchdog import Watchdog

# Launchers look after their processes once a second at most, name the one that they find dead, and leave with its code.
_SEEN_BY_LAUNCHER_S = 1.5
_ENDING = threading.Lock()


@contextmanager
def waiting_for_peers(ranks: Ranks) -> Iterator[None]:
    """Name whoever fails before the processes have met; afterwards `told_once` does.

    Raises:
        ConfigError: the port where they would meet is taken.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if "EADDRINUSE" in str(error):
            raise ConfigError(f"environment: port {ranks.master_port} of {ranks.master_address} is taken; the processes "
                              "meet there and it must be free; choose another: --master_port of torchrun and deepspeed, "
                              "or export MASTER_PORT") from None
        if ranks.world_size == 1:
            raise
        if is_lost_peer(error):
            print(f"rank {ranks.rank} of {ranks.world_size} ({describe_process()}) lost another process, which ended before "
                  "the training began", file=sys.stderr, flush=True)
            sys.exit(int(ExitCode.FAILED))
        _tell(ranks.rank, ranks.world_size, error)
        sys.exit(int(ExitCode.FAILED))


@contextmanager
def siblings_watched(ranks: Ranks) -> Iterator[None]:
    """End this process when one beside it ends while all prepare.

    Groups of processes are made then, and one that never comes is waited for as long as for one that is late. Launchers
    end the others only if it failed, not if it ended as if it was done. During training the connections tell.
    """
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.5):
            alive = siblings()
            if not alive:  # no launcher, or none any more: `stop_with_launcher` sees to that
                return
            # Whoever has a reason says it in this second, launchers do their part, and a slow one starts the last.
            if len(alive) < ranks.local_world_size and not over.wait(1.0) and len(siblings()) < ranks.local_world_size:
                if os.getpid() == min(alive):
                    print(f"rank {ranks.rank} of {ranks.world_size} ({describe_process()}) lost another process, which "
                          "ended before the training began", file=sys.stderr, flush=True)
                else:
                    time.sleep(_SEEN_BY_LAUNCHER_S)  # the one that speaks may look half a second later
                os._exit(int(ExitCode.FAILED))

    if ranks.world_size > 1:
        threading.Thread(target=look, name="siblings", daemon=True).start()
    try:
        yield
    finally:
        over.set()


@contextmanager
def told_once(mesh: Mesh, watchdog: Watchdog | None = None) -> Iterator[None]:
    """End the process at once when what is inside fails and there are several; alone, let the error go its way."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if mesh.world_size > 1:
            end_process(mesh, error, watchdog)
        raise


def end_process(mesh: Mesh, error: BaseException, watchdog: Watchdog | None = None) -> NoReturn:
    """Say what went wrong if this process is the first to fail, and end.

    The others fail a moment later, when they find their connections closed; what they would say of it is no reason, so
    they are silent, and end after the first. Nothing is closed in good order, for that would wait for peers that no
    longer answer.
    """
    _ENDING.acquire()  # never given back: a second thread that fails waits for the end
    code = error.exit_code if isinstance(error, UserError) else ExitCode.FAILED
    if isinstance(error, PeerFailedError):
        time.sleep(0.3)  # it has the reason and is about to say it
    lost_peer = is_lost_peer(error)
    sys.stdout.flush()
    sys.stderr.flush()
    heard = os.dup(2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # where torch's C++ prints how it lost its store
    first = mesh.first_to_fail()
    if first is None and lost_peer and mesh.rank == 1:
        os.dup2(heard, 2)
        print(f"rank 1 of {mesh.world_size} ({describe_process()}) lost another process, the first one; if it said "
              "nothing it was killed from outside, for want of memory for instance, or the network failed",
              file=sys.stderr, flush=True)
    if first:
        os.dup2(heard, 2)
        if isinstance(error, UserError):
            print_faults(error)
        elif lost_peer:
            # Whoever fails says so before its connections are closed: this one had no time to.
            print(f"rank {mesh.rank} of {mesh.world_size} ({describe_process()}) lost another process, which ended "
                  "without a word: killed from outside, for want of memory for instance, or the network failed "
                  f"({str(error).splitlines()[0]})", file=sys.stderr)
        else:
            _tell(mesh.rank, mesh.world_size, error)
        sys.stderr.flush()
    if lost_peer and watchdog is not None:
        watchdog.keep_stacks()  # where it was when the other ended, perhaps because that one hung
    if lost_peer or not first:
        if threading.current_thread() is threading.main_thread():  # Python lets no other one do it
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(_SEEN_BY_LAUNCHER_S)
    os._exit(int(code))


def _tell(rank: int, world_size: int, error: BaseException) -> None:
    """Print a traceback in one piece, so that no other process's is mixed into it."""
    reason = "".join(traceback.format_exception(error))
    leave_word(f"{type(error).__name__}: {error}", reason)
    print(f"rank {rank} of {world_size} ({describe_process()}) failed:\n{reason}", end="", file=sys.stderr, flush=True)
