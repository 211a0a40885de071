"""Saved under one layout, loaded under another: the same bits, and the losses that follow."""

from __future__ import annotations

import functools

import pytest
import torch
from layout_runs import Case, deepspeed_settings, plain_loop, reference_of, run_of, steps_of_data

from megatron_ttl.checkpoint.state import MOMENTS, RNG, WEIGHTS, capture, restore
from megatron_ttl.checkpoint.store import CheckpointStore
from megatron_ttl.testing import run_distributed
from megatron_ttl.train.engine import Engine

BEFORE, AFTER, BOUND = 5, 20, 1e-5
MODEL = "odd vocabulary"
LAYOUTS = [
    Case(data=4, stage=0, model=MODEL), Case(data=4, stage=2, model=MODEL), Case(data=4, stage=3, model=MODEL),
    Case(tensor=2, data=2, stage=1, model=MODEL, sequence=True), Case(tensor=2, data=2, stage=3, model=MODEL),
    Case(tensor=4, stage=2, model=MODEL), Case(pipeline=2, data=2, stage=1, model=MODEL),
    Case(pipeline=4, stage=0, model=MODEL), Case(tensor=2, pipeline=2, stage=1, model=MODEL, sequence=True)]
PAIRS = [(a, b) for a in range(9) for b in range(9) if a != b]
DOZEN = [(0, 8), (8, 2), (2, 5), (5, 7), (7, 4), (4, 6), (6, 3), (3, 1), (1, 0), (8, 6), (2, 8), (7, 3)]
assert {a for a, _ in DOZEN} == {b for _, b in DOZEN} == set(range(9))


def engine_of(mesh, case):
    mesh = mesh.cut(case.tensor, case.pipeline, case.sequence)
    run = run_of(case)
    data = list(steps_of_data(run.model.vocab_size, case.micro_batch, mesh.data_parallel_rank, mesh.data_parallel_size,
                              BEFORE + AFTER))
    return Engine(run, deepspeed_settings(case), mesh, options=case.options), run.model, mesh, data


def save(folder, engine, model, mesh):
    record = {"step": BEFORE, "loss_scaler": engine.loss_scaler}
    CheckpointStore(folder).save(BEFORE, capture(engine.state, model, mesh), record, mesh)


def reshard(mesh, folder, pairs):
    """Train every source a few steps and save it; load it under every target, save again, go on; return the losses."""
    for source in sorted({source for source, _ in pairs}):
        engine, model, cut, data = engine_of(mesh, LAYOUTS[source])
        for micro_batches in data[:BEFORE]:
            engine.train_step(micro_batches, 1e-3)
        save(folder / f"{source}", engine, model, cut)
        engine.close()
    found = {}
    for source, target in pairs:
        engine, model, cut, data = engine_of(mesh, LAYOUTS[target])
        checkpoint = CheckpointStore(folder / f"{source}").latest_valid(mesh)
        restore(engine.state, model, cut, checkpoint, checkpoint.step)
        save(folder / f"{source}-{target}", engine, model, cut)
        found[source, target] = [float(engine.train_step(micro_batches, 1e-3).loss) for micro_batches in data[BEFORE:]]
        engine.close()
    return found


def check(folder, pairs, losses):
    expected = reference()
    for source, target in pairs:
        checkpoint, again = (CheckpointStore(folder / name).latest_valid() for name in (f"{source}", f"{source}-{target}"))
        for group in (WEIGHTS, *MOMENTS, RNG):
            before, after = checkpoint.tensors(group), again.tensors(group)
            assert before.keys() == after.keys()
            assert all(torch.equal(before[name], after[name]) for name in before), (source, target, group)
        assert checkpoint.tensors(MOMENTS[1])["lm_head.weight"].abs().sum() > 0, "moments must have been there to lose"
        assert losses[source, target] == pytest.approx(expected, abs=BOUND), (LAYOUTS[source], LAYOUTS[target])


@functools.cache
def reference():
    return plain_loop(reference_of(LAYOUTS[0]), steps=BEFORE + AFTER)[0][0, BEFORE:].tolist()


def test_a_dozen_pairs(tmp_path):
    """Every layout is saved and loaded once at least."""
    check(tmp_path, DOZEN, run_distributed(reshard, 4, tmp_path, DOZEN, timeout_s=540)[0])


@pytest.mark.long
@pytest.mark.parametrize("source", range(9))
def test_all_pairs(tmp_path, source):
    pairs = [pair for pair in PAIRS if pair[0] == source]
    check(tmp_path, pairs, run_distributed(reshard, 4, tmp_path, pairs, timeout_s=540)[0])


def one_process(mesh, folder, targets):
    """Load on one process what four wrote, and the other way round is the pieces of one; return losses."""
    found = {}
    for source, case in targets.items():
        engine, model, cut, data = engine_of(mesh, case)
        checkpoint = CheckpointStore(folder / f"{source}").latest_valid(mesh)
        restore(engine.state, model, cut, checkpoint, checkpoint.step)
        save(folder / f"{source}-0", engine, model, cut)
        found[source, 0] = [float(engine.train_step(micro_batches, 1e-3).loss) for micro_batches in data[BEFORE:]]
        engine.close()
    return found


def test_from_four_processes_to_one(tmp_path):
    """Other numbers of processes: the folder says where everything lies, nobody converts it."""
    targets = {2: Case(model=MODEL, stage=2), 8: Case(model=MODEL, engine="flat")}
    run_distributed(reshard, 4, tmp_path, [(source, source) for source in targets])
    check(tmp_path, [(source, 0) for source in targets], run_distributed(one_process, 1, tmp_path, targets)[0])


def files_and_reads(mesh, folder):
    """Return the bytes that this process's files take, and the elements that it reads back."""
    engine, model, cut, data = engine_of(mesh, LAYOUTS[8])
    engine.train_step(data[0], 1e-3)
    save(folder, engine, model, cut)
    checkpoint = CheckpointStore(folder).latest_valid(mesh)
    read = []

    class Counting:
        def read(self, group, name, offset=None, shape=None):
            tensor = checkpoint.read(group, name, offset, shape)
            read.append(tensor.numel() if group == WEIGHTS else 0)
            return tensor

    restore(engine.state, model, cut, Counting(), BEFORE)
    own = sum(path.stat().st_size for path in checkpoint.directory.glob(f"*-{mesh.rank:05d}.safetensors"))
    return own, sum(read), sum(p.numel() for p in engine.module.parameters())


def test_every_process_writes_and_reads_its_own_share(tmp_path):
    """No process touches the whole model: it reads its own parameters, the padding of the vocabulary apart."""
    results = run_distributed(files_and_reads, 4, tmp_path)
    written = [own for own, _, _ in results]
    assert min(written) > 0.15 * sum(written), "the shares must be about even"
    for _, read, parameters in results:
        assert 0.9 * parameters < read <= parameters < 0.5 * sum(p for _, _, p in results)
