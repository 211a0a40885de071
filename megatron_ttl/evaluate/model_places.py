"""Find the models that a command names: a model folder, or checkpoints of a run in the order of their steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_ttl.errors import CheckpointError, UserError, collected, raise_faults
from megatron_ttl.evaluate.open_run import ModelToScore, checkpoint_steps, open_checkpoint, open_folder
from megatron_ttl.evaluate.records import SCORES_FILE
from megatron_ttl.generate.open_folder import choose_device, choose_dtype


@dataclass(frozen=True)
class Place:
    """A model that can be opened."""

    label: str
    """What tells it from the others; empty for a single one."""
    open: Callable[[], ModelToScore]


def find_places(model: Path | None = None, run: Path | None = None, step: int | None = None,
                every_checkpoint: bool = False, device: str = "auto", dtype: str = "float32") -> list[Place]:
    """Return what is to be opened, unopened.

    Args:
        model: a model folder; or
        run: a run folder; of its checkpoints the newest one that is whole, that of a step, or all.
        step, every_checkpoint: which checkpoints.
        device, dtype: as for `open_model_folder`.

    Raises:
        UserError: there is no such device, dtype, folder or checkpoint; all faults at once.
    """
    faults: list[str] = []
    steps: list[int] = []
    for check in (lambda: choose_device(device), lambda: choose_dtype(dtype),
                  lambda: require_model_folder(model) if model is not None else steps.extend(_steps(run, step))):
        with collected(faults):
            check()
    raise_faults(UserError, faults)
    if model is not None:
        return [Place("", partial(open_folder, model, device, dtype))]
    if every_checkpoint:
        return [Place(f"step {one}: ", partial(open_checkpoint, run, one, device, dtype)) for one in steps]
    return [Place("", partial(open_checkpoint, run, step, device, dtype))]


def require_model_folder(model: Path) -> None:
    """Refuse what is no model folder at all; what is in it is looked at when it is opened.

    Raises:
        CheckpointError: there is no config.json.
    """
    if not (model / "config.json").is_file():
        raise CheckpointError(f"{model}: {'has no config.json' if model.is_dir() else 'does not exist'}; it must be a "
                              "model folder; correct the path, or write one with tools/convert_to_hf.py")


def _steps(run: Path | None, step: int | None) -> list[int]:
    """Return the steps of a run that can be asked; the one that is wanted must be among them."""
    assert run is not None
    steps = checkpoint_steps(run)
    if not steps:
        raise CheckpointError(f"{run}: has no checkpoint yet; there must be one to be asked; train the run further")
    if step is not None and step not in steps:
        shown = ", ".join(map(str, steps[:20])) + (f" ... {steps[-1]}" if len(steps) > 20 else "")
        raise CheckpointError(f"--step: {step}; {run} has {shown}; choose one of these")
    return steps


def scores_file(model: Path | None, run: Path | None, chosen: Path | None) -> Path:
    """Return where scores are kept: the file that was chosen, or one in the folder of the model or the run."""
    folder = model or run
    assert folder is not None
    return chosen or folder / SCORES_FILE
