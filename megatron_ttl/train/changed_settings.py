"""What a run was so far, what it is about to be, and whether it may go on so. No torch: `--dry-run` asks it too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_ttl.checkpoint.bounded_json import read_json_object
from megatron_ttl.config.changes import Change, InForce, compare, refusals
from megatron_ttl.config.load import Settings, with_skips
from megatron_ttl.config.schema import RunFile
from megatron_ttl.config.skips import up_to
from megatron_ttl.console import print_table
from megatron_ttl.data.manifest import dataset_paths, read_manifest
from megatron_ttl.errors import CheckpointError, DataError
from megatron_ttl.files import checksum

SETTINGS, RECORD = "settings.json", "record.json"
CHANGE_HEADER = ("setting", "so far", "now", "verdict")


def read_settings_of_record(folder: Path) -> dict[str, Any]:
    """Return what `settings.json` of a run folder holds.

    Raises:
        CheckpointError: it is missing, or not what a run writes.
    """
    path = folder / SETTINGS
    try:
        stored = read_json_object(path, follow_links=True)
        why = "" if _is_table(stored, "run") else "it has no table \"run\""
    except CheckpointError as error:
        why = "it " + error.faults[0].removeprefix(f"{path}: ").partition(";")[0]
    if why:
        raise CheckpointError(f"{path}: the settings of the run cannot be read ({why}); they must lie beside its "
                              "checkpoints; restore the file or choose another run.dir")
    return stored


def with_recorded_skips(settings: Settings) -> Settings:
    """Return the settings with the steps that the run left out so far: what was left out once stays out."""
    path = Path(settings.run.run.dir) / SETTINGS
    if not path.is_file():
        return settings
    stored = read_settings_of_record(path.parent)["run"].get("train", {}).get("skip_steps", ())
    return replace(settings, run=with_skips(settings.run, stored))


def skip_fault(record: Mapping[str, Any], step: int, run: RunFile) -> str:
    """Return what keeps a run that leaves steps out from going on at a checkpoint: it took them, or left out others."""
    taken = up_to(record.get("run", {}).get("train", {}).get("skip_steps", ()), step)
    wanted = up_to(run.train.skip_steps, step)
    if taken == wanted:
        return ""
    said = ", ".join(f"{first}-{last}" for first, last in wanted) or "none"
    return (f"it lies behind steps that are left out otherwise (train.skip_steps, up to here: {said}); it must lie before "
            "them, or have left them out; begin in a new folder with run.start_from=<an earlier checkpoint>, if there is "
            "one")


def changes_since(folder: Path, stored: Mapping[str, Any], record: Mapping[str, Any], settings: Settings
                  ) -> list[Change]:
    """Compare the settings with those of the run so far.

    Args:
        folder: the run's, for its copy of the tokenizer.
        stored: what its `settings.json` says, or a checkpoint's record.
        record: of the checkpoint to go on from; it knows what the data were.
        settings: of now.
    """
    content = _content_before(folder, record)
    read = record.get("consumed_tokens")
    before = InForce(stored["run"], _profile_before(stored, settings), content, read if isinstance(read, int) else None)
    now = InForce(settings.run.model_dump(mode="json"), settings.profile.model_dump(mode="json"),
                  _content_now(settings) if content else {})
    return compare(before, now, settings.allow_changes)


def change_faults(changes: Sequence[Change], step: int, settings: Settings) -> list[str]:
    """Return what keeps the run from going on: refused changes, and an end that lies behind it."""
    faults = refusals(changes, settings)
    total = settings.run.total_steps
    if total < step:
        faults.append(f"{settings.run_path}: train.steps: the run would end after {total:,} steps, and the checkpoint "
                      f"is at step {step:,}; the end must not lie before it; set train.steps to {step:,} or more")
    return faults


def history_with(stored: Mapping[str, Any], changes: Iterable[Change], step: int) -> list[dict[str, Any]]:
    """Return the list of changes of a run, with those that are now made at `step`."""
    known = stored.get("changes")
    return [*(known if isinstance(known, list) else ()),
            *({"step": step, "field": c.field, "old": c.old, "new": c.new, "verdict": c.row[3]} for c in changes)]


def print_changes(changes: Sequence[Change], folder: Path, step: int) -> None:
    """Show what differs, if anything does."""
    if changes:
        print_table(CHANGE_HEADER, [change.row for change in changes],
                    title=f"changed since {folder} was last started (at step {step:,} now):")


def changes_for_a_dry_run(settings: Settings) -> tuple[list[Change], list[str]]:
    """Compare with the run folder without opening its checkpoints: their bytes are not looked at.

    Returns:
        The changes and the faults; nothing for a folder without a checkpoint.
    """
    folder = Path(settings.run.run.dir)
    names = sorted(path.parent.name for path in folder.glob(f"checkpoints/step-*[0-9]/{RECORD}"))
    if not names:
        return [], []
    newest = max(names, key=lambda name: int(name[5:]) if name[5:].isdigit() else -1)
    record = read_json_object(folder / "checkpoints" / newest / RECORD)
    step = record["step"] if isinstance(record.get("step"), int) else 0
    changes = changes_since(folder, read_settings_of_record(folder), record, settings)
    return changes, change_faults(changes, step, settings)


def _profile_before(stored: Mapping[str, Any], settings: Settings) -> Mapping[str, Any] | None:
    if _is_table(stored, "profile"):
        return stored["profile"]
    if not _is_table(stored, "deepspeed"):
        return None
    # An older settings.json has what DeepSpeed was given, which is all but what the engine never saw.
    now = settings.profile.model_dump(mode="json")
    given = stored["deepspeed"]
    passed_on = {key for key in type(settings.profile).model_fields if key in given} | {"bf16", "fp16", "data_types"}
    return {key: given.get(key) if key in passed_on else value for key, value in now.items()}


def _content_before(folder: Path, record: Mapping[str, Any]) -> dict[str, str]:
    order = record.get("order")
    sources = order.get("sources", []) if isinstance(order, dict) else []
    content = {f"data.sources[{i}].content": source["checksum"] for i, source in enumerate(sources)
               if source.get("checksum")}
    tokenizer = folder / "tokenizer" / "tokenizer.model"
    if content and tokenizer.is_file():
        content["data.tokenizer"] = checksum(tokenizer)
    return content


def _content_now(settings: Settings) -> dict[str, str]:
    content = {}
    for i, source in enumerate(settings.run.data.sources):
        try:
            manifest = read_manifest(dataset_paths(source.prefix).manifest)
        except DataError:
            continue  # whoever opens the data says so
        content[f"data.sources[{i}].content"] = manifest.bin.checksum
        content.setdefault("data.tokenizer", manifest.tokenizer.checksum)
    return content


def _is_table(value: Any, key: str) -> bool:
    return isinstance(value, dict) and isinstance(value.get(key), dict)
