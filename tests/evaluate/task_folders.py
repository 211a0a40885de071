"""A folder of packs and rows, for the tests of the command and its story."""

from __future__ import annotations

import json
from pathlib import Path

from small_tasks import questions

_PACK = """task: {name}
output_type: multiple_choice
doc_to_text: "{prompt}: {{{{question}}}}\\nResposta:"
doc_to_choice: choices
doc_to_target: answer
{more}
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
pack:
  version: "1.0"
  definition: megatron_ttl
  language: pt
  prompt_language: pt
  source: made for tests
  license: none
  files: {{test: {file}}}
  rows: {{question: text, choices: texts, answer: index}}
  baseline: choices
"""


def write_pack(folder: Path, name: str, prompt: str = "Pergunta", file: str = "questions.jsonl", more: str = "") -> None:
    """Write one task: a pack in `packs/`."""
    (folder / "packs").mkdir(parents=True, exist_ok=True)
    (folder / "packs" / f"{name}.yaml").write_text(_PACK.format(name=name, prompt=prompt, file=file, more=more))


def write_task_folder(folder: Path, names: tuple[str, ...] = ("toy_one", "toy_two"), items: int = 12) -> Path:
    """Write tasks over the same rows, which lie in `data/`, with prompts of their own."""
    for number, name in enumerate(names):
        write_pack(folder, name, f"Pergunta {number}")
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions(items)))
    return folder
