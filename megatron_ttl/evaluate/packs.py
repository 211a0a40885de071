"""Tasks from packs: one YAML file per task, which says what is asked and how it is scored, and brings no code.

Packs of the project lie in `packs/<language>/`; folders of the user's own stand beside them, `<folder>/*.yaml` or
`<folder>/<language>/*.yaml`. The guide is `packs/README.md`.
"""

from __future__ import annotations

import inspect
import json
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from megatron_ttl.config.read import DEEPEST, nested_deeper, read_text
from megatron_ttl.config.suggest import did_you_mean, nearest_words
from megatron_ttl.config.validate import validate
from megatron_ttl.errors import ConfigError, DataError, raise_faults
from megatron_ttl.evaluate import english_functions, pack_schema  # noqa: F401 (registers its functions)
from megatron_ttl.evaluate.pack_data import DataFiles, RowRules, count_rows, find_files, read_task_data, task_data_of
from megatron_ttl.evaluate.pack_functions import FUNCTIONS
from megatron_ttl.evaluate.pack_schema import FunctionName, HubTable, PackFile
from megatron_ttl.evaluate.task import Task, TaskData
from megatron_ttl.files import checksum_bytes

import megatron_ttl.evaluate.portuguese_functions  # noqa: F401 (registers its functions)

PACKS = Path(__file__).parent / "packs"
"""Of the project."""
DEFAULT_DATA = Path("tasks")
"""Where data files are looked for unless told otherwise."""
_MOST_FAULTS = 40
_OURS = "megatron_ttl.evaluate."
# A definition is the same with more demonstrations (scores name their number) and under another name.
_NOT_OF_THE_PROMPT = ("task", "tag", "num_fewshot", "should_decontaminate", "doc_to_decontamination_query")


@dataclass(frozen=True)
class Pack:
    """One checked file."""

    path: Path
    raw: Mapping[str, Any]
    """As it was written; functions by name."""
    file: PackFile

    @property
    def files(self) -> dict[str, str]:
        """Names of the data files."""
        return {key: name for key, name in self.file.pack.files.model_dump().items() if name}


_ReadFile = tuple[Path, dict[str, Any], Pack | None, list[str]]
"""A file, what stands in it, the pack if it is one and right, and its faults."""


@dataclass(frozen=True)
class ListedTask:
    """A row of the list of tasks."""

    name: str
    version: str
    definition: str
    language: str
    shots: int
    metric: str
    items: int | None
    """Rows in the file that is asked about; None: it is not there, or cannot be read."""
    files: str
    """Names of the files that are there."""
    sample: bool
    missing: str
    """What is not there, and where it comes from."""
    groups: tuple[str, ...]


def find_tasks(folders: Sequence[Path] = (), data: Path = DEFAULT_DATA, hub: bool = False) -> dict[str, Task]:
    """Return the tasks of the project and of more folders by name; no rows are read.

    Args:
        folders: with packs of the user's own.
        data: folder of the data files, before that of the pack itself.
        hub: whether rows that are not there are fetched from the Hugging Face hub when a task is loaded.

    Raises:
        ConfigError: with all faults of all files.
    """
    packs, _ = _read_all(folders)
    return {name: _task(pack, data, hub) for name, pack in sorted(packs.items())}


def choose_tasks(names: Sequence[str], data: Path = DEFAULT_DATA, folders: Sequence[Path] = (),
                 hub: bool = False) -> list[Task]:
    """Return the named tasks, those of groups in the group's order, each once.

    Raises:
        ConfigError: packs are wrong, or names are unknown (and what else is missing).
        DataError: data files are missing; all of them, with where they come from.
    """
    packs, groups = _read_all(folders)
    chosen: dict[str, Pack] = {}
    faults = []
    for name in names:
        for member in groups.get(name, (name,)):
            if member in packs:
                chosen[member] = packs[member]
            else:
                near = nearest_words(member, [*packs, *groups])
                faults.append(f"--tasks: {member}: is no task and no group; must be one of those in --list; "
                              + (did_you_mean(near) if near else "correct the name"))
    if not names:
        faults.append("--tasks: is empty; must name at least one task or group; see --list")
    lacking = [f"{name}: {found}" for name, pack in chosen.items()
               if not (hub and pack.file.pack.hub) and (found := _lacking(pack, data))]
    raise_faults(ConfigError if faults else DataError, [*faults, *lacking])
    return [_task(pack, data, hub) for pack in chosen.values()]


