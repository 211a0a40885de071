"""The flat engine beside DeepSpeed's: the same states, the same numbers, and a step that asks the device nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from unittest import mock

import gpu
import pytest
import torch
from layout_runs import Case, deepspeed_settings, joined, run_of, steps_of_data
from tiny_session import train_here, write_data, write_settings
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ttl.checkpoint.names import split_to_hf
from megatron_ttl.checkpoint.state import WEIGHTS, capture, outline, restore
from megatron_ttl.errors import ConfigError
from megatron_ttl.model.llama import build_model
from megatron_ttl.parallel.mesh import Mesh
from megatron_ttl.testing import run_distributed
from megatron_ttl.train import flat_drive
from megatron_ttl.train.anomalies import DivergedError
from megatron_ttl.train.cuda_graphs import WARM_CALLS
from megatron_ttl.train.engine import Engine, EngineOptions
from megatron_ttl.train.step_result import RunAhead

FLAT = Case(engine="flat")


def flat_engine(case=FLAT, device="cpu", graphs="off"):
    """Build one in this process: it needs no process group."""
    return Engine(run_of(case), deepspeed_settings(case), Mesh(0, 1, 0, torch.device(device)),
                  options=EngineOptions("flat", graphs=graphs))


def data_of(case, steps):
    return list(steps_of_data(run_of(case).model.vocab_size, case.micro_batch, steps=steps))


class Pieces:
    """A captured state of one process as a source to restore from."""

    def __init__(self, groups):
        self.tensors = joined([groups])

    def read(self, group, name, offset=None, shape=None):
        return self.tensors[group][name]


def moved_between_engines(mesh, precision):
    """Train three steps under every engine; restore each state in every other one and go on; return what came."""
    cases = [replace(case, precision=precision) for case in
             (FLAT, *(Case(stage=stage) for stage in ((1, 3) if precision == "bf16" else range(4))))]
    pairs = [(cases[0], other) for other in cases] + [(other, cases[0]) for other in cases[1:]]
    data, states, later, moved = data_of(FLAT, 6), {}, {}, []
    for case in cases:
        engine = Engine(run_of(case), deepspeed_settings(case), mesh, options=case.options)
        for micro_batches in data[:3]:
            engine.train_step(micro_batches, 1e-3)
        states[case] = capture(engine.state, run_of(case).model, mesh)
        later[case] = [float(engine.train_step(micro_batches, 1e-3).loss) for micro_batches in data[3:]]
        engine.close()
    for source, target in pairs:
        engine = Engine(run_of(target), deepspeed_settings(target), mesh, options=target.options)
        restore(engine.state, run_of(target).model, mesh, Pieces(states[source]), 3)
        again, before = joined([capture(engine.state, run_of(target).model, mesh)]), joined([states[source]])
        same = all(torch.equal(again[group][name], before[group][name]) for group in before for name in before[group])
        losses = [float(engine.train_step(micro_batches, 1e-3).loss) for micro_batches in data[3:]]
        moved.append((source, target, same, losses, later[source]))
        engine.close()
    return moved


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-6), ("bf16", 9e-5)])
def test_a_run_goes_from_one_engine_to_the_other(precision, bound):
    """The captured bits come back as they were, and the next losses follow; flat to flat bit for bit."""
    for source, target, same, losses, expected in run_distributed(moved_between_engines, 1, precision)[0]:
        assert same, (source, target)
        assert losses == (expected if source == target else pytest.approx(expected, abs=bound)), (source, target)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_masters_begin_as_the_drawn_bits_and_an_outline_foresees_a_capture(precision):
    engine, run = flat_engine(replace(FLAT, precision=precision, model="odd vocabulary")), run_of(
        replace(FLAT, model="odd vocabulary"))
    captured, foreseen = (f(engine.state, run.model, engine.mesh) for f in (capture, outline))
    drawn = {}
    for name, tensor in build_model(run.model, run.run.seed).state_dict().items():
        drawn |= split_to_hf(name, tensor, run.model)
    weights = captured[WEIGHTS]
    assert weights.keys() == drawn.keys() and all(torch.equal(weights[name].tensor, drawn[name]) for name in drawn)
    shapes = [{(group, name): (piece.shape, piece.offset, piece.tensor.shape, piece.tensor.dtype)
               for group, pieces in groups.items() for name, piece in pieces.items()} for groups in (captured, foreseen)]
    assert shapes[0] == shapes[1]


def test_bf16_sums_of_one_micro_batch_are_those_of_fp32():
    """A widened gradient is added to nothing: norms and losses of DeepSpeed's fp32 sums to within its own rounding."""
    engine = flat_engine(replace(FLAT, precision="bf16", micro_batch=24))
    drive = engine._drive
    assert torch.equal(drive.state.weights, drive.state.master.bfloat16())
    engine.train_step(data_of(replace(FLAT, micro_batch=24), 1)[0], 1e-3)
    assert torch.equal(drive.state.gradient, drive.state.gradient.bfloat16().float())
    assert torch.equal(drive.state.weights, drive.state.master.bfloat16())


