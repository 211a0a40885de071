"""Keys of a task pack: those of lm-eval that a pack may use, and our own table `pack`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field

from megatron_ttl.config.schema import Section
from megatron_ttl.config.suggest import did_you_mean, nearest_keys, nearest_words, split_key
from megatron_ttl.config.validate import without_indices

KINDS = ("text", "string", "texts", "strings", "integer", "integers", "number", "boolean", "index", "any")
"""Of a value in a row: `text` and the texts in `texts` are not empty, `index` points into `choices`."""


class FunctionName(str):
    """What stands behind `!function`: the name of a registered function."""


class FilesTable(Section):
    """Names of the files, without folder."""

    test: str = Field(pattern=r"^[\w.-]+\.jsonl$")
    """Rows that are asked about: a file name that ends in .jsonl."""
    fewshot: str | None = Field(default=None, pattern=r"^[\w.-]+\.jsonl$")
    """Rows for demonstrations; without the file they come from the test rows, never the row itself."""
    stand_in: str | None = Field(default=None, pattern=r"^[\w.-]+\.jsonl$")
    """Rows that are asked about, and marked as a sample, where the test file is missing."""


class SplitsTable(Section):
    """Names of the hub's splits."""

    test: str
    """Split that is asked about."""
    fewshot: str | None = None
    """Split for demonstrations."""


class HubTable(Section):
    """Where the same rows are on the Hugging Face hub."""

    path: str = Field(min_length=1)
    """Name of the data set."""
    name: str | None = None
    """Its configuration."""
    revision: str | None = None
    """A commit; without it a later run may read another version."""
    splits: SplitsTable
    """Its splits."""
    rename: dict[str, str] = Field(default_factory=dict)
    """Columns that have another name in our files: {theirs: ours}."""


class DemonstrationsTable(Section):
    """Rows that are the demonstrations, in this order."""

    ids: tuple[str, ...] = ()
    """Ids, in the demonstrations' file, or else in the test file, where they are no longer asked about."""
    rows: tuple[int, ...] = ()
    """Numbers from 0 in the demonstrations' file."""


class PackTable(Section):
    """What lm-eval does not ask for."""

    version: str = Field(min_length=1)
    """Of the definition; it changes whenever prompt, metric or rows change."""
    definition: Literal["lm-eval", "ttl-paper", "tinyllama-paper", "leaderboard-pt", "megatron_ttl"]
    """Who defined prompt and metric."""
    language: str = Field(min_length=2)
    """Of the items."""
    prompt_language: str = Field(min_length=2)
    """Of the words around them."""
    source: str = Field(min_length=1)
    """Where the items come from."""
    license: str = Field(min_length=1)
    """Of the items."""
    files: FilesTable
    """Names of the data files."""
    rows: dict[str, Any] = Field(min_length=1)
    """Keys that every row must have, and their kinds."""
    given: tuple[str, ...] = ()
    """Keys of the rows in the file, where `prepare` makes others of them."""
    prepare: str | None = None
    """Function that brings a row of another shape into this one, before it is checked."""
    unique: Literal["id", "none"] = "id"
    """Whether no two rows may share an id."""
    demonstrations: DemonstrationsTable | None = None
    """Which rows are the demonstrations; otherwise they are drawn."""
    hub: HubTable | None = None
    """Where the same rows are on the hub; asked only with --hub."""
    baseline: Literal["choices", "labels", "none"] = "none"
    """What answers without a model: one of the choices, one of the labels, or none."""


class MetricTable(Section):
    """One metric."""

    metric: str
    """Name, of lm-eval's or as process_results calls it; or a function."""
    aggregation: str
    """How the items become one figure."""
    higher_is_better: bool
    """Direction."""
    ignore_case: bool | None = None
    """Of exact_match."""
    ignore_punctuation: bool | None = None
    """Of exact_match."""
    ignore_numbers: bool | None = None
    """Of exact_match."""
    regexes_to_ignore: tuple[str, ...] | None = None
    """Of exact_match."""