def task_listing(data: Path = DEFAULT_DATA, folders: Sequence[Path] = ()) -> list[ListedTask]:
    """Return what there is, with which data, and what is missing from where.

    Raises:
        ConfigError: packs are wrong.
    """
    packs, groups = _read_all(folders)
    rows = []
    for name, pack in sorted(packs.items()):
        files, table = _files(pack, data), pack.file.pack
        items = None
        missing = _lacking(pack, data) or (f"the whole {table.files.test}, from {_place(pack)}" if files.sample else "")
        try:
            items = count_rows(files.test) if files.test else None
        except DataError as error:
            missing = str(error)
        rows.append(ListedTask(name, table.version, table.definition, table.language, pack.file.num_fewshot or 0,
                               _metrics(pack)[0], items, files.names, files.sample, missing,
                               tuple(sorted(group for group, members in groups.items() if name in members))))
    return rows


def _task(pack: Pack, data: Path, hub: bool) -> Task:
    table, file = pack.file.pack, pack.file
    tags = (file.tag,) if isinstance(file.tag, str) else file.tag or ()
    config = {key: _resolved(value) for key, value in pack.raw.items() if key != "pack"}
    return Task(name=file.task, version=table.version, definition=table.definition, language=table.language,
                prompt_language=table.prompt_language, shots=file.num_fewshot or 0, metrics=_metrics(pack), config=config,
                source=table.source, license=table.license, load=partial(_load, pack, data, hub),
                prompt_checksum=_prompt_checksum(pack), tags=tuple(tags),
                demonstrations_column=table.demonstrations.column if table.demonstrations else None)


def _metrics(pack: Pack) -> tuple[str, ...]:
    return tuple(metric.metric for metric in pack.file.metric_list)


def _load(pack: Pack, data: Path, hub: bool) -> TaskData:
    table = pack.file.pack
    chosen = table.demonstrations
    rules = RowRules(table.rows, FUNCTIONS[table.prepare] if table.prepare else None, table.unique == "id",
                     chosen.ids if chosen else (), chosen.rows if chosen else ())
    files = _files(pack, data)
    if files.test is not None and not (files.sample and hub and table.hub):
        return read_task_data(files, rules)
    if hub and table.hub:
        return task_data_of(_hub_rows(table.hub, pack), rules, f"{table.hub.path} on the hub")
    raise DataError(f"{pack.file.task}: {_lacking(pack, data)}")


def _files(pack: Pack, data: Path) -> DataFiles:
    return find_files(pack.files, (data, pack.path.parent))


def _lacking(pack: Pack, data: Path) -> str:
    """Return which file a task lacks, and where it comes from; '' where none is lacking."""
    if _files(pack, data).test is not None:
        return ""
    table = pack.file.pack
    asked = ", or add --hub where there is a network" if table.hub else ""
    return (f"{table.files.test} is not in {data}; must be there, one JSON object per line with "
            f"{', '.join(table.given or table.rows)}; get it from {_place(pack)}{asked}")


def _place(pack: Pack) -> str:
    """Return where the rows of a task come from, and under which licence."""
    table = pack.file.pack
    if table.hub is None:
        return f"{table.source} (licence: {table.license})"
    name = f" ({table.hub.name})" if table.hub.name else ""
    return f"{table.hub.path}{name} on the Hugging Face hub (licence: {table.license})"


