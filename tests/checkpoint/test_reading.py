"""Read parts of tensors from a checkpoint, however it was cut, and nothing but them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from store_peers import forge, on_all, save

from megatron_ttl.checkpoint.pieces import Piece, cover_fault
from megatron_ttl.checkpoint.store import Checkpoint, CheckpointStore
from megatron_ttl.errors import CheckpointError

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
BLOCK = st.tuples(st.integers(-1, 4), st.integers(-1, 4), st.integers(-1, 5), st.integers(-1, 5))


@settings(max_examples=300, deadline=None)
@given(st.tuples(st.integers(0, 4), st.integers(0, 4)), st.lists(BLOCK, max_size=5))
def test_a_cover_is_what_counting_says(shape: tuple[int, int], corners: list[tuple[int, int, int, int]]) -> None:
    blocks = [((a, b), (m, n)) for a, b, m, n in corners]
    counts, inside = np.zeros(shape, int), True
    for (a, b), (m, n) in blocks:
        inside &= min(a, b) >= 0 and min(m, n) >= 1 and a + m <= shape[0] and b + n <= shape[1]
        counts[max(a, 0) : max(a + m, 0), max(b, 0) : max(b + n, 0)] += 1
    covered = inside and bool((counts == 1).all()) if 0 not in shape else blocks == [((0, 0), shape)]
    assert (cover_fault(shape, blocks) == "") == covered


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(1, 9), max_size=3, unique=True), min_size=1, max_size=3), st.data())
def test_grids_cover_and_do_not_when_one_is_changed(cuts: list[list[int]], data: st.DataObject) -> None:
    blocks: list[Any] = [((), ())]
    for ends in cuts:
        edges = [0, *sorted(ends), 10]
        blocks = [((*offset, a), (*extent, b - a)) for offset, extent in blocks
                  for a, b in zip(edges, edges[1:], strict=False)]
    shape = (10,) * len(cuts)
    blocks = data.draw(st.permutations(blocks))
    assert cover_fault(shape, blocks) == ""
    assert "lacks" in cover_fault(shape, blocks[1:])
    assert "overlap" in cover_fault(shape, [blocks[0], *blocks])


def test_a_forged_cover_of_very_many_pieces_takes_no_hours() -> None:
    """As many as a manifest has room for; comparing each with each takes minutes."""
    rows = [((index, 0), (1, 7)) for index in range(30_000)]
    columns = [((0, index), (7, 1)) for index in reversed(range(30_000))]
    assert cover_fault((30_000, 7), rows) == cover_fault((7, 30_000), columns) == ""
    assert "overlap" in cover_fault((30_000, 7), [*rows, rows[-1]])


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_block_of_any_cut_is_the_wholes(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Cut unevenly along any dimension among some of the processes, the others have nothing."""
    shape = tuple(data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    tensor = torch.randn(shape).to(data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64])))
    dim = data.draw(st.integers(0, len(shape) - 1))
    inner = data.draw(st.sets(st.integers(1, shape[dim] - 1), max_size=3)) if shape[dim] > 1 else set()
    edges = [0, *sorted(inner), shape[dim]]
    holders = data.draw(st.permutations(range(4)))[: len(edges) - 1]

    def own(rank: int) -> dict[str, Piece]:
        if rank not in holders:
            return {}
        begin, end = edges[holders.index(rank)], edges[holders.index(rank) + 1]
        offset = tuple(begin if index == dim else 0 for index in range(len(shape)))
        return {"a": Piece(tensor.narrow(dim, begin, end - begin), shape, offset)}

    folder = tmp_path_factory.mktemp("cut")
    results = on_all(4, lambda peers: CheckpointStore(folder).save(1, {"weights": own(peers.rank)}, {}, peers))
    checkpoint = CheckpointStore(folder).open(1)
    assert len(list(checkpoint.directory.glob("weights-*"))) == len(holders), results
    assert torch.equal(checkpoint.tensors("weights")["a"], tensor) and checkpoint.shape("weights", "a") == shape
    for _ in range(5):
        offset = tuple(data.draw(st.integers(0, size)) for size in shape)
        extent = tuple(data.draw(st.integers(0, size - start)) for start, size in zip(offset, shape, strict=True))
        expected = tensor[tuple(slice(a, a + n) for a, n in zip(offset, extent, strict=True))]
        found = checkpoint.read("weights", "a", offset, extent)
        assert found.shape == expected.shape and found.dtype == expected.dtype and torch.equal(found, expected)


