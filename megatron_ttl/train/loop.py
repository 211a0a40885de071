"""Pretraining, told as a story: prepare, then one optimizer step after the other until done or asked to stop."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_ttl.checkpoint.state import capture
from megatron_ttl.config.load import Settings
from megatron_ttl.data.sampler import StepBatches
from megatron_ttl.errors import DiskError, ExitCode
from megatron_ttl.parallel.mesh import join, leave
from megatron_ttl.parallel.replicas import replica_faults
from megatron_ttl.runtime import Ranks
from megatron_ttl.train.anomalies import DivergedError
from megatron_ttl.train.evaluation import evaluate
from megatron_ttl.train.failure import siblings_watched, told_once, waiting_for_peers
from megatron_ttl.train.garbage import QuietCollector
from megatron_ttl.train.ledger import MAX_USEFUL_EPOCHS
from megatron_ttl.train.run_lock import RunLock
from megatron_ttl.train.session import Session, prepare
from megatron_ttl.train.step_result import RunAhead, StepResult
from megatron_ttl.train.stop import StopRequest
from megatron_ttl.train.switches import Switches
from megatron_ttl.train.watchdog import Watchdog

_WATCHDOG_FIRST_S = 60.0  # how much longer a collective waits than any section may last


def pretrain(settings: Settings, ranks: Ranks, stop: StopRequest, lock: RunLock | None = None) -> ExitCode:
    """Run, or go on with, the pretraining that the settings describe.

    Args:
        settings: from `load_settings`.
        ranks: from `discover_ranks`.
        stop: installed already; a request that came during preparation is honoured after the first step, but several
            processes that have not met yet leave at once.
        lock: on the run folder, taken by the first process before the slow imports.

    Raises:
        UserError: something is missing, damaged or contradictory; found before the first step.
    """
    limits = settings.profile.time_limits
    with Watchdog(limits, Path(settings.run.run.dir), ranks.rank, ranks.world_size) as watchdog:
        try:
            with siblings_watched(ranks):
                with waiting_for_peers(ranks):
                    mesh = join(ranks, limits.longest_s + _WATCHDOG_FIRST_S)
                stop.met()
                with told_once(mesh, watchdog):
                    session = prepare(settings, mesh, watchdog, lock)
            with closing(session), told_once(mesh, watchdog):
                return train(session, stop)
        finally:
            leave()


def train(session: Session, stop: StopRequest) -> ExitCode:
    """Take optimizer steps from the session's state to the end of the run."""
    run, mesh, state, engine, watchdog = session.run, session.mesh, session.state, session.engine, session.watchdog
    total_steps = run.total_steps
    interval = Interval()

    def deal_with(launched: Launched, skipped: bool) -> None:
        state.updates += not skipped
        interval.add(launched, skipped)
        judge(session, launched, skipped)

    ahead, collector = RunAhead(deal_with), QuietCollector()
    switches = Switches(session.folder.path, looks=mesh.is_first)
    with closing(_batches(session)) as batches, session.energy, session.metrics, session.saver, collector:
        while state.step < total_steps:
            # one step: micro batches forward and backward, gradients reduced, weights moved
            with watchdog.section("step"):
                session.data_check.require_whole()
                micro_batches = next(batches)
                lr = session.schedule.at(state.step + 1)
                if run.train.leaves_out(state.step + 1):
                    ahead.drain()
                    leave_out(session)
                else:
                    result = engine.train_step(micro_batches, lr, session.labels_per_step)
                    state.advance(run)
                    ahead.launched(Launched(state.step, result, batches.wait_s), result.skipped)
                watchdog.beat(state.step)
                stop_file, save_file = switches.asked()
                votes = mesh.sum(stop.is_set or stop_file, save_file, session.saver.written)
            asked_to_stop, asked_to_save, written = votes[0] > 0, votes[1] > 0, votes[2] == mesh.world_size
            at_end = state.step == total_steps or asked_to_stop
            collector.settle()

            # what was begun some steps ago is on the disk, everywhere
            if written:
                settle(session)

            # once in a while: wait for the step that was launched, and say how it goes
            cadences = (run.log.every_steps, run.checkpoint.every_steps, run.evaluation.every_steps, session.replica_check_steps)
            logs, keeps, measures, compares = (bool(every) and state.step % every == 0 for every in cadences)
            if at_end or asked_to_save or logs or keeps or measures or compares:
                with watchdog.section("step"):
                    ahead.drain()
            # What skipped steps leave behind is not new, and must not push out older and perhaps better ones.
            due = at_end or asked_to_save or (keeps and not session.nonfinite.in_a_row)
            if due or logs:
                report_spikes(session)
                report_repeats(session)
            if interval.steps and (at_end or logs):
                session.metrics.row(interval.row(session, lr))
                interval = Interval()

            # once in a while: see that all processes still train one model
            if compares or (due and session.replica_check_steps):
                with interval.paused(), watchdog.section("step"):
                    compare_replicas(session)

            # once in a while, and at the end: keep it, before anything else can go wrong
            if due:
                if interval.steps:
                    interval.mean_loss(session)
                with interval.paused(), watchdog.section("save"):
                    kept = save(session, last=at_end, waits=asked_to_save or not run.checkpoint.asynchronous)
                    collector.collect()
                switches.honoured(asked_to_stop, kept)

            # once in a while, and at the end: measure on text it never saw
            if not asked_to_stop and (measures or (at_end and run.evaluation.every_steps)):
                with interval.paused(), watchdog.section("evaluate"):
                    evaluate(session, stop)
                    collector.collect()

            # asked to stop: it is kept, leave with the code that says so
            if asked_to_stop and state.step < total_steps:
                session.say(f"stopped at step {state.step} with a checkpoint; the same command goes on from here")
                return ExitCode.PREEMPTED
    report_end(session)
    return ExitCode.DONE


