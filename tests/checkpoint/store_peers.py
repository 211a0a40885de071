"""Processes that write and read one checkpoint together, played by threads or forked; and states in pieces."""

from __future__ import annotations

import json
import os
import socket
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ttl.checkpoint.manifest import Manifest
from megatron_ttl.checkpoint.pieces import Piece, whole
from megatron_ttl.checkpoint.store import CheckpointStore


class Table:
    """Where the threads of one group lay down what they say, round by round."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.condition = threading.Condition()
        self.said: dict[int, dict[int, str]] = {}
        self.gone: set[int] = set()


class ThreadPeers:
    """A process among several, played by a thread."""

    def __init__(self, rank: int, table: Table) -> None:
        self.rank, self.world_size = rank, table.world_size
        self._table, self._round = table, 0

    def gather_text(self, text: str) -> list[str]:
        self._round += 1
        with self._table.condition:
            said = self._table.said.setdefault(self._round, {})
            said[self.rank] = text
            self._table.condition.notify_all()
            self._table.condition.wait_for(lambda: len(said) == self.world_size or self._table.gone - said.keys(), 20)
            if len(said) < self.world_size:
                raise RuntimeError(f"gather {self._round}: connection closed by {self._table.gone or 'nobody'}")
            return [said[rank] for rank in range(self.world_size)]

    def leave(self) -> None:
        """Let nobody wait for a process that has ended."""
        with self._table.condition:
            self._table.gone.add(self.rank)
            self._table.condition.notify_all()


def on_all(world_size: int, action: Callable[[ThreadPeers], Any]) -> list[Any]:
    """Run on every peer, in threads called `rank 0` and so on; return results or what was raised, by rank."""
    table = Table(world_size)
    results: list[Any] = [None] * world_size

    def work(rank: int) -> None:
        peers = ThreadPeers(rank, table)
        try:
            results[rank] = action(peers)
        except Exception as error:  # noqa: BLE001: it is looked at by the test
            results[rank] = error
        finally:
            peers.leave()

    threads = [threading.Thread(target=work, args=(rank,), name=f"rank {rank}") for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a peer waits for ever"
    return results


class SocketPeers:
    """One of two forked processes; a peer that died is an error at once."""

    world_size = 2

    def __init__(self, rank: int, connection: socket.socket) -> None:
        self.rank = rank
        # Two, for writing to a text file forgets what it has read ahead.
        self._mouth, self._ear = connection.makefile("w"), connection.makefile("r")

    def gather_text(self, text: str) -> list[str]:
        try:
            self._mouth.write(json.dumps(text) + "\n")
            self._mouth.flush()
            line = self._ear.readline()
        except OSError:
            line = ""
        if not line:
            raise RuntimeError("connection closed by peer")
        return [text, json.loads(line)][:: 1 if self.rank == 0 else -1]


def on_two_processes(action: Callable[[SocketPeers], None]) -> list[int]:
    """Run in two forked processes; return their exit statuses: 0, 1 for an error, or what they chose."""
    ends = socket.socketpair()
    children = []
    for rank in (0, 1):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                ends[1 - rank].close()
                action(SocketPeers(rank, ends[rank]))
                status = 0
            except Exception:  # noqa: BLE001: pytest, of which this process is a copy, must not see it
                traceback.print_exc()
            finally:
                os._exit(status)
        children.append(child)
    for end in ends:
        end.close()
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def tensors(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {"rows": torch.randn(12, 5, generator=generator), "columns": torch.randn(3, 24, generator=generator),
            "norm": torch.randn(6, generator=generator), "scalar": torch.tensor(float(step)),
            "empty": torch.zeros(0, 3)}


def pieces(step: int, rank: int, world_size: int) -> dict[str, dict[str, Piece]]:
    """Rows and columns are cut, the norm is the second rank's, the rest and the other group the first one's."""
    found = {}
    for dim, name in ((0, "rows"), (1, "columns")):
        tensor = tensors(step)[name]
        share = tensor.shape[dim] // world_size
        offset = [0, 0]
        offset[dim] = rank * share
        found[name] = Piece(tensor.narrow(dim, rank * share, share), tuple(tensor.shape), tuple(offset))
    if rank == 1 % world_size:
        found["norm"] = whole(tensors(step)["norm"])
    if rank == 0:
        found |= {name: whole(tensors(step)[name]) for name in ("scalar", "empty")}
    return {"weights": found, "rng": {"torch": whole(torch.arange(7))} if rank == 0 else {}}


def save_as(peers: Any, folder: Path, step: int, keep_last: int = 3) -> Any:
    """Save as one of the peers; only the first one's record counts."""
    record = {"step": step} if peers.rank == 0 else {"step": float("nan")}
    return CheckpointStore(folder, keep_last).save(step, pieces(step, peers.rank, peers.world_size), record, peers)


def save(folder: Path, step: int, world_size: int, keep_last: int = 3) -> list[Any]:
    return on_all(world_size, lambda peers: save_as(peers, folder, step, keep_last))


def assert_state(checkpoint: Any, step: int) -> None:
    assert checkpoint is not None and checkpoint.step == checkpoint.record["step"] == step
    loaded = checkpoint.tensors("weights")
    assert loaded.keys() == tensors(step).keys() == set(checkpoint.names("weights"))
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors(step).items())
    assert all(checkpoint.shape("weights", name) == tensor.shape for name, tensor in tensors(step).items())
    assert torch.equal(checkpoint.tensors("rng")["torch"], torch.arange(7))


def assert_whole(folder: Path, step: int) -> None:
    assert_state(CheckpointStore(folder).latest_valid(), step)


def forge(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite a manifest with a right checksum of its own."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    content.pop("checksum")
    change(content)
    path.write_bytes(Manifest.model_validate(content).encode())
