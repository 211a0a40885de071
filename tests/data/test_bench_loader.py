"""A dataset of 6.2 billion tokens opens at once, and its loader keeps up with any training; times are of the processor."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import xxhash

from megatron_ttl.data.bench_loader import measure_loader
from megatron_ttl.data.causal_lm_dataset import CausalLMDataset
from megatron_ttl.data.index_file import index_blocks
from megatron_ttl.data.manifest import DatasetManifest, FileRecord, TokenizerRecord, dump_manifest
from megatron_ttl.errors import ConfigError

TOKENS = 6_200_000_000
DOCUMENTS = 6_000_000

PROGRAM = """
import json, sys, time
begun = time.process_time()
from megatron_ttl.data.indexed_dataset import IndexedDataset
imported = time.process_time()
dataset = IndexedDataset(sys.argv[1])
opened = time.process_time()
status = dict(line.split(":") for line in open("/proc/self/status").read().splitlines())
print(json.dumps({"imports_s": imported - begun, "open_s": opened - imported, "tokens": dataset.token_count,
                  "peak_mb": int(status["VmHWM"].split()[0]) / 1000, "torch": "torch" in sys.modules}))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Iterator[str]:
    """12.4 GB of zeros that take no disk, and a real index and manifest."""
    folder = tmp_path_factory.mktemp("large")
    prefix = str(folder / "a")
    lengths = np.random.default_rng(0).integers(2, 2_000, DOCUMENTS).astype(np.int32)
    lengths[-1] += TOKENS - lengths.sum(dtype=np.int64)
    digest = xxhash.xxh3_128()
    with open(f"{prefix}.idx", "wb") as handle:
        for block in index_blocks(lengths, np.dtype("uint16")):
            handle.write(block)
            digest.update(block)
    Path(f"{prefix}.bin").touch()
    os.truncate(f"{prefix}.bin", 2 * TOKENS)
    manifest = DatasetManifest(
        dtype="uint16", documents=DOCUMENTS, tokens=TOKENS, text_bytes=4 * TOKENS,
        tokenizer=TokenizerRecord(directory="t", checksum="sum", vocab_size=500, eos_id=2, bos_id=1),
        bin=FileRecord(bytes=2 * TOKENS, checksum="xxh3:" + 32 * "0"),
        idx=FileRecord(bytes=os.path.getsize(f"{prefix}.idx"), checksum=f"xxh3:{digest.hexdigest()}"))
    Path(f"{prefix}.json").write_text(dump_manifest(manifest))
    yield prefix
    shutil.rmtree(folder)


def test_six_billion_tokens_open_at_once(large):
    """In a process of its own: half a second, and 200 MB of which 120 are the index, shared by all processes."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, large], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["tokens"] == TOKENS and not found["torch"]
    assert found["open_s"] < 0.5 and found["peak_mb"] < 200


def test_the_loader_keeps_up(large):
    """First batch within a second, 20 million tokens per second and core, and no step of a training of 1M tokens/s waits."""
    found = [measure_loader([large], samples_per_step=16, steps=60) for _ in range(2)]
    assert found[0]["open_s"] < 0.5 and found[0]["first_batch_s"] < 1
    assert max(result["tokens_per_s"] for result in found) > 20e6
    assert min(result["wait_ms_median"] for result in found) < 0.1


def test_numbers_that_measure_nothing_are_refused():
    """All at once."""
    with pytest.raises(ConfigError, match="--sequence-length: is 0; it must be above 0; leave it out") as caught:
        measure_loader(["none"], sequence_length=0, tokens_per_s=-1.0)
    assert len(caught.value.faults) == 2


def test_a_loader_that_is_too_slow_is_seen(large, monkeypatch):
    """The waits are those of the steps."""
    samples = CausalLMDataset.samples

    def slow(self, numbers):
        time.sleep(0.05)
        return samples(self, numbers)

    monkeypatch.setattr(CausalLMDataset, "samples", slow)
    found = measure_loader([large], steps=5)
    assert found["wait_ms_median"] > 20 and found["first_batch_s"] > 0.05
