"""The worked example of the guide: its files, copied out of it, are a task that asks what the guide shows."""

from __future__ import annotations

import re

from harness_tasks import asked, ours, scored

from megatron_ttl.evaluate.packs import PACKS, choose_tasks, task_listing


def test_the_example_of_the_guide_works(tmp_path):
    guide = (PACKS / "README.md").read_text(encoding="utf-8")
    files = re.findall(r"^`(galego/[\w./]+)`[^\n]*\n\n```\w+\n(.*?)```$", guide, re.DOTALL | re.MULTILINE)
    assert [name for name, _ in files] == [f"galego/gl/{name}" for name in ("seguinte_gl.yaml", "seguinte_gl.jsonl",
                                                                            "groups.yaml")]
    for name, text in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")

    listed = {row.name: row for row in task_listing(tmp_path, [tmp_path / "galego"])}["seguinte_gl"]
    assert (listed.items, listed.files, listed.missing, listed.groups) == (4, "seguinte_gl.jsonl", "", ("galego",))

    task = choose_tasks(["galego"], tmp_path, [tmp_path / "galego"])[0]
    built = ours(task.config, task.load().splits)
    plain = asked(built)
    assert plain[1] == [("O panadeiro meteu a masa no", " río."), ("O panadeiro meteu a masa no", " forno.")]
    shown = re.search(r"```text\n(O panadeiro.*?)\n```", guide, re.DOTALL)[1]
    with_one = {context for seed in range(8) for context, _ in (built.set_fewshot_seed(seed), asked(built, 1)[0])[1]}
    assert shown in with_one and not any(context.count("Sabela") > 1 for context in with_one)
    _, figures = scored(built, [[(-1.0, False), (-2.0, False)]] * 4)
    assert figures["acc"] == 0.5


def test_the_guide_names_every_key_of_a_pack():
    from megatron_ttl.evaluate.pack_schema import KINDS, PackFile, PackTable

    guide = (PACKS / "README.md").read_text(encoding="utf-8")
    keys = [*PackFile.model_fields, *PackTable.model_fields, *KINDS]
    assert not [key for key in keys if f"`{key}" not in guide]
