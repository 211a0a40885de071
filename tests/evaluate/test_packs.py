"""Packs: which tasks there are, what is wrong with a file, what is missing, and from where."""

from __future__ import annotations

import json
import sys

import pytest

from megatron_ttl.data.corpus import hub as hub_door
from megatron_ttl.errors import ConfigError, DataError
from megatron_ttl.evaluate import packs
from megatron_ttl.evaluate.packs import choose_tasks, find_tasks, task_listing

PACK = """\
task: mine
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
pack:
  version: "1"
  definition: megatron_ttl
  language: gl
  prompt_language: gl
  source: written here
  license: CC0
  files: {test: mine.jsonl}
  rows: {question: text, choices: texts, answer: index}
  hub: {path: someone/mine, name: gl, splits: {test: test}, rename: {pregunta: question}}
  baseline: choices
"""
ROW = {"question": "Onde?", "choices": ["aquí", "alí"], "answer": 1}


def write(folder, text, name="mine.yaml"):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")


def test_a_folder_of_packs_is_found(tmp_path):
    write(tmp_path, PACK)
    write(tmp_path, PACK.replace("task: mine", "task: other"), "gl/other.yaml")
    write(tmp_path, "both: [mine, other, arc_pt]\n", "gl/groups.yaml")
    (tmp_path / "mine.jsonl").write_text(json.dumps(ROW) + "\n")
    tasks = find_tasks([tmp_path])
    assert {"mine", "other", "arc_pt", "mmlu_pt_ttl"} <= tasks.keys()
    task = tasks["mine"]
    assert (task.version, task.language, task.shots, task.metrics, task.license) == ("1", "gl", 0, ("acc",), "CC0")
    assert "pack" not in task.config and task.config["doc_to_text"] == "{{question}}"
    assert task.load().splits["test"][0]["answer"] == 1  # beside its pack
    data = tmp_path / "data"
    data.mkdir()
    (data / "mine.jsonl").write_text(json.dumps({**ROW, "answer": 0}) + "\n")
    assert find_tasks([tmp_path], data)["mine"].load().splits["test"][0]["answer"] == 0  # --data comes first


def test_names_groups_and_what_is_unknown(tmp_path):
    write(tmp_path, PACK)
    write(tmp_path, PACK.replace("task: mine", "task: other"), "other.yaml")
    write(tmp_path, "both: [other, mine]\n", "groups.yaml")
    (tmp_path / "mine.jsonl").write_text(json.dumps(ROW) + "\n")
    assert [task.name for task in choose_tasks(["mine", "both"], tmp_path, [tmp_path])] == ["mine", "other"]
    with pytest.raises(ConfigError, match=r"bth: is no task and no group.*did you mean 'both'(.|\n)*minne: .*'mine'"):
        choose_tasks(["bth", "minne"], tmp_path, [tmp_path])
    with pytest.raises(ConfigError, match="--tasks: is empty"):
        choose_tasks([], tmp_path)


def test_all_missing_files_are_told_at_once(tmp_path):
    with pytest.raises(DataError) as caught:
        choose_tasks(["arc_pt", "assin2_rte", "calame_pt"], tmp_path)
    assert len(caught.value.faults) == 3
    assert "arc_challenge_pt.jsonl is not in" in caught.value.faults[0]
    assert "alexandrainst/m_arc (pt) on the Hugging Face hub (licence: CC BY-NC 4.0), or add --hub" in caught.value.faults[0]
    assert "with sentence, last_word;" in caught.value.faults[2]
    with pytest.raises(DataError, match="arc_pt: arc_challenge_pt.jsonl is not in"):
        find_tasks(data=tmp_path)["arc_pt"].load()


