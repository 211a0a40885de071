"""The reader in the background: what it deals, how it ends, and that its failures are not swallowed."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from patience import patient

from megatron_ttl.data.causal_lm_dataset import CausalLMDataset
from megatron_ttl.data.indexed_dataset import IndexedDatasetWriter
from megatron_ttl.data.sampler import StepBatches, step_sample_ids
from megatron_ttl.errors import ConfigError


class Numbers:
    """A dataset whose samples are their own numbers; it can be slow, and fail at one of them."""

    def __init__(self, pause_s=0.0, fails_at=None):
        self.pause_s, self.fails_at, self.calls = pause_s, fails_at, 0

    def samples(self, numbers):
        self.calls += 1
        time.sleep(self.pause_s)
        if self.fails_at is not None and self.fails_at in numbers:
            raise OSError(f"sample {self.fails_at} cannot be read")
        column = np.repeat(np.asarray(numbers, np.int64)[:, None], 4, axis=1)
        return column, column + 1


def readers():
    return [thread for thread in threading.enumerate() if thread.name == "data-prefetch"]


def end_of_readers(wait_s=3.0):
    until = time.monotonic() + wait_s
    while readers() and time.monotonic() < until:
        time.sleep(0.01)
    return not readers()


def test_micro_batches_are_dealt_as_documented():
    """Micro batch m of rank r begins at p + (m * world_size + r) * b."""
    assert step_sample_ids(100, 12, 2, 1, 3).tolist() == [[102, 103], [108, 109]]
    with StepBatches(Numbers(), 12, 2, rank=1, world_size=3, consumed_samples=100) as batches:
        for step in range(3):
            micro_batches = next(batches)
            expected = step_sample_ids(100 + 12 * step, 12, 2, 1, 3)
            assert [ids[:, 0].tolist() for ids, _ in micro_batches] == expected.tolist()
            for ids, labels in micro_batches:
                assert ids.dtype == labels.dtype == torch.int64 and ids.shape == (2, 4)
                assert ids.is_contiguous() and labels.is_contiguous()
                assert torch.equal(labels, ids + 1)


@pytest.mark.parametrize("stages", [(), ((100 * 16, [0.2, 0.8]), (331 * 16, [1, 0]), (None, [1, 3]))])
def test_the_same_tokens_for_every_layout(tmp_path, stages):
    """Real samples over several epochs and stages: world sizes, micro batches, steps read ahead, ten points of resuming."""
    draw = np.random.default_rng(0)
    for name, count in (("a", 2_000), ("b", 700)):
        with IndexedDatasetWriter(tmp_path / name, "uint16", 500, 2) as writer:
            writer.add_documents(np.where(np.arange(count) % 10 == 9, 2, draw.integers(4, 500, count)),
                                 [10] * (count // 10))
            writer.finish()
    dataset = CausalLMDataset([(str(tmp_path / "a"), 0.6), (str(tmp_path / "b"), 0.4)], 16, seed=9,
                              stages=stages)
    steps, per_step = 10, 48
    assert min(dataset.epochs(steps * per_step)) > 2 and max(dataset.epochs(steps * per_step)) > 3
    every = torch.from_numpy(dataset.samples(range(steps * per_step))[0])
    wanted = every.split(per_step)
    for world_size in (1, 2, 3, 4, 6, 8):
        for micro_batch in (1, 2, 3, 6):
            if per_step % (world_size * micro_batch):
                continue
            for resumed in range(steps):
                step = torch.empty_like(wanted[0])
                for rank in range(world_size):
                    layout = (per_step, micro_batch, rank, world_size)
                    with StepBatches(dataset, *layout, consumed_samples=resumed * per_step,
                                     prefetch=(1, 2, 4)[resumed % 3]) as batches:
                        parts = [ids for ids, _ in next(batches)]
                    places = step_sample_ids(0, per_step, micro_batch, rank, world_size)
                    step[torch.from_numpy(places.ravel())] = torch.cat(parts)
                assert torch.equal(step, wanted[resumed])


@pytest.mark.parametrize(("samples", "message"), [
    (10, "10 cannot be dealt to 2 ranks in micro batches of 4; they must be a multiple of 8; take 8 or 16"),
    (4, "multiple of 8; take 8, or another micro batch"),
])
def test_a_step_that_cannot_be_dealt_is_refused(samples, message):
    """With the nearest numbers that can."""
    with pytest.raises(ConfigError, match=message):
        StepBatches(Numbers(), samples, 4, 0, 2, 0)


def test_no_more_is_read_ahead_than_asked():
    """With two steps ready and one in hand, the reader waits."""
    source = Numbers()
    with StepBatches(source, 4, 2, 0, 1, 0, prefetch=2):
        time.sleep(0.4)
        assert source.calls == 3


def test_waiting_is_measured():
    """A slow source is waited for; a ready step is not."""
    with StepBatches(Numbers(pause_s=0.2), 4, 2, 0, 1, 0) as batches:
        next(batches)
        assert batches.wait_s > 0.1
        time.sleep(0.5)
        next(batches)
        assert batches.wait_s < patient(0.05)


def test_a_failure_comes_after_the_steps_before_it_and_stays():
    """The steps before are handed out; then the error, each time one asks; the position does not move on."""
    with StepBatches(Numbers(fails_at=9), 4, 2, 0, 1, 0) as batches:
        next(batches), next(batches)
        for _ in range(2):
            with pytest.raises(OSError, match="sample 9 cannot be read"):
                next(batches)
        assert batches.consumed_samples == 8
    assert end_of_readers()


def test_closed_readers_are_gone():
    """close() twice, in the middle of a full queue; afterwards there are no more steps."""
    batches = StepBatches(Numbers(), 4, 2, 0, 1, 0)
    next(batches)
    batches.close()
    batches.close()
    assert not readers()
    assert list(batches) == []


def test_forgotten_readers_are_gone():
    """Nobody closed it; the thread must not keep it alive."""
    batches = StepBatches(Numbers(), 4, 2, 0, 1, 0)
    next(batches)
    del batches
    gc.collect()
    assert end_of_readers()


PROGRAM = """
import sys, time
import numpy as np
from megatron_ttl.data.sampler import StepBatches

class Source:
    def samples(self, numbers):
        time.sleep(0.05)
        return np.zeros((len(numbers), 4), np.int64), np.zeros((len(numbers), 4), np.int64)

batches = StepBatches(Source(), 4, 2, 0, 1, 0)
next(batches)
print("ready", flush=True)
if sys.argv[1] == "wait":
    for step in batches:
        pass
"""


@pytest.mark.parametrize(("how", "status"), [("end", 0), ("wait", -signal.SIGINT)])
def test_a_program_ends_with_its_reader(how, status):
    """At its end without close(), and by Ctrl-C while it waits: at once, and the reader says nothing."""
    program = subprocess.Popen([sys.executable, "-c", PROGRAM, how], text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    assert program.stdout.readline() == "ready\n"
    began = time.monotonic()
    if how == "wait":
        time.sleep(0.2)
        program.send_signal(signal.SIGINT)
    errors = program.communicate(timeout=30)[1]
    assert time.monotonic() - began < patient(5)
    assert program.returncode == status
    assert errors == "" if how == "end" else errors.rstrip().endswith("KeyboardInterrupt")
    assert "data-prefetch" not in errors
