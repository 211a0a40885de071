"""The writer puts whole datasets in place or nothing; the reader trusts neither files nor manifest."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from patience import patient

from megatron_ttl.data.index_file import HEADER, MAGIC
from megatron_ttl.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter, token_dtype
from megatron_ttl.data.manifest import Description, TokenizerRecord, dataset_paths
from megatron_ttl.errors import DataError, DiskError

EOS = 2
DESCRIPTION = Description(text_bytes=100, tokenizer=TokenizerRecord(
    directory="a.tokenizer", checksum="sum", vocab_size=500, eos_id=EOS, bos_id=1))


def some_documents(count=40, seed=0, longest=30):
    draw = np.random.default_rng(seed)
    return [np.append(draw.integers(4, 500, draw.integers(0, longest)), EOS) for _ in range(count)]


def writer_of(prefix, **options):
    return IndexedDatasetWriter(prefix, "uint16", 500, EOS, **options)


def write(prefix, texts, description=DESCRIPTION, **options):
    with writer_of(prefix, **options) as writer:
        for ids in texts:
            writer.add_document(ids)
        writer.finish(description)
    return prefix


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def same(dataset, texts):
    found = [dataset.document(number) for number in range(dataset.document_count)]
    return len(found) == len(texts) and all(map(np.array_equal, found, texts))


def test_types_are_chosen_as_megatron_chooses_them():
    """The bound is 65,500, not 65,536."""
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    for size in (350, 32_000, 65_499, 65_500, 65_536, 100_000):
        assert token_dtype(size) == megatron.DType.optimal_dtype(size).__name__


def test_documents_at_once_are_documents_one_by_one(tmp_path):
    """The same files; a fault names the document by its number, and nothing of the call is kept."""
    texts = some_documents()
    write(tmp_path / "one", texts)
    with writer_of(tmp_path / "all") as writer:
        for part in (texts[:1], texts[1:1], texts[1:]):
            writer.add_documents(np.concatenate([*part, np.empty(0, np.int64)]), [*map(len, part)])
        with pytest.raises(DataError, match="all: document 42 holds EOS .* 0 times and ends with id 9"):
            writer.add_documents(np.array([7, EOS, EOS, 9, 9, 8, EOS]), [2, 1, 2, 2])
        writer.finish(DESCRIPTION)
    for suffix in (".bin", ".idx", ".json"):
        assert Path(f"{tmp_path}/one{suffix}").read_bytes() == Path(f"{tmp_path}/all{suffix}").read_bytes()


@pytest.mark.parametrize(("ids", "lengths", "message"), [
    (np.broadcast_to(np.uint16(5), 2**31), [2**31], "document 0 has 2,147,483,648 tokens; a sequence has"),
    (np.array([EOS]), [1, 0], "document 1 has no tokens; it must have at least its EOS"),
    (np.array([2**63, EOS], np.uint64), [2], "document 0 holds id 9223372036854775808"),
    (np.array([True, False]), [2], "ids of type bool; they must be integers"),
])
def test_what_the_format_cannot_hold_is_refused(tmp_path, ids, lengths, message):
    """Too long for an int32, empty, too large for 64 bits, no numbers; at once and without copying."""
    tracemalloc.start()
    with writer_of(tmp_path / "a") as writer, pytest.raises(DataError, match=message):
        writer.add_documents(ids, lengths)
    assert tracemalloc.get_traced_memory()[1] < 16e6
    tracemalloc.stop()
    assert names(tmp_path) == []


def test_several_sequences_make_a_document(tmp_path):
    """Megatron splits documents into sentences, and may close one without any: read as it meant them."""
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    import torch

    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=np.int32)
    for document in ([[5, 6], [7]], [], [[8, 9, 10]], [[11], [12], [13, 14]]):
        for sentence in document:
            builder.add_item(torch.tensor(sentence))
        builder.end_document()
    builder.finalize(str(tmp_path / "a.idx"))
    dataset = IndexedDataset(tmp_path / "a")
    assert same(dataset, [[5, 6, 7], [], [8, 9, 10], [11, 12, 13, 14]])
    assert (dataset.document_count, dataset.sequence_count, dataset.dtype) == (4, 6, np.int32)
    assert dataset.document_ends().tolist() == [3, 3, 6, 10]


def test_multimodal_data_is_refused(tmp_path):
    """One byte more per sequence and no flag in the header: said by name, not read as damage."""
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    import torch

    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=np.uint16, multimodal=True)
    builder.add_item(torch.tensor([5, 6]), mode=1)
    builder.end_document()
    builder.finalize(str(tmp_path / "a.idx"))
    with pytest.raises(DataError, match="a.idx: has one byte too many per sequence, as multimodal data has"):
        IndexedDataset(tmp_path / "a")


def test_leaving_without_finish_leaves_nothing(tmp_path):
    """An exception, an early end, abort() twice: the folder is as before."""
    with pytest.raises(ZeroDivisionError), writer_of(tmp_path / "a") as writer:
        writer.add_document([5, EOS])
        raise ZeroDivisionError
    with writer_of(tmp_path / "a") as writer:
        writer.add_document([5, EOS])
    writer.abort()
    assert names(tmp_path) == []


def test_an_existing_dataset_is_replaced_only_when_asked(tmp_path):
    """Until then it is whole; who has it open keeps what he opened."""
    old, new = some_documents(seed=1), some_documents(seed=2)
    write(tmp_path / "a", old)
    with pytest.raises(DataError, match="a.bin: exists already; a dataset is not overwritten unasked"):
        writer_of(tmp_path / "a")
    opened = IndexedDataset(tmp_path / "a")
    with writer_of(tmp_path / "a", overwrite=True) as writer:
        for ids in new:
            writer.add_document(ids)
        assert same(IndexedDataset(tmp_path / "a", verify=True), old)
        writer.finish(DESCRIPTION)
    assert same(IndexedDataset(tmp_path / "a", verify=True), new) and same(opened, old)
    write(tmp_path / "a", old, None, overwrite=True)
    assert names(tmp_path) == ["a.bin", "a.idx"], "the manifest of the old data is gone"


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_index_never_stands_beside_other_ids(tmp_path, monkeypatch, overwrite):
    """The folder after every change of a name, as a crash there would leave it: whole, or no dataset."""
    old, new = some_documents(seed=1), some_documents(seed=2)
    if overwrite:
        write(tmp_path / "a", old)
    states = []

    def look(result, *_):
        copy = tmp_path.parent / f"{tmp_path.name}-{len(states)}"
        shutil.copytree(tmp_path, copy)
        states.append(copy)
        return result

    replace, unlink = os.replace, Path.unlink
    monkeypatch.setattr(os, "replace", lambda *names: look(replace(*names)))
    monkeypatch.setattr(Path, "unlink", lambda path, **options: look(unlink(path, **options)))
    write(tmp_path / "a", new, overwrite=overwrite)
    monkeypatch.undo()
    outcomes = []
    for copy in states:
        try:
            dataset = IndexedDataset(copy / "a", verify=True)
        except DataError as error:
            assert "does not exist" in str(error)
            outcomes.append("none")
        else:
            outcomes.append("old" if same(dataset, old) else "new")
            assert outcomes[-1] == "old" or same(dataset, new)
    assert len(outcomes) >= 4 and outcomes[-1] == "new"
    assert outcomes == sorted(outcomes, key=["old", "none", "new"].index)


def test_two_processes_do_not_write_one_dataset(tmp_path):
    """The second is refused; what a killed one left is taken over."""
    program = (
        "import sys, time\n"
        "from megatron_ttl.data.indexed_dataset import IndexedDatasetWriter\n"
        "writer = IndexedDatasetWriter(sys.argv[1], 'uint16', 500, 2)\n"
        "writer.add_documents([7, 2] * 1_000_000, [2] * 1_000_000)\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "a")], stdout=subprocess.PIPE,
                             text=True)
    assert other.stdout.readline() == "ready\n"
    with pytest.raises(DataError, match="another process is writing this dataset"):
        writer_of(tmp_path / "a")
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    assert names(tmp_path) == [".a.bin.partial"] and os.path.getsize(tmp_path / ".a.bin.partial") > 1_000_000
    texts = some_documents()
    assert same(IndexedDataset(write(tmp_path / "a", texts), verify=True), texts)
    assert names(tmp_path) == ["a.bin", "a.idx", "a.json"]


@pytest.mark.parametrize("limit", [1_000, 60_000, 130_000])
def test_a_full_disk_is_one_fault_and_leaves_nothing(tmp_path, limit):
    """A disk that takes so many bytes per file: no ids, not all ids, all ids but not the index."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(DiskError, match=r"a: the disk took no more after \d+"):  # noqa: SIM117
            with writer_of(tmp_path / "a") as writer:
                for _ in range(10):  # 120,000 bytes of ids, 400,050 bytes of index
                    writer.add_documents([7, 8, EOS] * 2_000, [3] * 2_000)
                writer.finish(DESCRIPTION)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == []


