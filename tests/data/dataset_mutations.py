"""Five hundred ways to damage the files of a dataset, and a campaign that opens each of them."""

from __future__ import annotations

import os
import random
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_ttl.data.index_file import HEADER, MAGIC
from megatron_ttl.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from megatron_ttl.data.manifest import Description, TokenizerRecord
from megatron_ttl.errors import DataError

COUNT = 500
DOCUMENTS = 64
EOS = 2
_COUNTS_AT = 18  # where the header counts sequences and document boundaries
_DESCRIPTION = Description(text_bytes=1, tokenizer=TokenizerRecord(
    directory="a.tokenizer", checksum="sum", vocab_size=500, eos_id=EOS, bos_id=1))

Files = dict[str, bytes]


@dataclass(frozen=True)
class Mutation:
    """One damage."""

    name: str
    structural: bool
    """Whether the files contradict the format or each other: then it shows without a manifest too."""
    files: Files = field(default_factory=dict)
    """New content by suffix."""
    act: Callable[[Path], None] | None = None
    """What is done to the prefix besides, e.g. a pipe put in place of a file."""


def write_dataset(prefix: Path, documents: list[np.ndarray], dtype: str = "uint16") -> Files:
    """Write documents and return the files by suffix."""
    with IndexedDatasetWriter(prefix, dtype, 500, EOS) as writer:
        for ids in documents:
            writer.add_document(ids)
        writer.finish(_DESCRIPTION)
    return {suffix: Path(f"{prefix}{suffix}").read_bytes() for suffix in (".bin", ".idx", ".json")}


def originals(folder: Path) -> tuple[Files, dict[str, Files]]:
    """Write a dataset, and five others whose files could be mistaken for its own."""
    draw = np.random.default_rng(0)

    def some(count: int, lengths: np.ndarray | None = None) -> list[np.ndarray]:
        lengths = draw.integers(1, 40, count) if lengths is None else lengths
        return [np.append(draw.integers(4, 500, length), EOS) for length in lengths]

    documents = some(DOCUMENTS)
    others = {"shorter": some(DOCUMENTS - 7), "longer": some(DOCUMENTS + 9), "reversed": documents[::-1],
              "of equal lengths": some(DOCUMENTS, np.array([len(ids) - 1 for ids in documents]))}
    written = {name: write_dataset(folder / name, texts) for name, texts in others.items()}
    written["of wider ids"] = write_dataset(folder / "wide", documents, "int32")
    return write_dataset(folder / "a", documents), written


def mutations(files: Files, others: dict[str, Files], seed: int) -> list[Mutation]:
    """Return `COUNT` different mutations of a dataset: a function of the arguments alone."""
    draw = random.Random(seed)
    found, seen = [], {tuple(sorted(files.items()))}
    for mutation in [*_headers(files), *_entries(files), *_swaps(files, others), *_places(), *_cuts(files, draw),
                     *_flips(files, draw)]:
        key = tuple(sorted({**files, **mutation.files}.items()))
        if mutation.act or key not in seen:
            seen.add(key)
            found.append(mutation)
    assert len(found) >= COUNT, len(found)
    return found[:COUNT]


def _headers(files: Files) -> Iterator[Mutation]:
    """Other magic, version and type; counts that no file can hold, that wrap around at 2^64, or that shift the arrays."""
    index, n = files[".idx"], DOCUMENTS
    for magic in (b"MMIDIDX\0\1", b"TNTIDX\0\0\0", bytes(9), b"\x1f\x8b\x08\0\0\0\0\0\0", b"mmididx\0\0"):
        yield Mutation(f"magic {magic!r}", True, {".idx": magic + index[9:]})
    for version in (0, 2, 2**32 + 1, 2**63, 2**64 - 1):
        yield Mutation(f"version {version}", True, {".idx": index[:9] + struct.pack("<Q", version) + index[17:]})
    for code in (0, 1, 2, 3, 4, 5, 6, 7, 9, 255):  # 3, int16, has the same size: legal but for the manifest
        yield Mutation(f"type {code}", code != 3, {".idx": index[:17] + bytes([code]) + index[18:]})
    pairs = [(count, n + 1) for count in (0, 1, n - 1, n + 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - n, 2**64 - 1)]
    pairs += [(n, count) for count in (0, 1, n, n + 2, 2**31, 2**63 - 1, 2**63, 2**64 - 1)]
    pairs += [(n + 2**62, n + 1), (n, n + 1 + 2**61), (n + 2, n - 2), (n - 2, n + 4), (0, 0), (0, 1), (2**63, 2**63 + 1),
              (2**64 - 1, 2**64 - 1)]
    for pair in pairs:
        counts = struct.pack("<QQ", *pair)
        yield Mutation(f"counts {pair}", True, {".idx": index[:_COUNTS_AT] + counts + index[HEADER.size :]})


