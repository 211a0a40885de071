"""Write safetensors files: the library's own bytes, but streamed, hashed on the way, of a size known before.

The library's `save_file` hides what the disk said (its error is no OSError and has no errno), makes files
that only their owner can read, and leaves hashing to a second pass. Reading is the library's.

Source: https://huggingface.co/docs/safetensors/index (8 bytes length of the header, little-endian; the
header, JSON padded with spaces to 8 bytes; the tensors' bytes, end to end).
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_ttl.files import open_regular

# In the order of the format's own enumeration: later ones come first in a file, so tensors are aligned.
_DTYPES = {torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.float16: "F16",
           torch.bfloat16: "BF16", torch.int32: "I32", torch.float32: "F32", torch.float64: "F64",
           torch.int64: "I64"}
TORCH_DTYPES = {name: dtype for dtype, name in _DTYPES.items()}
"""The format's names of the dtypes that are written and read here."""
_RANK = {dtype: rank for rank, dtype in enumerate(_DTYPES)}
_BLOCK_BYTES = 16 << 20
_BLOCKS_IN_MEMORY = 4
MAX_HEADER_BYTES = 4 << 20
"""Enough for 30,000 tensors; the library would take 100 MB and need a gigabyte for them."""


def dtype_name(dtype: torch.dtype) -> str:
    """Return the format's name of a dtype."""
    return _DTYPES[dtype]


def encoded_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> int:
    """Return the size of the file that `write_tensors` would write."""
    return len(_header(tensors, metadata)) + sum(tensor.nbytes for tensor in tensors.values())


def write_tensors(path: Path, tensors: Mapping[str, Tensor],
                  metadata: Mapping[str, str] | None = None) -> str:
    """Write a new safetensors file, wait until the disk has it, and return its checksum.

    Args:
        path: must not exist.
        tensors: on any device, contiguous or not; brought to the host one at a time.
        metadata: texts for the header.

    Returns:
        What `files.checksum` would give: computed from memory, so it also finds what goes wrong on the way.

    Raises:
        OSError: what the disk said.
    """
    digest = xxhash.xxh3_128()
    hashing: deque[Future[None]] = deque()
    # Hashed while the disk works: one after the other it was up to a fifth of the time of a save.
    with open(path, "xb") as handle, ThreadPoolExecutor(1, thread_name_prefix="checksum") as behind:
        for block in _blocks(tensors, metadata):
            hashing.append(behind.submit(digest.update, block))
            handle.write(block)
            if len(hashing) > _BLOCKS_IN_MEMORY:
                hashing.popleft().result()
        handle.flush()
        os.fsync(handle.fileno())
        while hashing:
            hashing.popleft().result()
    return f"xxh3:{digest.hexdigest()}"


def open_tensors(path: Path) -> safe_open:
    """Open a file of tensors that someone else may have written, to read on the CPU; a context manager.

    The library is asked only after a look at the length of the header, and never to open a pipe or a device.

    Raises:
        OSError: it is no regular file, or cannot be opened.
        SafetensorError: it is no safetensors file.
    """
    descriptor = open_regular(path)
    with open(descriptor, "rb") as handle:
        size, header = os.fstat(descriptor).st_size, int.from_bytes(handle.read(8), "little")
    if not 2 <= header <= min(size - 8, MAX_HEADER_BYTES):
        raise SafetensorError(f"it says that its header has {header:,} bytes; the file has {size:,}, and a header at "
                              f"most {MAX_HEADER_BYTES:,}")
    return safe_open(path, framework="pt", device="cpu")


def _file_order(tensors: Mapping[str, Tensor]) -> list[str]:
    return sorted(tensors, key=lambda name: (-_RANK[tensors[name].dtype], name))


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in _file_order(tensors):
        tensor = tensors[name]
        end = offset + tensor.nbytes
        entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape),
                         "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _blocks(tensors: Mapping[str, Tensor],
            metadata: Mapping[str, str] | None) -> Iterator[memoryview | bytes]:
    yield _header(tensors, metadata)
    for name in _file_order(tensors):
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        payload = memoryview(flat.view(torch.uint8).numpy())
        for start in range(0, len(payload), _BLOCK_BYTES):
            yield payload[start : start + _BLOCK_BYTES]