class NothingIsRead(TorchDispatchMode):
    """Fail where a number of a tensor reaches Python: on a GPU the host would wait there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a number was read"
        assert func is not torch.ops.aten.nonzero.default, "a shape depends on numbers"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", [FLAT, replace(FLAT, precision="bf16", micro_batch=24)], ids=str)
def test_a_steady_step_reads_no_number(case):
    """Neither item() nor float(), bool(), int() nor tolist() of any tensor."""
    engine, data = flat_engine(case), data_of(case, 3)
    engine.train_step(data[0], 1e-3)
    with NothingIsRead():
        results = [engine.train_step(micro_batches, 1e-3, 500) for micro_batches in data[1:]]
        with pytest.raises(AssertionError, match="a number was read"):
            bool(results[0].skipped)
    assert not any(bool(result.skipped) for result in results)


class Tape(TorchDispatchMode):
    """What was computed, with the very tensors it was computed from."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.steps.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, out in self.steps:
            new = func(*args, **kwargs)
            for old, value in zip(*((x if isinstance(x, (tuple, list)) else (x,)) for x in (out, new)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != value.data_ptr():
                    old.copy_(value)


class FakeRecorder:
    """As a GPU records: numbers of Python are frozen, memory is read where it was, and no Python runs in a replay."""

    made = []

    def __init__(self, module):
        self.warmed = self.recorded = self.replayed = 0
        self.made.append(self)

    def warm(self, function):
        self.warmed += 1
        function()

    def record(self, function):
        self.recorded += 1
        tape, done = Tape(), []
        with tape:
            function()

        def replay():
            self.replayed += 1
            if done:  # the first time recording has done it
                tape.replay()
            done.append(True)

        return replay


@pytest.mark.parametrize("case", [FLAT, replace(FLAT, precision="bf16", micro_batch=24)], ids=str)
def test_a_recorded_step_reads_everything_that_changes_from_memory(case):
    """Learning rates, numbers of labels, the step's number and the data differ from step to step; the bits are equal."""
    data = data_of(case, 8)
    for number, micro_batches in enumerate(data):
        micro_batches[-1][1][:, : 3 * number] = -100
    curves, states = [], []
    for graphs in ("off", "require"):
        with mock.patch.object(flat_drive, "GraphRecorder", FakeRecorder):
            engine = flat_engine(case, graphs=graphs)
        results = [engine.train_step(micro_batches, 1e-3 * (1 + number)) for number, micro_batches in enumerate(data)]
        curves.append([(float(r.loss), float(r.grad_norm), bool(r.skipped)) for r in results])
        assert len(set(curves[-1])) == len(data), "each result is that of its own step"
        states.append(capture(engine.state, run_of(case).model, engine.mesh))
    recorder = FakeRecorder.made[-1]
    functions = 1 + min(engine.accumulation, 3)  # the first micro step, the last, those between, the update
    assert (recorder.warmed, recorder.recorded) == (functions * WARM_CALLS, functions) and recorder.replayed > functions
    assert curves[0] == curves[1]
    for group, pieces in states[0].items():
        assert all(torch.equal(piece.tensor, states[1][group][name].tensor) for name, piece in pieces.items()), group


def test_what_cannot_be_recorded_is_launched_or_refused(capsys):
    """Unasked it is one line and the same numbers; asked for it is an error."""
    class Refusing(FakeRecorder):
        def record(self, function):
            late = RuntimeError("operation not permitted when stream is capturing\nlong story")
            with mock.patch.object(flat_drive, "accumulate_", side_effect=late):  # after the backward pass
                function()

    data, curves = data_of(FLAT, 1), {}
    for graphs in ("off", "try"):
        with mock.patch.object(flat_drive, "GraphRecorder", Refusing):
            engine = flat_engine(graphs=graphs)
        curves[graphs] = [float(engine.train_step(micro_batches, 1e-3).loss) for micro_batches in 3 * data]
    assert curves["off"] == curves["try"]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "warning: the step could not be recorded as CUDA graphs and is launched piece by " \
        "piece: operation not permitted when stream is capturing" in said
    with mock.patch.object(flat_drive, "GraphRecorder", Refusing):
        engine = flat_engine(graphs="require")
    engine.train_step(data[0], 1e-3)  # warms up
    with pytest.raises(RuntimeError, match="not permitted"):
        engine.train_step(data[0], 1e-3)


def with_bad_steps(mesh, deepspeed, run, overrides, bad):
    """Run the real loop; the gradient of the steps in `bad` is not finite. Return the error's message, or nothing."""
    from megatron_ttl.config.load import load_settings
    from megatron_ttl.train.loop import train
    from megatron_ttl.train.session import prepare
    from megatron_ttl.train.stop import StopRequest

    session = prepare(load_settings(deepspeed, run, overrides), mesh)
    assert str(session.engine.options).startswith("flat; torch: rms_norm")
    real = session.engine._scaled_loss
    session.engine._scaled_loss = lambda *rest: real(*rest) * (float("nan") if session.state.step + 1 in bad else 1.0)
    try:
        with StopRequest() as stop:
            train(session, stop)
        return "", session.state.updates
    except DivergedError as error:
        return str(error), session.state.updates
    finally:
        session.close()


def test_what_this_machine_lacks_is_told_at_once(tmp_path):
    """Recording and kernels, before the data are opened, with the file that asks for them."""
    profile = {"train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": 1}, "engine": "flat", "cuda_graphs": True,
               "kernels": {"swiglu": "cuda", "attention": "cudnn"}}
    deepspeed, run = write_settings(tmp_path, tmp_path / "no data", tmp_path / "run", profile)
    with pytest.raises(ConfigError) as caught:
        train_here(Mesh(0, 1, 0, torch.device("cpu")), str(deepspeed), str(run), [])
    assert [fault.partition(": is ")[0] for fault in caught.value.faults] == [
        f"{deepspeed}: {key}" for key in ("cuda_graphs", "kernels.swiglu", "kernels.attention")]


def test_the_loop_names_the_step_whose_outcome_came_late(tmp_path):
    """No row and no save near it, so the outcome is read a step later: number, tokens, samples and updates are its own."""
    data = write_data(tmp_path / "data")
    profile = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 1}, "engine": "flat"}
    deepspeed, run = write_settings(tmp_path, data, tmp_path / "run", profile)
    seldom = ["log.every_steps=12", "evaluation.every_steps=12", "train.max_nonfinite_steps=2"]
    message, updates = run_distributed(with_bad_steps, 1, str(deepspeed), str(run), seldom, {5, 9})[0]
    assert (message, updates) == ("", 10)
    rows = [json.loads(line) for line in (Path(tmp_path) / "run/metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["tokens"], row["samples"]) for row in rows if row["event"] == "skip"] == [
        (5, 5 * 256, [32, 40]), (9, 9 * 256, [64, 72])]
    record = json.loads((tmp_path / "run/checkpoints/step-00000012/record.json").read_text())
    assert record["updates"] == 10
    message, _ = run_distributed(with_bad_steps, 1, str(deepspeed), str(run), [*seldom, f"run.dir={tmp_path}/bad"], {5, 6, 7})[0]
    assert "step 6: the gradient is not finite, 2 times in a row" in message and "--skip-steps 5-6" in message


@gpu.gpu_test
@pytest.mark.parametrize("graphs", ["off", "require"])
@pytest.mark.parametrize("micro_batch", [24, 12])
def test_ten_steady_steps_never_wait_for_the_gpu(micro_batch, graphs):
    """PyTorch's own watch over synchronising calls; the outcome of the step before is read as the loop does."""
    case = replace(FLAT, precision="bf16", micro_batch=micro_batch)
    engine = flat_engine(case, "cuda:0", graphs)
    data = [[tuple(part.pin_memory() for part in pair) for pair in step] for step in data_of(case, 16)]
    outcomes = []
    ahead = RunAhead(lambda step, skipped: outcomes.append(skipped))
    for number, micro_batches in enumerate(data):
        torch.cuda.set_sync_debug_mode("error" if number >= 6 else "default")
        try:
            ahead.launched(number, engine.train_step(micro_batches, 1e-3).skipped)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    ahead.drain()
    assert outcomes == [False] * 16


@gpu.gpu_test
@pytest.mark.parametrize("case", [FLAT, replace(FLAT, precision="bf16", micro_batch=24)], ids=str)
def test_recorded_and_launched_steps_give_equal_losses_on_a_gpu(case):
    """And those of the CPU, as near as the precision allows; a longer evaluation between two steps disturbs neither.

    Equal to the order in which a GPU adds; a learning rate that stayed at an earlier step's would be off by per cents.
    """
    data, curves, bound = data_of(case, 10), {}, 2e-2 if case.precision == "bf16" else 1e-4
    for device, graphs in (("cpu", "off"), ("cuda:0", "off"), ("cuda:0", "require")):
        engine, losses = flat_engine(case, device, graphs), []
        for number, micro_batches in enumerate(data):
            losses.append(float(engine.train_step(micro_batches, 1e-3 * (1 + number)).loss))
            if number == 6:
                ids = torch.zeros(3, 200, dtype=torch.int64)
                engine.held_out_nats(ids, ids)
        curves[device, graphs] = losses
    assert curves["cuda:0", "require"] == pytest.approx(curves["cuda:0", "off"], abs=bound / 10)
    assert curves["cuda:0", "off"] == pytest.approx(curves["cpu", "off"], abs=bound)
