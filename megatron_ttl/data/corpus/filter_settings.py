"""What is filtered and how: the tables of a preset, and the same tables in a corpus file, which go before it.

A preset is a TOML file with every limit, stop word and keyword of a language; `gopher` and `pt` are shipped, any other
is a path. A key that neither gives is off.
"""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from megatron_ttl.config.describe import known_keys
from megatron_ttl.config.read import parse_toml, read_text
from megatron_ttl.config.schema import Section
from megatron_ttl.config.suggest import did_you_mean, nearest_keys, nearest_words, split_key
from megatron_ttl.config.validate import validate
from megatron_ttl.errors import ConfigError, raise_faults


def _only_false(switch: bool) -> bool:
    if switch:
        raise ValueError("true is no limit")
    return switch


Limit = float | Annotated[bool, AfterValidator(_only_false)] | None
"""A limit, `false` to switch its rule off, or absent: as the preset has it. Not `Literal[False]`: that takes 0 as well."""

PRESETS = resources.files("megatron_ttl.data.corpus") / "presets"
"""Folder of the shipped presets."""


class RepairTable(Section):
    """What is repaired before anything is measured."""

    mojibake: bool | None = None
    """Repair text that was decoded with the wrong encoding, with ftfy."""
    line_ends: bool | None = None
    """Turn every kind of line end into a line feed."""
    control_characters: bool | None = None
    """Remove control characters, but tab and line ends, and byte order marks."""
    normalization: Literal["none", "NFC", "NFKC"] | None = None
    """Unicode normal form of the text; NFKC also replaces ligatures, superscripts and wide characters."""


class LanguageTable(Section):
    """In which languages a text must be."""

    keep: tuple[str, ...] | None = None
    """ISO 639 codes as lid.176 has them: two letters where there are two."""
    min_score: Limit = Field(default=None, ge=0, le=1)
    """Least probability that the text is in one of these languages."""


class GopherTable(Section):
    """Limits of the rules of Rae et al. 2021; a text at its limit stays."""

    min_words: Limit = Field(default=None, ge=0)
    """Tokens with a letter or digit, at least."""
    max_words: Limit = Field(default=None, ge=0)
    """Tokens with a letter or digit, at most."""
    min_mean_word_length: Limit = Field(default=None, ge=0)
    """Characters of a word on average, at least."""
    max_mean_word_length: Limit = Field(default=None, ge=0)
    """Characters of a word on average, at most."""
    max_hash_ratio: Limit = Field(default=None, ge=0)
    """Hash signs per token."""
    max_ellipsis_ratio: Limit = Field(default=None, ge=0)
    """Ellipses per token."""
    max_bullet_lines: Limit = Field(default=None, ge=0, le=1)
    """Share of lines that begin with one of `bullets`."""
    max_ellipsis_lines: Limit = Field(default=None, ge=0, le=1)
    """Share of lines that end in an ellipsis."""
    min_alphabetic_words: Limit = Field(default=None, ge=0, le=1)
    """Share of tokens with a letter: one minus the non-alphabetic share."""
    min_stop_words: Limit = Field(default=None, ge=0)
    """Different `stop_words` in the text."""
    max_duplicate_paragraphs: Limit = Field(default=None, ge=0, le=1)
    """Share of paragraphs that stood before."""
    max_duplicate_paragraph_characters: Limit = Field(default=None, ge=0, le=1)
    """Share of characters in such paragraphs."""
    max_duplicate_lines: Limit = Field(default=None, ge=0, le=1)
    """Share of lines that stood before."""
    max_duplicate_line_characters: Limit = Field(default=None, ge=0, le=1)
    """Share of characters in such lines."""
    max_top_2_gram: Limit = Field(default=None, ge=0, le=1)
    """Share of characters in the most frequent pair of tokens."""
    max_top_3_gram: Limit = Field(default=None, ge=0, le=1)
    """The same of three tokens."""
    max_top_4_gram: Limit = Field(default=None, ge=0, le=1)
    """The same of four tokens."""
    max_duplicate_5_gram: Limit = Field(default=None, ge=0, le=1)
    """Share of characters in runs of five tokens that stood before."""
    max_duplicate_6_gram: Limit = Field(default=None, ge=0, le=1)
    """The same of six tokens."""
    max_duplicate_7_gram: Limit = Field(default=None, ge=0, le=1)
    """The same of seven tokens."""
    max_duplicate_8_gram: Limit = Field(default=None, ge=0, le=1)
    """The same of eight tokens."""
    max_duplicate_9_gram: Limit = Field(default=None, ge=0, le=1)
    """The same of nine tokens."""
    max_duplicate_10_gram: Limit = Field(default=None, ge=0, le=1)
    """The same of ten tokens."""
    stop_words: tuple[str, ...] | None = None
    """Words that prose of the language cannot do without; upper and lower case are the same."""
    bullets: tuple[str, ...] | None = None
    """Signs that begin an entry of a list."""


class FinewebTable(Section):
    """Limits of the rules that FineWeb added; a text at its limit stays."""

    min_line_punctuation: Limit = Field(default=None, ge=0, le=1)
    """Share of lines that end with one of `sentence_ends`."""
    max_duplicate_line_characters: Limit = Field(default=None, ge=0, le=1)
    """Share of characters, line ends not counted, in lines that stood before."""
    max_newline_ratio: Limit = Field(default=None, ge=0)
    """Line ends per token."""
    sentence_ends: tuple[str, ...] | None = None
    """Signs that end a line of prose."""


