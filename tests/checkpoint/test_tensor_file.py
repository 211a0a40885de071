from __future__ import annotations

import errno
import resource
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ttl.checkpoint.tensor_file import encoded_bytes, write_tensors
from megatron_ttl.files import checksum

DTYPES = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16,
          torch.bfloat16,
          torch.float32, torch.float64]


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__"),
                       st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)),
                       max_size=6),
       st.sampled_from([None, {"format": "pt"}]))
def test_bytes_are_the_librarys(tmp_path_factory: pytest.TempPathFactory, plan: dict,
                                metadata: dict | None) -> None:
    tensors = {name: torch.randint(0, 2, shape).to(dtype) for name, (dtype, shape) in plan.items()}
    path = tmp_path_factory.mktemp("file") / "x.safetensors"
    digest = write_tensors(path, tensors, metadata)
    assert path.read_bytes() == safetensors.torch.save(tensors, metadata)
    assert path.stat().st_size == encoded_bytes(tensors, metadata)
    assert checksum(path) == digest


def test_views_and_requires_grad_and_many_blocks(tmp_path: Path) -> None:
    big = torch.randn(6_000_000)
    tensors = {"transposed": torch.randn(4, 6).t(), "rows": torch.randn(9, 3)[2:5], "big": big,
               "parameter": torch.nn.Parameter(torch.randn(3))}
    write_tensors(tmp_path / "x", tensors)
    loaded = safetensors.torch.load_file(tmp_path / "x")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_an_existing_file_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    with pytest.raises(FileExistsError):
        write_tensors(tmp_path / "x", {})
    assert (tmp_path / "x").read_text() == "mine"


def test_what_the_disk_says_is_an_oserror(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError) as caught:
            write_tensors(tmp_path / "x", {"a": torch.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