def _hub_rows(hub: HubTable, pack: Pack) -> dict[str, Iterator[dict[str, Any]]]:
    """Return the rows of the splits as the hub sends them, columns renamed."""
    from megatron_ttl.data.corpus.hub import dataset_rows
    from megatron_ttl.data.corpus.settings import SourceSettings

    def rows(split: str) -> Iterator[dict[str, Any]]:
        source = SourceSettings(name=pack.file.task, license=pack.file.pack.license, dataset=hub.path,
                                dataset_config=hub.name, split=split, revision=hub.revision)
        try:
            for row in dataset_rows(source):
                yield {hub.rename.get(key, key): value for key, value in row.items()}
        except DataError as error:
            raise DataError(*error.faults, f"{pack.file.task}: --hub: gave no rows; must give them, or {pack.files['test']} "
                            "must be among the data; get the file where there is a network") from None

    wanted = {"test": hub.splits.test, "fewshot": hub.splits.fewshot}
    return {name: rows(split) for name, split in wanted.items() if split}


def _resolved(value: Any) -> Any:
    if isinstance(value, FunctionName):
        return FUNCTIONS[value]
    if isinstance(value, dict):
        return {key: _resolved(inner) for key, inner in value.items()}
    return [_resolved(inner) for inner in value] if isinstance(value, list) else value


def _prompt_checksum(pack: Pack) -> str:
    decides = {key: value for key, value in pack.raw.items() if key not in (*_NOT_OF_THE_PROMPT, "pack")}
    decides["pack"] = {key: pack.raw["pack"].get(key) for key in ("version", "prepare", "demonstrations")}
    used = dict.fromkeys(_function_names(decides))
    sources = {name: _source_text(FUNCTIONS[name]) for name in sorted(used)}
    canonical = json.dumps([decides, sources], ensure_ascii=False, sort_keys=True, default=str)
    return checksum_bytes(canonical.encode())


def _function_names(value: Any) -> Iterator[str]:
    if isinstance(value, FunctionName):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _function_names(inner)


@cache
def _source_text(function: Callable[..., Any]) -> str:
    """Return the text of a function and of all beside it that it uses."""
    texts: dict[str, str] = {}

    def add(one: types.FunctionType) -> None:
        texts[one.__name__] = inspect.getsource(one)
        codes = [one.__code__]
        for code in codes:  # grows: functions inside of functions
            codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
            for name in code.co_names:
                used = one.__globals__.get(name)
                if isinstance(used, types.FunctionType) and used.__module__.startswith(_OURS) and name not in texts:
                    add(used)
                elif isinstance(used, str | int | float | tuple | re.Pattern):
                    texts[name] = repr(used)

    add(inspect.unwrap(function))
    return "\n".join(texts[name] for name in sorted(texts))


def _read_all(folders: Sequence[Path]) -> tuple[dict[str, Pack], dict[str, tuple[str, ...]]]:
    """Read every pack and group, and collect the faults of all files."""
    faults = [f"--packs: {folder}: is no folder; must hold packs (*.yaml); correct the path"
              for folder in folders if not folder.is_dir()]
    packs: dict[str, Pack] = {}
    groups: dict[str, tuple[Path, tuple[str, ...]]] = {}
    for read in [_read_own, *(partial(_read_folder, folder) for folder in folders if folder.resolve() != PACKS)]:
        for path, raw, pack, found in read():
            faults += found
            if pack is not None and (first := packs.setdefault(pack.file.task, pack)) is not pack:
                faults.append(f"{path}: task: is '{pack.file.task}', as in {first.path}; every task must have its own "
                              "name; rename one")
            if pack is None and not found:
                faults += _add_groups(path, raw, groups)
    if not faults:
        faults += _group_faults(packs, groups)
    more = len(faults) - _MOST_FAULTS
    raise_faults(ConfigError, [*faults[:_MOST_FAULTS], *([f"... and {more} more faults like these; all packs must be right; "
                                                          "repair them"] if more > 0 else [])])
    return packs, {name: members for name, (_, members) in groups.items()}


@cache
def _read_own() -> list[_ReadFile]:
    return _read_folder(PACKS)