class FewshotTable(Section):
    """How demonstrations differ from questions."""

    sampler: Literal["default", "first_n"] = "default"
    """Drawn, or the first ones."""
    samples: tuple[Any, ...] | str | None = None
    """Demonstrations written into the pack."""
    process_docs: str | None = None
    """Function for the rows of demonstrations."""
    doc_to_text: str | int | None = None
    """As in the task."""
    doc_to_choice: str | tuple[str, ...] | dict[str, str] | None = None
    """As in the task."""
    doc_to_target: str | int | tuple[Any, ...] | None = None
    """As in the task."""
    gen_prefix: str | None = None
    """As in the task."""
    fewshot_delimiter: str | None = None
    """As in the task."""
    target_delimiter: str | None = None
    """As in the task."""


class PackFile(Section):
    """One task."""

    task: str = Field(pattern=r"^[A-Za-z0-9_.-]+$", max_length=100)
    """Name of the task."""
    tag: str | tuple[str, ...] | None = None
    """Names under which it is listed with others."""
    output_type: Literal["multiple_choice", "loglikelihood", "loglikelihood_rolling", "generate_until"]
    """What is asked of the model."""
    doc_to_text: str | int
    """Prompt: the name of a key, a template, or a function."""
    doc_to_target: str | int | tuple[Any, ...]
    """Right answer: the name of a key, a template, or a function."""
    doc_to_choice: str | tuple[str, ...] | dict[str, str] | None = None
    """Answers to choose from."""
    process_docs: str | None = None
    """Function that changes the rows."""
    process_results: str | None = None
    """Function that scores the answers to one row."""
    description: str | None = None
    """Stands once, before everything."""
    target_delimiter: str | None = None
    """Between prompt and answer."""
    fewshot_delimiter: str | None = None
    """Between demonstrations."""
    gen_prefix: str | None = None
    """Begins the answer."""
    fewshot_config: FewshotTable | None = None
    """How demonstrations differ from questions."""
    num_fewshot: int | None = Field(default=None, ge=0, le=100)
    """Demonstrations; 0: never any."""
    metric_list: tuple[MetricTable, ...] = Field(min_length=1)
    """Metrics; the first one is the task's score."""
    generation_kwargs: dict[str, Any] | None = None
    """How answers are generated."""
    filter_list: tuple[dict[str, Any], ...] | None = None
    """What is done to generated answers before they are scored."""
    repeats: int | None = Field(default=None, ge=1, le=1000)
    """Answers to each question."""
    should_decontaminate: bool | None = None
    """Kept for lm-eval."""
    doc_to_decontamination_query: str | None = None
    """Kept for lm-eval."""
    pack: PackTable
    """What lm-eval does not ask for."""


# Where a function may stand; True: only a function may.
FUNCTION_PLACES = {
    "doc_to_text": False, "doc_to_target": False, "doc_to_choice": False, "doc_to_decontamination_query": False,
    "process_docs": True, "process_results": True, "metric_list[].metric": False, "metric_list[].aggregation": False,
    "fewshot_config.samples": False, "fewshot_config.process_docs": True, "fewshot_config.doc_to_text": False,
    "fewshot_config.doc_to_choice": False, "fewshot_config.doc_to_target": False, "pack.prepare": True,
}
_PACKS_DO_NOT = ("custom_dataset", "dataset_path", "dataset_name", "dataset_kwargs", "training_split", "validation_split",
                 "test_split", "fewshot_split", "metadata", "include", "use_prompt", "unsafe_code", "doc_to_image",
                 "doc_to_audio", "task_alias")
_METRICS = {
    "multiple_choice": ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "f1", "mcc", "brier_score", "exact_match",
                        "likelihood"),
    "loglikelihood": ("perplexity", "acc"),
    "loglikelihood_rolling": ("word_perplexity", "byte_perplexity", "bits_per_byte"),
    "generate_until": ("exact_match", "bleu", "chrf", "chrf++", "ter"),
}
_AGGREGATIONS = ("mean", "nanmean", "median", "perplexity", "weighted_perplexity", "bits_per_byte", "f1",
                 "matthews_corrcoef", "bleu", "chrf", "chrf++", "ter", "brier_score", "bypass")


def unknown_key(key: str) -> tuple[str, set[str]]:
    """Return the fault of a key that packs do not have, and the keys that were probably meant."""
    from megatron_ttl.config.describe import known_keys

    plain, own = without_indices(key), known_keys(PackFile)
    if plain in _PACKS_DO_NOT:
        return "is not for packs; data, splits and version stand in the table pack; remove it", set()
    section = split_key(plain)[0]
    near = nearest_keys(plain, own)
    if near:
        return f"is no key of a pack here; must be one of its keys; {did_you_mean(near)}", set(near)
    siblings = ", ".join(split_key(name)[1] for name in own if split_key(name)[0] == section)
    return f"is no key of a pack; must be one of {siblings or 'its keys'}; remove it", set()


