"""What a run needs before its first step: all opened, checked against each other, and set to where it goes on."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_ttl.checkpoint.state import outline, restore
from megatron_ttl.checkpoint.store import Checkpoint
from megatron_ttl.config.deepspeed import resolve_deepspeed
from megatron_ttl.config.degrees import data_parallel_size_of, device_faults
from megatron_ttl.config.engine import engine_world_faults
from megatron_ttl.config.load import Settings
from megatron_ttl.config.schema import RunFile
from megatron_ttl.data.background_check import BackgroundCheck
from megatron_ttl.data.causal_lm_dataset import CausalLMDataset, HeldOutDataset
from megatron_ttl.errors import ConfigError, UserError, collected, raise_faults
from megatron_ttl.files import free_bytes, human_bytes, require_free_space
from megatron_ttl.model.flops import BYTES_PER_PARAMETER, count_parameters
from megatron_ttl.parallel.mesh import Mesh
from megatron_ttl.row_file import RowFile, trim_rows
from megatron_ttl.runtime import environment_report, seed_everything
from megatron_ttl.train.anomalies import NonFiniteSteps, SpikeDetector
from megatron_ttl.train.changed_settings import with_recorded_skips
from megatron_ttl.train.energy import EnergyMeter, carry_on
from megatron_ttl.train.engine import Engine
from megatron_ttl.train.engine_options import engine_options
from megatron_ttl.train.failure import end_process
from megatron_ttl.train.ledger import MAX_USEFUL_EPOCHS, Ledger
from megatron_ttl.train.metrics import MetricLogger
from megatron_ttl.train.open_data import open_data, preload, tokenizer_directory
from megatron_ttl.train.open_signals import Signals, open_signals
from megatron_ttl.train.run_folder import RunFolder
from megatron_ttl.train.run_lock import RunLock
from megatron_ttl.train.saver import Saver
from megatron_ttl.train.schedule import Schedule
from megatron_ttl.train.watchdog import Watchdog


@dataclass
class TrainState:
    """Where the run is: two integers say all, the order of the data is a function of them."""

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    updates: int = 0
    """Steps that moved the weights; Adam corrects its moments by it."""
    failed_saves: int = 0

    def advance(self, run: RunFile) -> None:
        """Count one optimizer step that was launched or left out; whether it moved the weights may be known later."""
        self.step += 1
        self.consumed_samples += run.samples_per_step
        self.consumed_tokens += run.train.tokens_per_step


@dataclass
class Session:
    """A prepared run."""

    run: RunFile
    mesh: Mesh
    folder: RunFolder
    dataset: CausalLMDataset
    held_out: dict[str, HeldOutDataset]
    schedule: Schedule
    engine: Engine
    energy: EnergyMeter
    metrics: MetricLogger
    saver: Saver
    watchdog: Watchdog
    micro_batch: int
    replica_check_steps: int | None
    spikes: SpikeDetector
    nonfinite: NonFiniteSteps
    data_check: BackgroundCheck
    ledger: Ledger
    signals: Signals | None = None
    """What is asked beside the held-out loss."""
    samples: RowFile | None = None
    """Where the first process keeps what the model said."""
    state: TrainState = field(default_factory=TrainState)

    def say(self, line: str) -> None:
        """Print one line, once for all processes."""
        if self.mesh.is_first:
            print(line, file=sys.stderr, flush=True)

    @property
    def labels_per_step(self) -> int | None:
        """Labels of every step over all processes; None where each step has another number."""
        return self.run.train.tokens_per_step if self.dataset.all_labelled else None

    def samples_of(self, step: int) -> dict[str, Any]:
        """Return which samples a step of this session read, [first, after the last), and of which documents they are."""
        first = self.state.consumed_samples - (self.state.step - step + 1) * self.run.samples_per_step
        numbers = range(first, first + self.run.samples_per_step)
        return {"samples": [numbers.start, numbers.stop], "documents": self.dataset.documents(numbers)}

    def energy_row(self) -> dict[str, Any]:
        """Return the energy of all nodes so far for a row of metrics; every process must call."""
        row = self.energy.reading()
        kwh, kilograms = self.mesh.sum(*self.energy.totals)
        return row | {"energy_kwh": kwh, "emissions_kg_co2e": kilograms} if row else row

    def peak_memory_bytes(self) -> int:
        """Return the largest peak of all processes: of the GPU where there is one, of the host otherwise.

        Every process must call: the stages of a pipeline need unequally much.
        """
        if self.engine.device.type == "cuda":
            own = torch.cuda.max_memory_allocated(self.engine.device)
        else:
            own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
        return int(self.mesh.largest(own))

    def record(self, last: bool = False) -> dict[str, Any]:
        """Return the small part of a checkpoint: position, totals, and what explains them; every process must call.

        Args:
            last: whether the run ends with it: then it waits for a last measurement of the energy.
        """
        energy = self.energy.state(wait=last)
        energy["energy_kwh"], energy["emissions_kg_co2e"] = self.mesh.sum(*self.energy.totals)
        return {"step": self.state.step, "updates": self.state.updates, "consumed_samples": self.state.consumed_samples,
                "consumed_tokens": self.state.consumed_tokens, **self.ledger.row(self.state.consumed_samples),
                "left_out_samples": [list(samples) for samples in self.ledger.left_out],
                "lr": self.schedule.at(self.state.step), "energy": energy, "order": self.dataset.record(),
                "bos": self.dataset.datasets[0].manifest.bos, "loss_scaler": self.engine.loss_scaler,
                "spikes": self.spikes.state(),
                "wandb_run_id": self.metrics.wandb_run_id, "run": self.run.model_dump(mode="json"),
                "versions": environment_report()}

    def close(self) -> None:
        """Give everything back."""
        self.data_check.close()
        self.engine.close()
        if self.samples is not None:
            self.samples.close()
        self.folder.release()


def prepare(settings: Settings, mesh: Mesh, watchdog: Watchdog | None = None, lock: RunLock | None = None) -> Session:
    """Open and check everything, build the engine, and go to where the run stands.

    Args:
        settings: from `load_settings`.
        mesh: from `join`.
        watchdog: running; None for none.
        lock: on the run folder, if it is taken already.

    Raises:
        UserError: with all faults of a kind; every process raises, and none is left waiting.
    """
    settings = with_recorded_skips(settings)
    run, profile = settings.run, settings.profile
    cuda = mesh.device.type == "cuda"
    faults, missing = device_faults(settings, cuda), []
    named = [f"{key}: {fault}" for key, fault in engine_world_faults(profile, mesh.world_size, cuda)]
    with collected(missing):
        options = engine_options(run, profile, mesh.world_size, mesh.device)
    raise_faults(ConfigError, [*faults, *(f"{settings.deepspeed_path}: {fault}" for fault in [*named, *missing])])
    dataset, held_out = open_data(run)
    signals = open_signals(run, dataset)
    resolved = resolve_deepspeed(settings, data_parallel_size_of(settings, mesh.world_size))
    if profile.reading.preload:
        preload(dataset, int(mesh.largest(mesh.local_rank)) + 1)
    checked = profile.reading.verify and mesh.local_rank == 0  # each machine has its own disk, or at least its own copy
    data_check = BackgroundCheck([*dataset.datasets, *(h.dataset for h in held_out.values())] if checked else [])
    mesh = mesh.cut(profile.cut.tensor, profile.cut.pipeline, profile.cut.sequence)
    folder = RunFolder(settings, lock)
    checkpoint = _claim(folder, mesh)
    seed_everything(run.run.seed)
    engine = Engine(run, resolved, mesh, profile.recompute, dataset.eos_id, options)
    carried = checkpoint.record if checkpoint else {}
    if mesh.is_first:
        folder.describe(resolved, environment_report(), tokenizer_directory(dataset))
    last_row = trim_rows(folder.metrics_path, carried.get("step", 0)) if mesh.is_first else None
    metrics = MetricLogger(folder.metrics_path, run, resolved, writes=mesh.is_first, devices=mesh.world_size,
                           wandb_run_id=carried.get("wandb_run_id"), device_name=environment_report()["device"])
    so_far = carry_on(carried.get("energy"), last_row) if mesh.is_first else None
    energy = EnergyMeter(run.energy, folder.path, measures=mesh.local_rank == 0, carried=so_far)
    watchdog = watchdog or Watchdog()
    engine.beat = watchdog.beat
    session = Session(run, mesh, folder, dataset, held_out, Schedule.of(run), engine, energy, metrics,
                      _saver(folder, mesh, watchdog), watchdog, profile.train_micro_batch_size_per_gpu,
                      profile.cut.replica_check_steps, SpikeDetector(run.log.spike_sigmas),
                      NonFiniteSteps(run.train.max_nonfinite_steps), data_check, Ledger(run, dataset), signals,
                      _sample_file(folder, mesh, signals, carried.get("step", 0)))
    if checkpoint is not None:
        _resume(session, checkpoint)
    _introduce(session, checkpoint)
    return session


def _sample_file(folder: RunFolder, mesh: Mesh, signals: Signals | None, step: int) -> RowFile | None:
    """Open what keeps samples, without those of steps that are taken again."""
    if not mesh.is_first:
        return None
    trim_rows(folder.samples_path, step)
    return RowFile(folder.samples_path) if signals and signals.prompts else None


def _saver(folder: RunFolder, mesh: Mesh, watchdog: Watchdog) -> Saver:
    """Return what writes checkpoints; where it loses another process, this one ends as well."""
    if mesh.world_size == 1:
        return Saver(folder.store, mesh.background())
    return Saver(folder.store, mesh.background(), lambda error: end_process(mesh, error, watchdog))


def _claim(folder: RunFolder, mesh: Mesh) -> Checkpoint | None:
    """Let the first process take the folder, and choose the checkpoint; all fail together or go on together."""
    fault: UserError | None = None
    if mesh.is_first:
        try:
            folder.claim()
            parameters = count_parameters(folder.settings.run.model)
            require_free_space(folder.path, 2 * BYTES_PER_PARAMETER * parameters, "two checkpoints")
        except UserError as error:
            fault = error
    if mesh.any(fault is not None):
        raise fault or UserError("the first process could not open the run folder; see its message")
    checkpoint, warnings = folder.starting_point(mesh)
    for warning in warnings if mesh.is_first else ():
        print(f"warning: {warning}", file=sys.stderr)
    return checkpoint


def _resume(session: Session, checkpoint: Checkpoint) -> None:
    record, state = checkpoint.record, session.state
    state.updates = record.get("updates", record["step"])  # the first releases counted no skipped steps
    restore(session.engine.state, session.run.model, session.mesh, checkpoint, state.updates)
    session.engine.loss_scaler = record.get("loss_scaler")
    session.spikes.load(record.get("spikes"))
    state.step = record["step"]
    state.consumed_samples = record["consumed_samples"]
    state.consumed_tokens = record["consumed_tokens"]
    session.ledger.load(record, state.consumed_samples)


def _introduce(session: Session, checkpoint: Checkpoint | None) -> None:
    """Say what is about to happen, on a few lines."""
    run, dataset = session.run, session.dataset
    where = f"from {checkpoint.directory}" if checkpoint else "from seed " + str(run.run.seed)
    session.say(f"{count_parameters(run.model):,} parameters on {session.mesh.world_size} x "
                f"{session.engine.device.type}, {where}; steps {session.state.step + 1} to {run.total_steps}")
    session.say(f"{run.train.tokens_per_step:,} tokens per step = {session.engine.accumulation} x "
                f"{session.micro_batch} x {run.train.sequence_length} x {session.mesh.data_parallel_size} "
                "(accumulation x micro batch x sequence x data parallel)")
    if session.mesh.layout.tensor * session.mesh.layout.pipeline > 1:
        session.say(f"layout: {session.mesh.layout}")
    session.say(f"engine: {session.engine.options}")
    # With a pipeline these are the first stage's.
    session.say("; ".join(f"{len(group['names'])} tensors with weight decay {group['weight_decay']}"
                          for group in session.engine.decay_groups)
                + f"; {_packing_line(dataset)}")
    pieces = outline(session.engine.state, run.model, session.mesh)
    needed = session.folder.store.bytes_needed(pieces, session.record(), session.mesh)
    session.say(f"a checkpoint needs {human_bytes(needed)}, {human_bytes(free_bytes(session.folder.path))} are free")
    _warn_of_repeats(session)
    if session.state.step:
        session.metrics.row({"event": "resume", "step": session.state.step, "tokens": session.state.consumed_tokens})


def _warn_of_repeats(session: Session) -> None:
    """Name the sources that the run will have read too often at its end."""
    run, state = session.run, session.state
    last = state.consumed_samples + max(run.total_steps - state.step, 0) * run.samples_per_step
    for prefix, epochs in session.ledger.over(last).items():
        session.say(f"warning: {prefix} will have been read {epochs:.2f} times at the end of the run; text that is read "
                    f"more than {MAX_USEFUL_EPOCHS} times teaches less and less (Muennighoff et al. 2023); add text, lower "
                    "its weight, or shorten the run")


def _packing_line(dataset: CausalLMDataset) -> str:
    """Say what no sample reads, and where documents lie otherwise than end to end."""
    report = dataset.packing_report()
    left = f"{report['remainder_tokens']:,} tokens of the data left over by whole sequences"
    if dataset.packing == "best_fit":
        left = (f"best-fit packing: {report['padding_share']:.2%} of the positions are padding, "
                f"{report['remainder_tokens']:,} tokens lie in documents of one")
    return f"{left}; attention stays within documents" if dataset.document_mask else left