def _arrays(index: bytes) -> list[np.ndarray]:
    """Return lengths, pointers and boundaries of an index, to be changed."""
    count, boundary_count = struct.unpack_from("<QQ", index, _COUNTS_AT)
    return [np.frombuffer(index, "<i4", count, HEADER.size).copy(),
            np.frombuffer(index, "<i8", count, HEADER.size + 4 * count).copy(),
            np.frombuffer(index, "<i8", boundary_count, HEADER.size + 12 * count).copy()]


def _index(lengths: np.ndarray, pointers: np.ndarray, boundaries: np.ndarray) -> bytes:
    return (HEADER.pack(MAGIC, 1, 8, len(lengths), len(boundaries)) + lengths.tobytes() + pointers.tobytes()
            + boundaries.tobytes())


def _is_legal(boundaries: np.ndarray) -> bool:
    """Say whether boundaries are one of the valid ways to group the sequences: then only the manifest knows better."""
    return bool(boundaries[0] == 0 and boundaries[-1] == DOCUMENTS and (boundaries[1:] >= boundaries[:-1]).all())


def _entries(files: Files) -> Iterator[Mutation]:
    """Entries of the three arrays: absurd, exchanged, shifted; and indices that are legal, but others."""
    names, absurd = ("length", "pointer", "boundary"), (-(2**31), -1, 0, 1, 2**31 - 1, 2**63 - 1)
    for which, name in enumerate(names):
        for place in (0, 1, DOCUMENTS // 2, DOCUMENTS - 1):
            for value in absurd[:-1] if which == 0 else absurd:
                arrays = _arrays(files[".idx"])
                arrays[which][place] = value
                structural = which < 2 or not _is_legal(arrays[2])
                yield Mutation(f"{name} {place} is {value}", structural, {".idx": _index(*arrays)})
        arrays = _arrays(files[".idx"])
        arrays[which] = arrays[which][::-1]
        yield Mutation(f"every {name} reversed", True, {".idx": _index(*arrays)})
        arrays = _arrays(files[".idx"])
        arrays[which][[20, 21]] = arrays[which][[21, 20]]
        yield Mutation(f"{name} 20 and 21 exchanged", True, {".idx": _index(*arrays)})
    for shift in (-1, 1, 2, 4096):
        arrays = _arrays(files[".idx"])
        arrays[1] += shift
        yield Mutation(f"pointers shifted by {shift}", True, {".idx": _index(*arrays)})
    for place in (0, 10, 62):  # an id is given from one document to the next
        lengths, pointers, boundaries = _arrays(files[".idx"])
        lengths[place] += 1
        lengths[place + 1] -= 1
        pointers[place + 1] += 2
        yield Mutation(f"the border behind document {place} moved", bool(lengths[place + 1] == 0),
                       {".idx": _index(lengths, pointers, boundaries)})
    for place in (1, 30, 63):
        lengths, pointers, boundaries = _arrays(files[".idx"])
        yield Mutation(f"documents {place - 1} and {place} are one", False,
                       {".idx": _index(lengths, pointers, np.delete(boundaries, place))})


def _swaps(files: Files, others: dict[str, Files]) -> Iterator[Mutation]:
    """Files of other datasets, of each other, in another byte order, empty."""
    for name, other in others.items():
        fits = name in ("reversed", "of equal lengths")
        for suffix in (".bin", ".idx"):
            yield Mutation(f"{suffix} of one {name}", not fits, {suffix: other[suffix]})
        yield Mutation(f"both files of one {name}", False, {".bin": other[".bin"], ".idx": other[".idx"]})
    yield Mutation("swapped", True, {".bin": files[".idx"], ".idx": files[".bin"]})
    yield Mutation("the manifest as .idx", True, {".idx": files[".json"]})
    yield Mutation("the manifest as .bin", True, {".bin": files[".json"]})
    yield Mutation(".idx twice", True, {".bin": files[".idx"]})
    yield Mutation(".bin twice", True, {".idx": files[".bin"]})
    yield Mutation("empty .bin", True, {".bin": b""})
    yield Mutation("empty .idx", True, {".idx": b""})
    yield Mutation("both empty", True, {".bin": b"", ".idx": b""})
    yield Mutation("big-endian ids", False, {".bin": np.frombuffer(files[".bin"], "<u2").astype(">u2").tobytes()})
    swapped = [array.byteswap().tobytes() for array in _arrays(files[".idx"])]
    yield Mutation("big-endian index", True, {".idx": files[".idx"][: HEADER.size] + b"".join(swapped)})


def _places() -> Iterator[Mutation]:
    """What is no file in place of a file, and files that are larger than any memory."""
    for suffix in (".bin", ".idx"):
        def put(how: Callable[[Path], object], suffix: str = suffix) -> Callable[[Path], None]:
            def act(prefix: Path) -> None:
                path = Path(f"{prefix}{suffix}")
                path.unlink()
                how(path)
            return act

        yield Mutation(f"no {suffix}", True, act=put(lambda path: None))
        yield Mutation(f"{suffix} is a folder", True, act=put(Path.mkdir))
        yield Mutation(f"{suffix} is a pipe", True, act=put(os.mkfifo))
        yield Mutation(f"{suffix} leads nowhere", True, act=put(lambda path: path.symlink_to("nowhere")))
        yield Mutation(f"{suffix} leads to itself", True, act=put(lambda path: path.symlink_to(path.name)))
        yield Mutation(f"{suffix} leads to a device", True, act=put(lambda path: path.symlink_to("/dev/zero")))
        other = ".idx" if suffix == ".bin" else ".bin"
        yield Mutation(f"{suffix} leads to {other}", True,
                       act=put(lambda path, other=other: path.symlink_to(path.with_suffix(other).name)))
        yield Mutation(f"{suffix} of a terabyte", True,
                       act=lambda prefix, suffix=suffix: os.truncate(f"{prefix}{suffix}", 1 << 40))


def _cuts(files: Files, draw: random.Random) -> Iterator[Mutation]:
    """Bytes that are missing at the end, in the middle or at the begin, or too many there."""
    borders = [9, 17, 18, 26, 34, 34 + 4 * DOCUMENTS, 34 + 12 * DOCUMENTS, len(files[".idx"])]
    for suffix in (".bin", ".idx"):
        payload = files[suffix]
        ends = {1, 2, 4, 8, len(payload) - 1, len(payload) - 2, len(payload) - 8, len(payload) // 2}
        ends |= {end + more for end in borders for more in (-1, 0, 1)} if suffix == ".idx" else set()
        ends |= {draw.randrange(1, len(payload)) for _ in range(30)}
        for end in sorted(end for end in ends if end < len(payload)):
            yield Mutation(f"{suffix} cut to {end} bytes", True, {suffix: payload[:end]})
        for more in (1, 2, 3, 4, 8, 20, 4096):
            yield Mutation(f"{suffix} and {more} bytes more", True, {suffix: payload + draw.randbytes(more)})
        for width in (1, 2, 8):
            for place in (0, draw.randrange(1, len(payload) - width)):
                inserted = payload[:place] + draw.randbytes(width) + payload[place:]
                yield Mutation(f"{suffix}: {width} bytes inserted at {place}", True, {suffix: inserted})
                yield Mutation(f"{suffix}: {width} bytes lost at {place}", True,
                               {suffix: payload[:place] + payload[place + width :]})


def _flips(files: Files, draw: random.Random) -> Iterator[Mutation]:
    """Bits flipped in header, lengths, pointers, boundaries and ids, in turn; and stretches of zeros among the ids."""
    index, ids = files[".idx"], files[".bin"]
    borders = [0, HEADER.size, HEADER.size + 4 * DOCUMENTS, HEADER.size + 12 * DOCUMENTS, len(index)]
    parts = list(zip(("header", "lengths", "pointers", "boundaries"), borders, borders[1:], strict=False))
    for _ in range(40):
        for name, begin, end in parts:
            place, bit = draw.randrange(begin, end), draw.randrange(8)
            changed = index[:place] + bytes([index[place] ^ 1 << bit]) + index[place + 1 :]
            structural = name != "boundaries" or not _is_legal(_arrays(changed)[2])
            yield Mutation(f"{name}: bit {bit} of byte {place}", structural, {".idx": changed})
        place, bit = draw.randrange(len(ids)), draw.randrange(8)
        yield Mutation(f"ids: bit {bit} of byte {place}", False,
                       {".bin": ids[:place] + bytes([ids[place] ^ 1 << bit]) + ids[place + 1 :]})
        place, width = draw.randrange(len(ids) - 512), draw.choice((2, 64, 512))
        yield Mutation(f"ids: {width} zeros at {place}", False, {".bin": ids[:place] + bytes(width) + ids[place + width :]})


def open_all(folder: Path, seed: int) -> list[str]:
    """Open every mutation with and without its manifest; return what was not as it must be.

    With a manifest each is refused, and without one each that is structural; what else opens can be read. None takes a
    second of work.
    """
    files, others = originals(folder)
    faults = []
    for number, mutation in enumerate(mutations(files, others, seed)):
        for has_manifest in (True, False):
            prefix = folder / f"{number}-{has_manifest}" / "a"
            prefix.parent.mkdir()
            for suffix, payload in {**files, **mutation.files}.items():
                if has_manifest or suffix != ".json":
                    Path(f"{prefix}{suffix}").write_bytes(payload)
            if mutation.act:
                mutation.act(prefix)
            begun = time.process_time()
            refused = _refused(prefix)
            if time.process_time() - begun > 1:
                faults.append(f"{mutation.name}: took {time.process_time() - begun:.1f} s")
            if not refused and (has_manifest or mutation.structural):
                faults.append(f"{mutation.name}: opened with{'' if has_manifest else 'out'} a manifest")
            shutil.rmtree(prefix.parent)
    return faults


def _refused(prefix: Path) -> bool:
    try:
        dataset = IndexedDataset(prefix)
        read = sum(len(dataset.document(number)) for number in range(dataset.document_count))
        assert read == dataset.token_count == dataset.document_ends()[-1]
    except DataError as error:
        assert all(f"{prefix}." in fault and fault.count(";") >= 2 for fault in error.faults), error.faults
        return True
    return False
