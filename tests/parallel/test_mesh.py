"""What processes tell each other: sums on each axis, the largest, texts, and who failed first."""

from __future__ import annotations

import torch

from megatron_ttl.testing import run_distributed


def talk(mesh):
    mesh = mesh.cut(tensor=2, pipeline=2)
    value = torch.tensor([float(mesh.rank)])
    texts = mesh.gather_text("ção " * mesh.rank)
    return {"world": mesh.sum(mesh.rank, 1.0), "data": mesh.sum_data_parallel(mesh.rank),
            "stages": mesh.from_last_stage(None if mesh.place.pipeline == 0 else value, (1,)).tolist(), "tensor": mesh.sum_tensor_data_parallel(value).tolist(),
            "largest": mesh.largest(-mesh.rank), "any": [mesh.any(mesh.rank == 3), mesh.any(False)], "texts": texts,
            "first": mesh.first_to_fail()}


def test_eight_processes_agree():
    """Tensor 2 x pipeline 2 x data 2: ranks (tensor fastest, then data, then pipeline) 0 to 7."""
    results = run_distributed(talk, 8)
    for rank, found in enumerate(results):
        assert found["world"] == [28.0, 8.0] and found["largest"] == 0 and found["any"] == [True, False]
        assert found["data"] == found["tensor"] == [rank + (rank ^ 2)]
        assert found["stages"] == [rank | 4]
        assert found["texts"] == ["ção " * other for other in range(8)]
    assert sum(found["first"] for found in results) == 1, "one process is the first to fail"


def alone(mesh):
    return mesh.sum(2.5), mesh.largest(3), mesh.gather_text("é"), mesh.any(True), mesh.first_to_fail()


def test_one_process_needs_nobody():
    assert run_distributed(alone, 1) == [([2.5], 3.0, ["é"], True, True)]