CHANGES = [  # what is replaced, by what, what is said
    ("doc_to_text:", "doc_to_txt:", "mine.yaml: doc_to_txt: is no key of a pack here.*did you mean 'doc_to_text'"),
    ("  version:", "  verison:", r"pack\.verison: .*did you mean 'pack\.version'"),
    ('  version: "1"', "  version: 1", 'pack.version: is 1; must be a text in quotes.*write "1", in quotes'),
    ("megatron_ttl\n", "megatron\n", r'pack\.definition: is "megatron"; must be one of .*; choose one'),
    ("  baseline: choices", "  baseline: choice", r"pack\.baseline: .*did you mean 'choices'"),
    ("task: mine", "task: 'my task'", "mine.yaml: task: is"),
    ("task: mine\n", "task: arc_pt\n", r"task: is 'arc_pt', as in .*arc_pt\.yaml; every task must have its own name"),
    ("task: mine\n", "", "mine.yaml: task: is missing"),
    ("doc_to_choice: choices\n", "", "doc_to_choice: is missing; must say what can be chosen"),
    ("multiple_choice", "multiple_chice", "output_type: .*did you mean 'multiple_choice'"),
    ("multiple_choice", "generate_until", "generation_kwargs.until: is missing"),
    ("metric: acc,", "metric: acc_nrm,", r"metric_list\[0\]\.metric: .*did you mean 'acc_norm'"),
    ("metric: acc,", "metric: exact,", r"metric_list\[0\]\.metric: .*must be one of acc, acc_norm"),
    ("aggregation: mean", "aggregation: meen", r"metric_list\[0\]\.aggregation: .*did you mean 'mean'"),
    ("aggregation: mean", "aggregation: !function macro_f2", r"metric_list\[0\]\.aggregation: .*did you mean 'macro_f1'"),
    ("  - {metric: acc", "  - {metric: acc, aggregation: mean, higher_is_better: true}\n  - {metric: acc",
     'is "acc" again'),
    ('"{{question}}"', "!function os.system", "doc_to_text: is !function os.system; must be a registered one"),
    ("output_type", "description: !function letters\noutput_type", "description: is a function"),
    ("output_type", "process_results: letters\noutput_type", "process_results: .*write !function letters"),
    ("output_type", "dataset_path: json\noutput_type", "dataset_path: is not for packs"),
    ("output_type", "include: /etc/passwd\noutput_type", "include: is not for packs"),
    ("output_type", "task: again\noutput_type", r"mine.yaml:2:1: the key 'task' stands there twice"),
    ("output_type", "1: x\noutput_type", "the key 1 is no text"),
    ("mine.jsonl", "../mine.jsonl", r"pack\.files\.test: is"),
    ("mine.jsonl", "/etc/passwd", r"pack\.files\.test: is"),
    ("answer: index", "answer: indx", r"pack\.rows\.answer: .*did you mean 'index'"),
    ("answer: index", "answer: index into endings", r"pack\.rows\.answer: .*add endings"),
    ("choices: texts, ", "", r"pack\.rows\.answer: .*add choices"),
    ("answer: index", "answer: []", r"pack\.rows\.answer: is \[\]"),
    ("  baseline", "  demonstrations: {ids: [a]}\n  baseline", "pack.demonstrations: is given; its order counts only"),
    ("answer: index", "answer: !function letters", r"pack\.rows\.answer: is a function"),
    ("  license: CC0", "  license: 2024-01-01", "pack.license: is a date"),
]


@pytest.mark.parametrize(("old", "new", "message"), CHANGES)
def test_what_is_wrong_with_a_pack_is_said(tmp_path, old, new, message):
    assert old in PACK
    write(tmp_path, PACK.replace(old, new, 1))
    with pytest.raises(ConfigError, match=message):
        find_tasks([tmp_path])


@pytest.mark.parametrize(("text", "message"), [
    ("", "is empty"), ("- 1\n", "holds list"), ("task: [", r"broken\.yaml:1"), ("a: &x [1]\nb: *x\n", "references"),
    ("a: &a [x]\nb: &b [*a, *a]\n", "references"), ("a: !!python/object/apply:os.system [ls]\n", "could not determine"),
    ("a: !python/name:os.system\n", "could not determine"), ("- " * 4000, "a pack must be plain YAML"),
    ("a: " + "[" * 100 + "]" * 100, "nested more than"), ("a: \x00", "a pack must be plain YAML"),
    ("a: !function [x]\n", "expected a scalar"), ("x" * 200_000, "cannot be read"),
    ("a: 1\n---\nb: 2\n", "another document"),
    ("task: !!binary aGk=\n", "could not determine"), ("tag: !!set {a}\n", "could not determine"),
    ("a: 2024-99-99\n", "a pack must be plain YAML"), ("a: " + "9" * 5000, "a pack must be plain YAML|whole number"),
])
def test_hostile_yaml_is_one_sentence(tmp_path, text, message):
    write(tmp_path, text, "broken.yaml")
    with pytest.raises(ConfigError, match=message):
        find_tasks([tmp_path])


def test_without_pyyaml_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    packs._read_own.cache_clear()
    with pytest.raises(ConfigError, match=r"PyYAML is not installed; .*pip install 'megatron_ttl\[evaluation\]'"):
        find_tasks()


def test_all_faults_of_all_files_are_told_at_once(tmp_path):
    write(tmp_path, PACK.replace("doc_to_text", "doc_to_txt").replace("baseline: choices", "baseline: x"))
    write(tmp_path, PACK.replace("task: mine", "task: [1]"), "gl/b.yaml")
    write(tmp_path, "a: [", "c.yaml")
    with pytest.raises(ConfigError) as caught:
        find_tasks([tmp_path, tmp_path / "nowhere"])
    said = str(caught.value)
    assert all(part in said for part in ("doc_to_txt", "baseline", "b.yaml: task", "c.yaml:1", "nowhere: is no folder"))


@pytest.mark.parametrize(("groups", "message"), [
    ("both: [mine, arc_ptt]\n", "both: names 'arc_ptt', which is no task; .*did you mean 'arc_pt'"),
    ("mine: [arc_pt]\n", "mine: is the name of a task, too"), ("ttl_table4: [mine]\n", "is also a group of"),
    ("both: mine\n", "must be a list of names"), ("both: []\n", "must be a list of names"),
])
def test_groups_name_tasks(tmp_path, groups, message):
    write(tmp_path, PACK)
    write(tmp_path, groups, "groups.yaml")
    with pytest.raises(ConfigError, match=message):
        find_tasks([tmp_path])