def grow(checkpoint: Checkpoint, kind: str) -> None:
    """Print by how many bytes the memory of a fresh process grows while it reads 1 of 64 MiB."""
    def peak() -> int:
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) << 10

    checkpoint.read("weights", "a", (0, 0), (1, 1 << 12))  # what reading needs in any case
    before = peak()
    if kind == "a block":
        assert float(checkpoint.read("weights", "a", (1920, 0), (256, 1 << 12)).sum()) == 256 << 12
    else:
        assert float(checkpoint.tensors("weights")["a"].sum()) == 64 << 20 >> 2
    print(peak() - before)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_block_costs_its_own_memory(tmp_path: Path, world_size: int) -> None:
    def action(peers: Any) -> Any:
        rows = 4096 // world_size
        piece = Piece(torch.ones(rows, 1 << 12), (4096, 1 << 12), (rows * peers.rank, 0))
        return CheckpointStore(tmp_path).save(1, {"weights": {"a": piece}}, {}, peers)

    on_all(world_size, action)
    grown = {}
    for kind in ("a block", "all"):
        code = ("import sys; from pathlib import Path; from test_reading import grow\n"
                "from megatron_ttl.checkpoint.store import CheckpointStore\n"
                f"grow(CheckpointStore(Path({str(tmp_path)!r})).open(1), {kind!r})")
        done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}, capture_output=True,
                              text=True)
        assert done.returncode == 0, done.stderr
        grown[kind] = int(done.stdout.split()[-1])
    assert grown["all"] > 60 << 20, "or memory is not measured"
    assert grown["a block"] < 12 << 20, grown


@pytest.mark.parametrize("version", ["version1", "version2"])
def test_shapes_and_names_of_both_versions(version: str) -> None:
    checkpoint = CheckpointStore(GOLDEN / version).open(3)
    for group in checkpoint.groups:
        tensors = checkpoint.tensors(group)
        assert checkpoint.names(group) == list(tensors)
        assert all(checkpoint.shape(group, name) == tensor.shape for name, tensor in tensors.items())
        assert all(torch.equal(checkpoint.read(group, name), tensor) for name, tensor in tensors.items())
    with pytest.raises(CheckpointError, match="weights has no tensor 'x'; it must be of the same model"):
        checkpoint.shape("weights", "x")
    with pytest.raises(CheckpointError, match="has no group 'x'; it has weights"):
        checkpoint.names("x")


@pytest.mark.parametrize(("offset", "extent"), [
    ((-1,), (2,)), ((0,), (7,)), ((6,), (1,)), ((0, 0), (1, 1)), ((2,), None)])
def test_a_block_that_is_not_there_is_our_error(tmp_path: Path, offset: tuple, extent: tuple | None) -> None:
    save(tmp_path, 5, 2)
    with pytest.raises((AssertionError, ValueError)):
        CheckpointStore(tmp_path).open(5).read("weights", "norm", offset, extent)