class TranslatedCodeTable(Section):
    """Code whose keywords were translated with the text around it."""

    flag: bool | None = None
    """Note how many lines of such code a text has."""
    max_lines: Limit = Field(default=None, ge=0)
    """Most lines of it that a text may have."""
    keywords: tuple[str, ...] | None = None
    """Translated keywords, such as `importar NAME` and `imprimir(`; NAME stands for a name with dots."""


class PersonalDataTable(Section):
    """What is masked in the text."""

    mask_email: bool | None = None
    """Mask e-mail addresses."""
    mask_cpf: bool | None = None
    """Mask Brazilian taxpayer numbers whose check digits are right, with their dots or without."""
    email_token: str | None = None
    """What stands in place of an address."""
    cpf_token: str | None = None
    """What stands in place of a number."""


class FilterTables(Section):
    """All tables of a preset."""

    repair: RepairTable = Field(default_factory=RepairTable)
    """What is repaired before anything is measured."""
    language: LanguageTable = Field(default_factory=LanguageTable)
    """In which languages a text must be."""
    gopher: GopherTable = Field(default_factory=GopherTable)
    """Quality and repetition."""
    fineweb: FinewebTable = Field(default_factory=FinewebTable)
    """Lines and their ends."""
    translated_code: TranslatedCodeTable = Field(default_factory=TranslatedCodeTable)
    """Code whose keywords were translated."""
    personal_data: PersonalDataTable = Field(default_factory=PersonalDataTable)
    """What is masked."""


class FilterSettings(FilterTables):
    """A preset, and what is to be different from it: `gopher.min_words = 20`, `gopher.max_top_2_gram = false`."""

    preset: str = Field(default="pt", min_length=1)
    """Name of a shipped preset, or the path of a TOML file like it."""


def preset_names() -> list[str]:
    """Return the names of the shipped presets."""
    return sorted(entry.name.removesuffix(".toml") for entry in PRESETS.iterdir()
                  if entry.name.endswith(".toml"))


def read_preset(preset: str) -> FilterTables:
    """Return a shipped preset, or one at a path, checked.

    Raises:
        ConfigError: there is none, or with every fault in it.
    """
    if re.fullmatch(r"[\w-]+", preset):
        names = preset_names()
        if preset not in names:
            near = nearest_words(preset, names)
            raise ConfigError(f'filters.preset: is "{preset}"; must be one of {", ".join(names)}, or the path of a TOML '
                              f"file; {did_you_mean(near) if near else 'write one of these'}")
        where = Path(f"{preset}.toml")
        text, faults = (PRESETS / where.name).read_text(encoding="utf-8"), []
    else:
        where = Path(preset)
        text, faults = read_text(where, "a preset of filters in TOML", "filters.preset")
    raw, broken = parse_toml(text, where)
    checked = validate(FilterTables, raw, unknown_key)
    raise_faults(ConfigError, [*faults, *broken] or [f"{where}: {key}: {fault}" for key, fault in checked.faults])
    return checked.value


def resolve(settings: FilterSettings) -> FilterTables:
    """Return the preset with what the settings say differently.

    Raises:
        ConfigError: the preset is wrong, or both together contradict themselves.
    """
    preset = read_preset(settings.preset)
    tables = {name: type(table).model_construct(**{**dict(table), **_given(getattr(settings, name))})
              for name, table in preset}
    merged = FilterTables.model_construct(**tables)
    raise_faults(ConfigError, _contradictions(merged))
    return merged


def is_set(limit: float | None) -> bool:
    """Tell whether a rule with this limit is on: 0 is a limit, false and an absent one are none."""
    return limit is not None and limit is not False


def _given(table: Section) -> dict[str, Any]:
    return {name: value for name, value in table if value is not None}


def unknown_key(key: str) -> tuple[str, set[str]]:
    """Return the fault of a key that the tables do not have, and the keys that were probably meant."""
    known = known_keys(FilterTables)
    if near := nearest_keys(key, known):
        return f"is not a key of filters; must be one of its keys; {did_you_mean(near)}", set(near)
    section = split_key(key)[0]
    siblings = [split_key(name)[1] for name in known if split_key(name)[0] == section]
    return f"is not a key of filters; must be one of {', '.join(siblings) or 'its tables'}; remove it", set()


def _contradictions(tables: FilterTables) -> list[str]:
    """Find rules that lack the words they go by, and limits that leave nothing."""
    faults = []
    for table, rule, data in (("gopher", "min_stop_words", "stop_words"), ("gopher", "max_bullet_lines", "bullets"),
                              ("fineweb", "min_line_punctuation", "sentence_ends"), ("language", "min_score", "keep"),
                              ("translated_code", "max_lines", "keywords")):
        values = getattr(tables, table)
        if is_set(getattr(values, rule)) and not getattr(values, data):
            faults.append(f"filters.{table}.{data}: is empty; must be given, for {rule} goes by it; "
                          f"write a list, or {rule} = false")
    for name in ("words", "mean_word_length"):
        least, most = getattr(tables.gopher, f"min_{name}"), getattr(tables.gopher, f"max_{name}")
        if is_set(least) and is_set(most) and least > most:
            faults.append(f"filters.gopher.min_{name}: is {least:g}; must be <= max_{name}, {most:g}, or no text is left; "
                          "change one of the two")
    wanted = len(set(tables.gopher.stop_words or ()))
    if tables.gopher.stop_words and is_set(tables.gopher.min_stop_words) and tables.gopher.min_stop_words > wanted:
        faults.append(f"filters.gopher.min_stop_words: is {tables.gopher.min_stop_words:g}; must be <= {wanted}, the "
                      "number of stop_words, or no text is left; lower it")
    return faults
