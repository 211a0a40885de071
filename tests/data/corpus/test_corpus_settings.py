"""Every fault of a corpus file and of what it names, all at once, with its place and a way out."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megatron_ttl.data.corpus.plan import make_plan
from megatron_ttl.data.corpus.settings import load_corpus_file
from megatron_ttl.errors import ConfigError, UserError

GOOD = '[corpus]\noutput = "out"\n[[source]]\nname = "a"\nlicense = "CC0"\npaths = ["{}"]\n'


def write(folder: Path, text: str) -> Path:
    path = folder / "corpus.toml"
    path.write_text(text.replace("{}", str(folder / "a.jsonl")), encoding="utf-8")
    (folder / "a.jsonl").write_text(json.dumps({"text": "um"}) + "\n", encoding="utf-8")
    return path


FAULTS = {
    "unknown key": (GOOD.replace("output", "outptu"),
        r"corpus.toml: corpus.outptu: is not a key .*did you mean 'corpus.output'"),
    "unknown table": (GOOD + "[filter]\nx = 1\n", r"filter: is not a key .*did you mean 'filters'"),
    "unknown key of a source": (GOOD + 'path = ["x"]\n', r"source\[0\].path: .*did you mean 'source\[\].paths'"),
    "unknown key far from all": (GOOD + "zzzzzzzz = 1\n",
        r"source\[0\].zzzzzzzz: is not a key of the corpus file; must be one of name"),
    "key of a stage": (GOOD + "[dedup]\nneer = true\n", r"dedup.neer: .*did you mean 'dedup.near'"),
    "key of a filter": (GOOD + "[filters.gopher]\nmin_word = 3\n", r"filters.gopher.min_word: .*did you mean"),
    "wrong type": (GOOD.replace('"out"', '"out"\nshard_megabytes = "256"'),
        "corpus.shard_megabytes: is \"256\"; must be a whole number"),
    "out of bounds": (GOOD.replace('"out"', '"out"\nmax_bad_fraction = 2.0'),
        "corpus.max_bad_fraction: is 2.0; must be a number >= 0"),
    "missing": ('[corpus]\noutput = "x"\n', r"source: is missing; must be a list of tables"),
    "no licence": (GOOD.replace('license = "CC0"\n', ""), r"source\[0\].license: is missing; must be a text in quotes"),
    "name": (GOOD.replace('"a"', '"a b"'), r'source\[0\].name: is "a b"; must be of letters, digits, _, - and dots'),
    "name twice": (GOOD + GOOD.partition("\n[[")[2].join(["[[", ""]),
        r'source\[1\].name: is "a", as that of source\[0\]; must be another'),
    "nothing to read": (GOOD.replace("paths", "join_keys"), r"source\[0\].paths: is missing; must name files, or `dataset`"),
    "both": (GOOD + 'dataset = "x"\n', r"source\[0\].paths: stands beside dataset; must be one of the two"),
    "for datasets": (GOOD + 'revision = "x"\n', r"source\[0\].revision: is for a dataset; must stand beside `dataset`"),
    "two texts": (GOOD + 'text_key = "x"\njoin_keys = ["y"]\n', r"source\[0\].join_keys: stands beside text_key"),
    "format": (GOOD + 'format = "jsonll"\n', r"source\[0\].format: is \"jsonll\"; must be one of .*; did you mean 'jsonl'"),
    "predicate": (GOOD + 'keep_where = ["meta.x exists"]\ndrop_where = ["meta.x exists", "meta.x = 3"]\n',
                  r"source\[0\].drop_where\[1\]: is `meta.x = 3`; must be a field, an operator"),
    "toml": (GOOD + "x = \n", r"corpus.toml:7:5: .*; the corpus file must be TOML"),
    "empty": ("", r"corpus.toml: is empty; it must be a corpus file in TOML"),
    "no such file": (GOOD.replace("{}", "nichts.jsonl"),
        r"source\[0\].paths\[0\]: 'nichts.jsonl' does not exist; it must be a file, or a p"),
    "no match": (GOOD.replace("{}", "nichts-*.jsonl"),
        r"source\[0\].paths\[0\]: 'nichts-\*.jsonl' matches no file; it must match at least"),
    "a folder": (GOOD.replace("{}", "/tmp"), r"source\[0\].paths\[0\]: '/tmp' is not a file; .* write '/tmp/\*.jsonl'"),
    "given twice": (GOOD.replace('"{}"', '"{}", "{}"'),
        r"source\[0\].paths\[1\]: '.*a.jsonl' is given twice; every input is read once"),
    "suffix": (GOOD.replace("{}", "/proc/version"),
        r"source\[0\].paths: '/proc/version' has an unknown suffix; it must end in .jsonl"),
    "prefer": (GOOD + '[dedup]\nprefer = ["b"]\n',
        r'dedup.prefer\[0\]: is "b"; must be the name of a source; did you mean .a.'),
    "rule between keys": (GOOD + '[dedup]\nmin_words = 2\n',
        r"corpus.toml: dedup.min_words: is 2; it must be at least shingle_words"),
    "preset": (GOOD + '[filters]\npreset = "ptt"\n', r'filters.preset: is "ptt"; must be one of'),
    "pack": (GOOD + '[[decontamination.packs]]\nname = "x"\npath = "nichts.jsonl"\nkeys = ["q"]\n',
        "nichts.jsonl: does not exist"),
    "model": (GOOD + '[toxicity]\nmodel = "nichts"\n', "nichts"),
    "tokenizer": (GOOD.replace('"out"', '"out"\ntokenizer = "nichts"'), "nichts"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults(tmp_path, name):
    text, message = FAULTS[name]
    with pytest.raises(UserError) as caught:
        make_plan(write(tmp_path, text))
    assert any(re.search(message, fault) for fault in caught.value.faults), caught.value.faults
    assert len(caught.value.faults) == 1


def test_all_faults_at_once(tmp_path):
    text = (GOOD.replace("output", "outptu") + GOOD.replace('"CC0"', "3") + "[dedup]\nneer = 1\nrows = 0\n").replace(
        '[corpus]\noutput = "out"\n', "")
    with pytest.raises(ConfigError) as caught:
        load_corpus_file(write(tmp_path, text))
    assert {re.sub(r"^.*toml: (\S+):.*", r"\1", fault) for fault in caught.value.faults} == {
        "corpus.outptu", "source[1].license", "dedup.neer", "dedup.rows"}
    with pytest.raises(ConfigError) as caught:
        more = '[[source]]\nname = "b"\nlicense = "x"\npaths = ["y/*", "/tmp"]\n'
        make_plan(write(tmp_path, GOOD.replace("{}", "x.jsonl") + more))
    assert len(caught.value.faults) == 3


def test_all_that_is_not_there_at_once(tmp_path):
    """Inputs, preset and packs: what the file says is right, and nothing of it exists."""
    text = GOOD.replace('"{}"', '"gone.jsonl", "gone-*.jsonl"') + (
        '[filters]\npreset = "ptt"\n[[decontamination.packs]]\nname = "e"\npath = "e.jsonl"\nkeys = ["q"]\n')
    with pytest.raises(UserError) as refused:
        make_plan(write(tmp_path, text))
    assert [next(name for name in ("paths[0]", "paths[1]", "filters.preset", "e.jsonl") if name in fault)
            for fault in refused.value.faults] == ["paths[0]", "paths[1]", "filters.preset", "e.jsonl"]


def test_the_order_of_inputs_is_that_of_the_file_and_of_names(tmp_path):
    for name in ("b.jsonl", "a2.jsonl", "a10.jsonl", "deep/c.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("", encoding="utf-8")
    text = GOOD.replace('"{}"', f'"{tmp_path}/b.jsonl", "{tmp_path}/a?*.jsonl", "{tmp_path}/**/*.csv"')
    plan = make_plan(write(tmp_path, text))
    assert [Path(wanted.name).name for wanted in plan.inputs] == ["b.jsonl", "a10.jsonl", "a2.jsonl", "c.csv"]


def test_what_is_shipped_is_right(repository, monkeypatch):
    monkeypatch.chdir(repository)
    assert len(make_plan("configs/corpus/sample.toml").inputs) == 2
    settings = load_corpus_file("configs/corpus/pt.toml")
    assert settings.filters and settings.toxicity and settings.dedup and settings.decontamination