def _batches(session: Session) -> StepBatches:
    run, mesh = session.run, session.mesh
    return StepBatches(session.dataset, run.samples_per_step, session.micro_batch, rank=mesh.data_parallel_rank,
                       world_size=mesh.data_parallel_size, consumed_samples=session.state.consumed_samples,
                       pin_memory=session.engine.device.type == "cuda")


@dataclass(frozen=True)
class Launched:
    """A step on its way: its number, what it will have computed, and how long it waited for its data."""

    step: int
    result: StepResult
    wait_s: float


@dataclass
class Interval:
    """What happened since the last line: sums that stay on the device until the line is due."""

    loss: torch.Tensor | float = 0.0
    grad_norm: torch.Tensor | float = math.nan
    norms: torch.Tensor | float = 0.0
    steps: int = 0
    skipped: int = 0
    wait_s: float = 0.0
    started: float = field(default_factory=time.perf_counter)
    paused_s: float = 0.0

    def add(self, launched: Launched, skipped: bool) -> None:
        """Count one step; of one that moved no weight neither loss nor norm say anything."""
        self.steps += 1
        self.wait_s += launched.wait_s
        if skipped:
            self.skipped += 1
        else:
            self.loss = self.loss + launched.result.loss
            self.grad_norm = launched.result.grad_norm
            self.norms = self.norms + launched.result.grad_norm

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out of the speed what is done inside: saving, evaluating."""
        began = time.perf_counter()
        yield
        self.paused_s += time.perf_counter() - began

    def mean_loss(self, session: Session) -> float:
        """Read the mean loss so far, which waits for the device; NaN where no step moved a weight.

        Raises:
            DivergedError: it is not finite though a weight moved; nothing of this state may be kept.
        """
        if self.skipped == self.steps:
            return math.nan
        loss = float(self.loss) / (self.steps - self.skipped)
        for name, value in (("loss", loss), ("gradient norm", float(self.norms))):
            if not math.isfinite(value):
                kept = kept_steps(session)
                raise DivergedError(f"step {session.state.step}: the {name} is {value}; it must be a number; go on "
                                    f"from step {max(kept, default=0)} with a lower optimizer.lr or "
                                    "train.gradient_clipping")
        return loss

    def row(self, session: Session, lr: float) -> dict[str, Any]:
        """Make a row of metrics."""
        run, state, loss = session.run, session.state, self.mean_loss(session)
        elapsed = time.perf_counter() - self.started - self.paused_s
        return {"event": "train", "step": state.step, "tokens": state.consumed_tokens, "loss": loss, "lr": lr,
                "grad_norm": float(self.grad_norm), "tokens_per_s": self.steps * run.train.tokens_per_step / elapsed,
                "step_s": elapsed / self.steps, "data_wait_s": self.wait_s / self.steps,
                "peak_memory_bytes": session.peak_memory_bytes(), **session.ledger.row(state.consumed_samples),
                **session.engine.loss_scale_row(self.skipped), **session.energy_row()}


def leave_out(session: Session) -> None:
    """Pass over a step that the run file leaves out: its samples are never read again, and no weight moves."""
    state = session.state
    state.advance(session.run)
    session.ledger.leave_out(state.consumed_samples - session.run.samples_per_step, state.consumed_samples)
    session.say(f"step {state.step}: left out (train.skip_steps)")
    session.metrics.row({"event": "left out", "step": state.step, "tokens": state.consumed_tokens,
                         **session.samples_of(state.step)})


def judge(session: Session, launched: Launched, skipped: bool) -> None:
    """Count a step whose gradient is not finite; alike on every process, for such a gradient reaches all of them.

    Raises:
        DivergedError: there were too many in a row.
    """
    step, fault = launched.step, skipped and not session.engine.scales_loss
    if not skipped:
        session.spikes.observe(step, launched.result.loss, launched.result.grad_norm)
    warning = session.nonfinite.count(step, fault, kept_steps(session) if fault else [])
    if warning:
        session.say(warning)
        later = session.state.step - step
        session.metrics.row({"event": "skip", "step": step,
                             "tokens": session.state.consumed_tokens - later * session.run.train.tokens_per_step,
                             **session.samples_of(step)})


def kept_steps(session: Session) -> list[int]:
    """Return the steps of the checkpoints, that which is being written included; to be asked on all processes together."""
    if session.saver.pending:
        settle(session)
    return session.folder.store.steps()


def report_spikes(session: Session) -> None:
    """Name the steps whose loss jumped, and what they read."""
    for spike in session.spikes.examine():
        session.metrics.row({"event": "spike", "step": spike.step,
                             "tokens": spike.step * session.run.train.tokens_per_step, "loss": spike.loss,
                             "grad_norm": spike.grad_norm, "expected": spike.expected, "sigmas": spike.sigmas,
                             **session.samples_of(spike.step)})
        session.say(f"warning: step {spike.step}: loss {spike.loss:.4f} is {spike.sigmas:.1f} standard deviations above "
                    f"{spike.expected:.4f}, where the steps before it led; gradient norm {spike.grad_norm:.2f}; "
                    f"metrics.jsonl names its documents; --skip-steps {spike.step}-{spike.step} goes back and leaves "
                    "them out")


def report_repeats(session: Session) -> None:
    """Name the sources that have now been read too often."""
    state = session.state
    for prefix, epochs in session.ledger.newly_over(state.consumed_samples).items():
        session.metrics.row({"event": "repeated", "step": state.step, "tokens": state.consumed_tokens, "source": prefix,
                             "epochs": {prefix: epochs}})
        session.say(f"warning: step {state.step}: {prefix} has now been read more than {MAX_USEFUL_EPOCHS} times")


def report_end(session: Session) -> None:
    """Say that the run is over, and what of the data was not yet compared with its checksum."""
    for prefix in session.data_check.unfinished:
        session.say(f"note: the run was over before {prefix} was compared with its checksum; `tools/inspect_data.py "
                    f"--verify --prefix {prefix}` does that")
    session.say(f"done: {session.run.total_steps} steps, {session.state.consumed_tokens:,} tokens; {session.folder.path}")


def compare_replicas(session: Session) -> None:
    """See that copies of weights on several processes are equal bit for bit.

    Raises:
        DivergedError: they are not; nothing of this state may be kept.
    """
    faults = replica_faults(session.engine.module, session.mesh)
    if faults:
        kept = max(session.folder.store.steps(), default=0)
        raise DivergedError(f"step {session.state.step}: copies of a weight differ; they must be equal bit for bit; a "
                            f"machine or a connection made an error: start again without it, from step {kept}",
                            *faults[:20])


def save(session: Session, last: bool = False, waits: bool = False) -> bool:
    """Begin to write a checkpoint, after the former one is written; training goes on meanwhile.

    Args:
        session: between two steps.
        last: whether the process is about to leave: then it waits, and one failure is enough.
        waits: whether to wait until it is on the disk.

    Returns:
        Whether this checkpoint is on the disk already.

    Raises:
        DiskError: as `settle`.
    """
    began = time.perf_counter()
    if session.saver.pending:
        settle(session)
    pieces = capture(session.engine.state, session.run.model, session.mesh)
    session.saver.begin(session.state.step, pieces, session.record(last))
    session.saver.stall_s = time.perf_counter() - began
    return settle(session, last) if last or waits else False


def settle(session: Session, last: bool = False) -> bool:
    """Wait for the checkpoint that is being written; after three failures in a row give up: such a run is lost work.

    Args:
        session: with a pending save.
        last: whether the process is about to leave: then one failure is enough.

    Returns:
        Whether it is on the disk.

    Raises:
        DiskError: the third save in a row failed, or the last one did; on every process.
    """
    state, outcome = session.state, session.saver.settle()
    if isinstance(outcome.error, DiskError):  # on every process, or on none
        state.failed_saves += 1
        if last or state.failed_saves >= 3:
            raise outcome.error
        session.say(f"warning: {outcome.error} (save {state.failed_saves} of 3 failed; training goes on)")
        return False
    if outcome.error is not None:
        raise outcome.error
    state.failed_saves = 0
    for warning in outcome.warnings:
        session.say(f"warning: {warning}")
    session.metrics.row({"event": "checkpoint", "step": outcome.step, "tokens": outcome.tokens,
                         "bytes": outcome.saved.bytes, "stall_s": outcome.stall_s, "write_s": outcome.write_s})
    if last and session.mesh.is_first:
        session.folder.write_mixture(session.ledger.table(state.consumed_samples))
    return True
