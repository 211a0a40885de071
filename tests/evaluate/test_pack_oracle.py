"""Packs that keep lm-eval's names against the YAML files of the installed lm-eval: same requests, same scores."""

from __future__ import annotations

import json
import random

import pytest
from harness_tasks import asked, ours, scored, theirs

from megatron_ttl.evaluate.packs import find_tasks

LETTERS = "ABCDE"
# Texts that templates and cleaning could stumble over.
TEXTS = ["O rio corre.", "Quem [sic] disse?", "  dois  espaços  ", "É [title] assim", "a_b {{x}} {% y %}", "aspas \"e' fim",
         "emoji 🇧🇷 ção", "linha\nnova", "\\n cru", "12", "[1, 2]", "São Paulo"]


def texts(draw, count):
    return [draw.choice(TEXTS) + f" {draw.randrange(100)}" for _ in range(count)]


def arc_rows(draw, count, options=5):
    rows = []
    for number in range(count):
        choices = texts(draw, 4 if options == 4 else draw.choice((3, 4, 5)))
        rows.append({"id": f"r{number}", "question": draw.choice(TEXTS), "choices": choices,
                     "answer": draw.randrange(len(choices))})
    return rows


def okapi(row):
    """As the hub holds it."""
    options = {f"option_{letter}": row["choices"][number] if number < len(row["choices"]) else None
               for number, letter in enumerate("abcde")}
    return {"id": row["id"], "instruction": row["question"], **options, "answer": LETTERS[row["answer"]]}


def swag_rows(draw, count):
    return [{"ind": number, "activity_label": draw.choice(TEXTS), "ctx_a": draw.choice(TEXTS),
             "ctx_b": draw.choice(["", *TEXTS]), "endings": texts(draw, 4), "label": str(draw.randrange(4))}
            for number in range(count)]


def truth_rows(draw, count):
    rows = []
    for number in range(count):
        one, several = texts(draw, 4), texts(draw, 5)
        rows.append({"id": number, "question": draw.choice(TEXTS), "mc1_targets": {"choices": one, "labels": [1, 0, 0, 0]},
                     "mc2_targets": {"choices": several, "labels": [1, 1, 0, 0, 0]}})
    return rows


def flat(row):
    return {"question": row["question"], **{f"{name}_{key}": row[name][key] for name in ("mc1_targets", "mc2_targets")
                                            for key in ("choices", "labels")}}


def pair_rows(draw, count):
    return [{"id": number, "premise": draw.choice(TEXTS), "hypothesis": draw.choice(TEXTS),
             "relatedness_score": draw.choice((1.0, 2.5, 3.3, 5.0)),
             "entailment_judgment": draw.choice(("None", "Entailment"))}
            for number in range(count)]


def numbered(row):
    return {**row, "entailment_judgment": int(row["entailment_judgment"] == "Entailment")}


def blank(row):
    """A Winograd row with the blank of the hub in the place of the pronoun."""
    tokens, (first, after) = row["tokens"], row["pronoun_tokens"]
    at = 0
    for token in tokens[:first]:
        at = row["sentence"].index(token, at) + len(token)
    start = row["sentence"].index(tokens[first], at)
    end = start + len(" ".join(tokens[first:after]))
    return {"sentence": f"{row['sentence'][:start]}_{row['sentence'][end:]}", "option1": row["choices"][0],
            "option2": row["choices"][1], "answer": str(row["answer"] + 1)}


def winograd_rows(draw, count):
    rows = []
    for number in range(count):
        tokens = ["O", "gato", "viu", "o", "cão", "e", "ele", "fugiu", "."]
        rows.append({"id": str(number), "sentence": "O gato viu o cão e ele fugiu.", "tokens": tokens,
                     "pronoun_tokens": [6, 7], "choices": texts(draw, 2), "answer": draw.randrange(2)})
    return rows


def cloze_rows(draw, count):
    return [{"text": " ".join(texts(draw, 3)).strip()} for _ in range(count)]


