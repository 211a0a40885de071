"""Build the steps that repair, judge and mask a document, from a preset and what a corpus file says differently."""

from __future__ import annotations

import unicodedata

from megatron_ttl.data.corpus.document import Document, Dropped, Step
from megatron_ttl.data.corpus.filter_settings import FilterSettings, FilterTables, is_set, resolve
from megatron_ttl.data.corpus.language import language_step
from megatron_ttl.data.corpus.repair import (
    control_characters_step,
    line_ends_step,
    mojibake_step,
    normalization_step,
    personal_data_step,
)
from megatron_ttl.data.corpus.text_rules import RULES, LanguageSigns, broken_rule
from megatron_ttl.data.corpus.translated_code import translated_code_step

__all__ = ["FilterSettings", "build_steps", "limits_of", "signs_of"]


def build_steps(settings: FilterSettings) -> list[tuple[str, Step]]:
    """Return the steps that are switched on, each with its name, in the order in which they must be applied.

    Repair comes first, so that what is judged is what is kept; masks come last, so that they do not disturb the rules.
    The model of the language step is read here: build once per process.

    Raises:
        ConfigError: the preset is wrong, or contradicts the settings.
        DataError: a library that a step needs is not installed.
    """
    tables = resolve(settings)
    steps: list[tuple[str, Step]] = []
    if tables.repair.mojibake:
        steps.append(("mojibake", mojibake_step()))
    if tables.repair.line_ends:
        steps.append(("line_ends", line_ends_step))
    if tables.repair.control_characters:
        steps.append(("control_characters", control_characters_step))
    if tables.repair.normalization in ("NFC", "NFKC"):
        steps.append(("normalization", normalization_step(tables.repair.normalization)))
    if is_set(tables.language.min_score):
        steps.append(("language", language_step(tables.language.keep or (), float(tables.language.min_score or 0))))
    if limits := limits_of(tables):
        steps.append(("text_rules", _text_rules_step(limits, signs_of(tables))))
    code = tables.translated_code
    if code.flag or is_set(code.max_lines):
        steps.append(("translated_code", translated_code_step(
            code.keywords or (), float(code.max_lines or 0) if is_set(code.max_lines) else None)))
    masks = tables.personal_data
    if masks.mask_email or masks.mask_cpf:
        steps.append(("personal_data", personal_data_step((masks.email_token or "") if masks.mask_email else None,
                                                          (masks.cpf_token or "") if masks.mask_cpf else None)))
    return steps


def limits_of(tables: FilterTables) -> dict[str, float]:
    """Return the limit of each rule on texts that is switched on, by the rule's name."""
    limits = {}
    for rule in RULES:
        table, _, key = rule.name.partition(".")
        limit = getattr(getattr(tables, table), key)
        if is_set(limit):
            limits[rule.name] = float(limit)
    return limits


def signs_of(tables: FilterTables) -> LanguageSigns:
    """Return the words and signs of the language that the rules go by."""
    return LanguageSigns(
        frozenset(unicodedata.normalize("NFC", word).lower() for word in tables.gopher.stop_words or ()),
        tuple(tables.gopher.bullets or ()), tuple(tables.fineweb.sentence_ends or ()))


def _text_rules_step(limits: dict[str, float], signs: LanguageSigns) -> Step:
    def apply(document: Document) -> Document | Dropped:
        return broken_rule(document.text, limits, signs) or document

    return apply