def _read_folder(folder: Path) -> list[_ReadFile]:
    files: list[_ReadFile] = []
    for path in sorted({*folder.glob("*.yaml"), *folder.glob("*/*.yaml")}):
        raw, faults = _read_yaml(path)
        pack = None
        if not faults and not path.name.endswith("groups.yaml"):
            pack, faults = _checked(path, raw)
        files.append((path, raw, pack, faults))
    return files


def _checked(path: Path, raw: dict[str, Any]) -> tuple[Pack | None, list[str]]:
    checked = validate(PackFile, raw, pack_schema.unknown_key)
    found = [*checked.faults, *pack_schema.function_faults(raw, FUNCTIONS)]
    if not checked.faults:
        found += [*pack_schema.kind_faults(raw["pack"]["rows"]), *pack_schema.metric_faults(raw),
                  *pack_schema.shape_faults(raw)]
    return (None if found else Pack(path, raw, checked.value)), [f"{path}: {key}: {fault}" for key, fault in found]


def _add_groups(path: Path, raw: dict[str, Any], groups: dict[str, tuple[Path, tuple[str, ...]]]) -> list[str]:
    faults = []
    for name, members in raw.items():
        if not (isinstance(members, list) and members and all(isinstance(member, str) for member in members)):
            faults.append(f"{path}: {name}: is {str(members)[:60]!r}; must be a list of names of tasks; "
                          f"write {name}: [task, task]")
        elif name in groups:
            faults.append(f"{path}: {name}: is also a group of {groups[name][0]}; every group must have its own name; "
                          "rename one")
        else:
            groups[str(name)] = (path, tuple(members))
    return faults


def _group_faults(packs: Mapping[str, Pack], groups: Mapping[str, tuple[Path, tuple[str, ...]]]) -> Iterator[str]:
    for name, (path, members) in groups.items():
        if name in packs:
            yield f"{path}: {name}: is the name of a task, too; a group must have its own name; rename the group"
        for member in members:
            if member not in packs:
                near = nearest_words(member, packs)
                yield (f"{path}: {name}: names '{member}', which is no task; must name tasks; "
                       + (did_you_mean(near) if near else "correct or remove it"))


def _read_yaml(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the table in a YAML file and its faults (then the table is empty)."""
    text, faults = read_text(path, "a task pack in YAML", "--packs")
    if faults:
        return {}, faults
    try:
        import yaml
    except ImportError:
        raise ConfigError("PyYAML is not installed; it is needed for task packs; "
                          "pip install 'megatron_ttl[evaluation]'") from None

    class PackLoader(yaml.SafeLoader):
        """Plain values, `!function`, no references: a few of them could stand for billions of values."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.events.AliasEvent):
                raise yaml.MarkedYAMLError(problem="references (*name) are not read",
                                           problem_mark=self.peek_event().start_mark)
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            names = [self.construct_object(key, deep=True) for key, _ in node.value]
            seen: set[str] = set()
            for (key, _), name in zip(node.value, names, strict=True):
                if not isinstance(name, str) or name in seen:
                    what = "stands there twice" if isinstance(name, str) else "is no text: write it in quotes"
                    raise yaml.MarkedYAMLError(problem=f"the key {name!r} {what}", problem_mark=key.start_mark)
                seen.add(name)
            return super().construct_mapping(node, deep)

    PackLoader.yaml_constructors = {tag: construct for tag, construct in yaml.SafeLoader.yaml_constructors.items()
                                    if str(tag).rpartition(":")[2] not in ("binary", "omap", "pairs", "set")}
    PackLoader.add_constructor("!function", lambda loader, node: FunctionName(loader.construct_scalar(node)))
    try:
        loader = PackLoader(text)
        value = loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        return {}, [f"{where}: {error.problem}; a pack must be plain YAML; repair this line"]
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        return {}, [f"{path}: {str(error).partition(chr(10))[0][:200]}; a pack must be plain YAML; repair it"]
    if not isinstance(value, dict) or nested_deeper(value, DEEPEST):
        what = f"is nested more than {DEEPEST} deep" if isinstance(value, dict) else f"holds {type(value).__name__}"
        return {}, [f"{path}: {what}; must be one table of keys; see packs/README.md"]
    return value, []