def flipped(payload, place, draw):
    return payload[:place] + bytes([payload[place] ^ 1 << draw.randrange(8)]) + payload[place + 1 :]


def test_flipped_ids_are_found(tmp_path):
    """Sixty flips in the payload: opening and verifying name the file each time; to look at the damage one may open it."""
    write(tmp_path / "a", some_documents(200))
    path, draw = tmp_path / "a.bin", random.Random(1)
    payload = path.read_bytes()
    for _ in range(60):
        place = draw.randrange(len(payload))
        path.write_bytes(flipped(payload, place, draw))
        assert not IndexedDataset(tmp_path / "a", verify=False).verified
        for verify in (None, True):
            with pytest.raises(DataError, match="a.bin: its checksum is xxh3:[0-9a-f]{32}; the manifest a.json says xxh3:"):
                IndexedDataset(tmp_path / "a", verify=verify)


def test_files_of_two_datasets_do_not_pass_for_one(tmp_path):
    """The same documents in another order: equal sizes, equal counts, another index."""
    texts = some_documents()
    write(tmp_path / "a", texts)
    write(tmp_path / "b", texts[::-1])
    shutil.copy(tmp_path / "b.idx", tmp_path / "a.idx")
    with pytest.raises(DataError, match="a.idx: checksum: xxh3:.*; the manifest a.json says xxh3:"):
        IndexedDataset(tmp_path / "a")