def test_groups_and_tensors_without_elements(tmp_path: Path) -> None:
    """No file has them, and none that the manifest does not name is looked for."""
    def action(peers: Any) -> Any:
        tensors = {"weights": {"a": torch.zeros(2, 0)} if peers.rank == 1 else {}, "none": {}}
        return CheckpointStore(tmp_path).save(5, tensors, {}, peers)

    assert all(result.written for result in on_all(2, action))
    checkpoint = CheckpointStore(tmp_path).open(5)
    assert checkpoint.groups == ["weights", "none"] and checkpoint.tensors("none") == {}
    assert checkpoint.read("weights", "a").shape == checkpoint.tensors("weights")["a"].shape == (2, 0)


def weights(content: dict[str, Any]) -> dict[str, Any]:
    return content["groups"]["weights"]


def first(content: dict[str, Any], name: str) -> dict[str, Any]:
    return weights(content)[name]["pieces"][0]


def renamed(content: dict[str, Any], name: str) -> None:
    """Name a file otherwise wherever the manifest speaks of it."""
    content["files"][name] = content["files"].pop("weights-00001.safetensors")
    for entry in weights(content).values():
        for piece in entry["pieces"]:
            piece["file"] = piece["file"].replace("weights-00001.safetensors", name)


@pytest.mark.parametrize(("change", "message"), [
    (lambda c: weights(c)["norm"].update(dtype="F8_E4M3"), "weights norm: dtype 'F8_E4M3'; it must be one of"),
    (lambda c: weights(c)["empty"].update(shape=[1 << 70, 0]), "weights empty: is empty and not in one piece"),
    (lambda c: weights(c)["empty"].update(pieces=[]), "weights empty: is empty and not in one piece"),
    (lambda c: [entry.update(shape=[1 << 70, 0]) for entry in (weights(c)["empty"], first(c, "empty"))],
     "weights-00000.safetensors: holds other tensors than the manifest says .empty."),
    (lambda c: weights(c).update(x=weights(c)["norm"]), "weights-00001.safetensors: holds other tensors .*x"),
    (lambda c: weights(c).pop("norm"), "weights-00001.safetensors: holds other tensors .*norm"),
    (lambda c: weights(c)["rows"].update(pieces=[{**first(c, "rows"), "shape": [12, 5]}]), "other tensors .*rows"),
    (lambda c: first(c, "norm").update(file="rng-00000.safetensors"), "00000.safetensors', which is no file of weights"),
    (lambda c: c.update(version=1), "file 'weights-00000.safetensors'; the files must be those of the groups"),
    (lambda c: renamed(c, "weights-1.safetensors"), "file 'weights-1.safetensors'; the files must be those"),
    (lambda c: renamed(c, "weights-000001.safetensors"), "file 'weights-000001.safetensors'; the files must be those"),
    (lambda c: renamed(c, "weights-٠٠٠٠١.safetensors"), "file 'weights-٠٠٠٠١.safetensors'; the files must be those"),
    (lambda c: renamed(c, "weights-00001.safetensors\n"), "00001.safetensors.n'; the files must be those"),
    (lambda c: c["files"].pop("weights-00001.safetensors"), "00001.safetensors'; the files must be those"),
    (lambda c: c["files"].update({"weights-00007.safetensors": c["files"]["record.json"]}), "'weights-00007.safetensors'"),
])
def test_what_a_forged_manifest_may_not_say(tmp_path: Path, change: Any, message: str) -> None:
    save(tmp_path, 5, 2)
    forge(tmp_path / "step-00000005", change)
    with pytest.raises(CheckpointError, match=message):
        CheckpointStore(tmp_path).open(5)


def test_all_tensors_that_a_manifest_lies_about_are_named(tmp_path: Path) -> None:
    save(tmp_path, 5, 2)

    def change(content: dict[str, Any]) -> None:
        for name in ("rows", "columns"):
            weights(content)[name]["pieces"].pop()

    forge(tmp_path / "step-00000005", change)
    with pytest.raises(CheckpointError) as caught:
        CheckpointStore(tmp_path).open(5)
    assert len(caught.value.faults) == 2
    assert ["rows" in caught.value.faults[0], "columns" in caught.value.faults[1]] == [True, True]