def test_the_checksum_of_the_prompt_is_of_what_decides(tmp_path, monkeypatch):
    def checksum(text=PACK):
        write(tmp_path, text)
        return find_tasks([tmp_path])["mine"].prompt_checksum

    base = checksum()
    reordered = PACK.replace("doc_to_choice: choices\n", "").replace("task: mine\n", "doc_to_choice: choices\ntask: mine\n")
    for same in (PACK + "# remark\n", reordered, PACK.replace("license: CC0", "license: MIT"),
                 PACK.replace("output_type", "num_fewshot: 5\noutput_type")):
        assert checksum(same) == base
    others = [PACK.replace('"{{question}}"', '"{{question}} "'), PACK.replace('version: "1"', 'version: "2"'),
              PACK.replace("metric: acc,", "metric: acc_norm,"),
              PACK.replace("doc_to_choice: choices", "doc_to_choice: !function letters"),
              PACK.replace("output_type", 'target_delimiter: ""\noutput_type')]
    sums = [checksum(other) for other in others]
    assert len({base, *sums}) == 6

    cleaned = PACK.replace('"{{question}}"', "!function cleaned_question")
    before = checksum(cleaned)
    source = packs.inspect.getsource
    monkeypatch.setattr(packs.inspect, "getsource",
                        lambda one: source(one) + ("# changed" if one.__name__ == "cleaned" else ""))
    packs._source_text.cache_clear()
    assert checksum(cleaned) != before  # what the function calls is part of the definition
    assert checksum() == base
    packs._source_text.cache_clear()


def test_the_hub_is_asked_only_when_told(tmp_path, monkeypatch):
    """Against a stand-in for the hub: the real one cannot be reached here."""
    asked = []

    def rows(source):
        asked.append((source.dataset, source.dataset_config, source.split))
        yield {"pregunta": "Onde?", "choices": ["aquí", "alí"], "answer": 0, "sobra": None}

    monkeypatch.setattr(hub_door, "dataset_rows", rows)
    write(tmp_path, PACK)
    with pytest.raises(DataError, match="get it from someone/mine"):
        choose_tasks(["mine"], tmp_path, [tmp_path])
    task = choose_tasks(["mine"], tmp_path, [tmp_path], hub=True)[0]
    assert not asked
    data = task.load()
    assert data.splits == {"test": [{"question": "Onde?", "choices": ["aquí", "alí"], "answer": 0}]}
    assert (data.origin, asked) == ("someone/mine on the hub", [("someone/mine", "gl", "test")])
    (tmp_path / "mine.jsonl").write_text(json.dumps({**ROW, "answer": 0}) + "\n")
    local = choose_tasks(["mine"], tmp_path, [tmp_path], hub=True)[0].load()
    assert len(asked) == 1 and local.checksum == data.checksum  # local files first


def test_without_a_network_the_hub_is_one_sentence(tmp_path, monkeypatch):
    import huggingface_hub

    def no_network(*_, **__):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", no_network)
    message = r"arc_pt.*the hub does not give it.*Network is unreachable(.|\n)*arc_challenge_pt.jsonl"
    with pytest.raises(DataError, match=message):
        choose_tasks(["arc_pt"], tmp_path, hub=True)[0].load()


def test_the_list_says_what_is_there_and_what_is_missing(tmp_path):
    (tmp_path / "arc_challenge_pt.sample.jsonl").write_text((json.dumps(ROW) + "\n") * 3)
    (tmp_path / "assin2.jsonl.gz").write_bytes(b"broken")
    rows = {row.name: row for row in task_listing(tmp_path)}
    arc = rows["arc_pt_ttl"]
    assert (arc.items, arc.files, arc.sample) == (3, "arc_challenge_pt.sample.jsonl", True)
    assert (arc.shots, arc.metric) == (25, "acc_norm")
    assert "the whole arc_challenge_pt.jsonl, from alexandrainst/m_arc" in arc.missing and arc.groups == ("ttl_table4",)
    assert rows["assin2_rte"].items is None and "not packed with gzip" in rows["assin2_rte"].missing
    assert rows["calame_pt"].items is None and "calame_pt.jsonl is not in" in rows["calame_pt"].missing


def test_every_real_sample_is_read_by_some_task(shared_data):
    folder = shared_data / "tasks"
    if not folder.is_dir():
        pytest.skip("the real samples (../shared/data/tasks) are not on this machine")
    loaded, counts = set(), {}
    for task in find_tasks(data=folder).values():
        if not packs.find_files(task.load.args[0].files, [folder]).test:
            continue
        data = task.load()
        assert data.sample, task.name
        loaded.add(data.origin)
        counts[task.name] = sum(map(len, data.splits.values()))
    samples = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in folder.glob("*.sample.jsonl")}
    assert samples.keys() == loaded
    assert counts["arc_pt"] == samples["arc_challenge_pt.sample.jsonl"]
    assert counts["oab_exams_lb"] == samples["oab.sample.jsonl"]
    assert len(counts) >= 35