@pytest.mark.parametrize(("lengths", "pointers", "boundaries", "message"), [
    ([3, 0, 2], [0, 6, 6], [0, 1, 2, 3], "a.idx: sequence 1 has 0 tokens; every one has at least one"),
    ([3, -1, 3], [0, 6, 4], [0, 1, 2, 3], "a.idx: sequence 1 has -1 tokens"),
    ([3, 1, 1], [0, 8, 6], [0, 1, 2, 3], "a.idx: sequence 1 points to byte 8, not to the end of the one"),
    ([3, 1, 1], [2, 6, 8], [0, 1, 2, 3], "a.idx: sequence 0 points to byte 2"),
    ([3, 1, 1], [0, 6, 8], [0, 2, 1, 3], r"a.idx: document 1 ends before it begins \(sequences 2 to 1\)"),
    ([3, 1, 1], [0, 6, 8], [1, 2, 3, 3], "a.idx: its documents span the sequences 1 to 3; they must span 0"),
    ([3, 1, 1], [0, 6, 8], [0, 1, 2, 4], "a.idx: its documents span the sequences 0 to 4; they must span 0"),
    ([3, 1, 2], [0, 6, 8], [0, 1, 2, 3], "a.bin: ends 2 bytes early; its index a.idx counts 6 tokens, 12"),
    ([1, 1, 1], [0, 2, 4], [0, 1, 2, 3], "a.bin: has 4 bytes too many; its index a.idx counts 3 tokens"),
])
def test_an_index_that_contradicts_itself_is_refused(tmp_path, lengths, pointers, boundaries, message):
    """Without a manifest to help: the first wrong entry is named."""
    arrays = (np.array(lengths, "<i4"), np.array(pointers, "<i8"), np.array(boundaries, "<i8"))
    header = HEADER.pack(MAGIC, 1, 8, len(lengths), len(boundaries))
    (tmp_path / "a.idx").write_bytes(header + b"".join(array.tobytes() for array in arrays))
    (tmp_path / "a.bin").write_bytes(bytes(10))
    with pytest.raises(DataError, match=message):
        IndexedDataset(tmp_path / "a")