OKAPI = "okapi/{}_multilingual/"
# our name: (their file, file of ours, rows, their shape of a row, names of their splits, shots to compare)
CASES = {
    "arc_pt": (OKAPI.format("arc") + "arc_pt.yaml", "arc_challenge_pt", arc_rows, okapi, ("test", "train"), (0, 3)),
    "hellaswag_pt": (OKAPI.format("hellaswag") + "hellaswag_pt.yaml", "hellaswag_pt", swag_rows, dict, ("val", None),
                     (0, 2)),
    "m_mmlu_pt": (OKAPI.format("mmlu") + "m_mmlu_pt.yaml", "mmlu_pt", lambda draw, count: arc_rows(draw, count, 4), okapi,
                  ("test", "train"), (0, 5)),
    "truthfulqa_pt_mc1": (OKAPI.format("truthfulqa") + "truthfulqa_pt_mc1.yaml", "truthfulqa_pt", truth_rows, flat,
                          ("val", None), (0,)),
    "truthfulqa_pt_mc2": (OKAPI.format("truthfulqa") + "truthfulqa_pt_mc2.yaml", "truthfulqa_pt", truth_rows, flat,
                          ("val", None), (0,)),
    "xwinograd_pt": ("xwinograd/xwinograd_pt.yaml", "xwinograd_pt", winograd_rows, blank, ("test", None), (0,)),
    "assin2_rte": ("portuguese_bench/assin2_rte.yaml", "assin2", pair_rows, numbered, ("test", "train"), (0,)),
    "assin2_sts": ("portuguese_bench/assin2_sts.yaml", "assin2", pair_rows, numbered, ("test", "train"), (0, 2)),
    "lambada_openai_mt_stablelm_pt": ("lambada_multilingual_stablelm/lambada_mt_stablelm_pt.yaml", "lambada_pt", cloze_rows,
                                      dict, ("test", None), (0,)),
}


def both(name, rows, demonstrations, tmp_path):
    """Return our task and lm-eval's over the same rows, each in its own shape."""
    path, file, _, shape, (test, pool), _ = CASES[name]
    files = {file: rows} | ({find_tasks()[name].load.args[0].files["fewshot"][:-6]: demonstrations} if pool else {})
    for stem, content in files.items():
        (tmp_path / f"{stem}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    task = find_tasks(data=tmp_path)[name]
    splits = {test: [shape(row) for row in rows]} | ({pool: [shape(row) for row in demonstrations]} if pool else {})
    if name.startswith("assin2"):
        splits["validation"] = splits["train"]
    if name == "arc_pt":
        splits["validation"] = splits["train"]
    return ours(task.config, task.load().splits), theirs(path, splits)


def answers_to(requests, draw):
    """Return answers with ties, overflow and nonsense among them."""
    replies = ["3", "4,7", "5.9", "nada", "Resposta: 2", "", "10", "1 ou 2"]
    return [[draw.choice(replies) if isinstance(one[1], dict) else
             (draw.choice((-1.0, -2.5, -2.5, -30.0, -300.0)), draw.random() < 0.3) for one in row] for row in requests]


def agree(name, mine, other, shots):
    for count in shots:
        mine.set_fewshot_seed(1)
        other.set_fewshot_seed(1)
        requests = asked(mine, count)
        assert requests == asked(other, count)
    answers = answers_to(requests, random.Random(3))
    our_rows, our_figures = scored(mine, answers)
    their_rows, their_figures = scored(other, answers)
    assert our_figures == pytest.approx(their_figures, abs=1e-12)
    if name != "assin2_sts":  # there the pair of a row is the other way round
        assert [list(row.items()) if "f1" in row else pytest.approx(row, abs=1e-12) for row in their_rows] == [
            list(row.items()) if "f1" in row else row for row in our_rows]
    assert mine.higher_is_better() == other.higher_is_better()
    targets = [[task.doc_to_target(row) for row in task.eval_docs] for task in (mine, other)]
    if name == "m_mmlu_pt":  # a letter there, its number here
        targets[1] = [LETTERS.index(letter) for letter in targets[1]]
    assert list(map(str, targets[0])) == list(map(str, targets[1]))


@pytest.mark.parametrize("name", CASES)
def test_requests_and_scores_are_those_of_lm_eval(name, tmp_path):
    draw = random.Random(name)
    rows, demonstrations = (CASES[name][2](draw, count) for count in (12, 8))
    agree(name, *both(name, rows, demonstrations, tmp_path), CASES[name][5])


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("hellaswag_pt", "lambada_openai_mt_stablelm_pt")])
def test_requests_and_scores_on_real_rows(name, tmp_path, shared_data):
    file = "mmlu_pt_valdev" if name == "m_mmlu_pt" else CASES[name][1]
    path = shared_data / "tasks" / f"{file}.sample.jsonl"
    if not path.is_file():
        pytest.skip(f"{path.name} is not on this machine")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    agree(name, *both(name, rows[8:24], rows[:8], tmp_path), CASES[name][5][:1])


def test_a_changed_word_is_seen(tmp_path):
    draw = random.Random(0)
    mine, other = both("arc_pt", arc_rows(draw, 3), arc_rows(draw, 3), tmp_path)
    mine.config.target_delimiter = ""
    assert asked(mine, 0) != asked(other, 0)