def kind_faults(kinds: Mapping[str, Any], prefix: str = "pack.rows") -> Iterator[tuple[str, str]]:
    """Yield (dotted key, fault) of what is no kind of value: a word of KINDS, a list of labels, or a table of both."""
    for name, kind in kinds.items():
        key = f"{prefix}.{name}"
        if isinstance(kind, dict) and kind:
            yield from kind_faults(kind, key)
        elif isinstance(kind, list) and kind and all(type(label) in (str, int) for label in kind):
            continue
        elif isinstance(kind, str) and (kind in KINDS or kind.startswith("index into ")):
            target = kind.removeprefix("index into ") if " " in kind else "choices" if kind == "index" else name
            if target not in kinds:
                yield key, f'is "{kind}"; must point into a key that the rows have; add {target} to {prefix}'
        else:
            near = nearest_words(kind, KINDS) if isinstance(kind, str) else []
            yield key, (f"is {kind!r}; must be one of {', '.join(KINDS)}, 'index into KEY', a list of labels, or a table "
                        f"of these; {did_you_mean(near) if near else 'write one of them'}")


def function_faults(raw: Any, known: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted key, fault) of functions that nobody registered, or that stand where none may, or are missing."""
    if isinstance(raw, dict):
        for name, value in raw.items():
            yield from function_faults(value, known, f"{path}.{name}" if path else str(name))
    elif isinstance(raw, list):
        for number, value in enumerate(raw):
            yield from function_faults(value, known, f"{path}[{number}]")
    elif isinstance(raw, FunctionName):
        near = nearest_words(raw, known)
        if without_indices(path) not in FUNCTION_PLACES:
            yield path, f"is a function ({raw}); must be a plain value; write one"
        elif raw not in known:
            yield path, (f"is !function {raw}; must be a registered one: a pack brings no code; "
                         + (did_you_mean(near) if near else f"choose one of {', '.join(known)}"))
    elif isinstance(raw, str) and FUNCTION_PLACES.get(path):
        yield path, f'is "{raw}"; must be a registered function; write !function {raw}'


def metric_faults(raw: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (dotted key, fault) of metrics and aggregations that lm-eval does not have for this kind of task."""
    own = raw.get("process_results") is not None  # then the metrics are what that function says
    metrics = _METRICS[raw["output_type"]]
    names = []
    for number, entry in enumerate(raw["metric_list"]):
        name, aggregation = entry["metric"], entry["aggregation"]
        if not own and not isinstance(name, FunctionName) and name not in metrics:
            near = nearest_words(name, metrics)
            yield f"metric_list[{number}].metric", (f'is "{name}"; must be one of {", ".join(metrics)} for '
                                                    f"{raw['output_type']}, or process_results must name a function "
                                                    f"that counts it; {did_you_mean(near) if near else 'choose one'}")
        if not isinstance(aggregation, FunctionName) and aggregation not in _AGGREGATIONS:
            near = nearest_words(aggregation, _AGGREGATIONS)
            yield f"metric_list[{number}].aggregation", (f'is "{aggregation}"; must be one of '
                                                         f"{', '.join(_AGGREGATIONS)}, or a function; "
                                                         f"{did_you_mean(near) if near else 'choose one'}")
        if name in names:
            yield f"metric_list[{number}].metric", f'is "{name}" again; must stand there once; remove one'
        names.append(name)


def shape_faults(raw: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (dotted key, fault) of keys that contradict one another."""
    if raw["output_type"] == "multiple_choice" and raw.get("doc_to_choice") is None:
        yield "doc_to_choice", "is missing; must say what can be chosen in a multiple_choice task; add it"
    if raw["output_type"] == "generate_until" and not (raw.get("generation_kwargs") or {}).get("until"):
        yield "generation_kwargs.until", "is missing; must list the texts that end an answer; add them"
    if "demonstrations" in raw["pack"] and (raw.get("fewshot_config") or {}).get("sampler") != "first_n":
        yield "pack.demonstrations", "is given; its order counts only with fewshot_config.sampler first_n; add that"