def changed(value, *keys, to):
    inner = value
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = to
    return value


@pytest.mark.parametrize(("change", "message"), [
    (lambda m: changed(m, "tokens", to=3), r"a.idx: tokens: \d+; the manifest a.json says 3"),
    (lambda m: changed(m, "documents", to=3), "a.idx: documents: 40; the manifest a.json says 3"),
    (lambda m: changed(m, "dtype", to="int32"), "a.idx: type of an id: uint16; .* a.json says int32"),
    (lambda m: changed(m, "bin", "bytes", to=3), r"a.bin: bytes: \d+; the manifest a.json says 3"),
    (lambda m: changed(m, "dtype", to="float32"), "a.json: dtype: Input should be 'uint16' or 'int32'"),
    (lambda m: changed(m, "tokens", to="many"), "a.json: tokens: Input should be a valid integer"),
    (lambda m: changed(m, "version", to=2), "a.json: has version 2; this program reads version 1"),
    (lambda m: changed(m, "format", to="?"), "a.json: is no manifest"),
    (lambda m: changed(m, "colour", to="red"), "a.json: colour: Extra inputs are not permitted"),
    (lambda m: {key: m[key] for key in m if key != "tokenizer"}, "a.json: tokenizer: Field required"),
    (lambda m: [m], "a.json: is no manifest"),
])
def test_a_manifest_that_lies_is_caught(tmp_path, change, message):
    """About the files, or about itself: the field is named."""
    path = dataset_paths(write(tmp_path / "a", some_documents())).manifest
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(DataError, match=message):
        IndexedDataset(tmp_path / "a")


def test_any_damage_to_a_manifest_is_a_fault(tmp_path):
    """A hundred and fifty cuts and flips: refused by name, or harmless to what the files are checked with."""
    texts = some_documents()
    path = dataset_paths(write(tmp_path / "a", texts)).manifest
    payload, draw, refused = path.read_bytes(), random.Random(2), 0
    damaged = [payload[: draw.randrange(len(payload) - 2)] for _ in range(40)]
    damaged += [b"", b"\xff\xfe", b"[" * 100_000]
    for _ in range(110):
        damaged.append(flipped(payload, draw.randrange(len(payload)), draw))
    for content in damaged:
        path.write_bytes(content)
        try:
            assert same(IndexedDataset(tmp_path / "a"), texts)
        except DataError as error:
            assert "a.json" in str(error)
            refused += 1
    assert refused > 120


def test_opening_takes_neither_time_nor_memory(tmp_path):
    """Three million documents: a fraction of a second, and blocks of memory instead of copies."""
    with writer_of(tmp_path / "a") as writer:
        for _ in range(10):
            writer.add_documents(np.tile(np.array([7, EOS], np.uint16), 300_000), [2] * 300_000)
        writer.finish(DESCRIPTION)
    tracemalloc.start()
    began = time.perf_counter()
    dataset = IndexedDataset(tmp_path / "a")
    assert time.perf_counter() - began < patient(1)
    assert tracemalloc.get_traced_memory()[1] < 24e6
    tracemalloc.stop()
    assert dataset.document_count == 3_000_000 and dataset.document(2_999_999).tolist() == [7, EOS]


def test_a_huge_manifest_is_not_read(tmp_path):
    """Another file under the manifest's name."""
    path = dataset_paths(write(tmp_path / "a", some_documents())).manifest
    os.truncate(path, 70 << 20)
    with pytest.raises(DataError, match="a.json: cannot be read .73,400,320 bytes, more than 4,194,304."):
        IndexedDataset(tmp_path / "a")
