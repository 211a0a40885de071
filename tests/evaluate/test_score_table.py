"""Tables: like beside like, what differs is named, golden texts in every format."""

from __future__ import annotations

import csv
import io
import json

import pytest
from score_rows import score

from megatron_ttl.errors import ConfigError, DataError
from megatron_ttl.evaluate.records import SCORES_FILE, append_records
from megatron_ttl.evaluate.score_formats import to_csv, to_json, to_latex, to_markdown, write_table
from megatron_ttl.evaluate.score_table import build_table, choose_scores, read_scores

RANDOM = {"random": 0.25, "longest": 0.2725}
TABLE = [
    score("arc_pt", 0.24, "ttl_160m", baselines=RANDOM, truncated=3),
    score("arc_pt", 0.31, "ttl_460m", baselines=RANDOM, contaminated=12, value_clean=0.305),
    score("arc_pt", 0.27, "third|model", stderr=None),
    score("assin2", 0.34, "ttl_160m", metric="f1_macro", baselines={"random": 0.498, "majority": 1 / 3}, n=2448, shots=15),
    score("assin2", 0.35, "ttl_460m", metric="f1_macro", baselines={"random": 0.498, "majority": 1 / 3}, n=2448, shots=15),
]
MARKDOWN = r"""| model | arc\_pt acc\_norm | assin2 f1\_macro | average |
| :-- | --: | --: | --: |
| ttl\_160m | 24.00 ± 1.25 † | 34.00 ± 1.25 † | 29.00 ± 0.88 † |
| ttl\_460m | 31.00 ± 1.25 | 35.00 ± 1.25 † | **33.00** ± 0.88 † |
| third\|model | 27.00 | - | - |
| *random* | 25.00 | 49.80 | 37.40 |
| *majority* | - | 33.33 | - |
| *longest* | 27.25 | - | - |

- values x 100 ± standard error; best: better than every other model by more than 1.96 standard errors of the difference, """ + (
    r"""unpaired; †: not better than every baseline by as much
- average of arc\_pt, assin2
- arc\_pt acc\_norm: 1,170 items, 25 shots, version 2.0, defined by lm-eval, data arc\_pt.jsonl, lm\_eval 0.4.13
- arc\_pt acc\_norm: ttl\_160m: 3 requests cut on the left
- arc\_pt acc\_norm: ttl\_460m: 12 items in its training data, 30.50 without them
- assin2 f1\_macro: 2,448 items, 15 shots, version 2.0, defined by lm-eval, data assin2.jsonl, lm\_eval 0.4.13
""")
LATEX = r"""\begin{tabular}{lrrr}
\toprule
model & arc\_pt acc\_norm & assin2 f1\_macro & average \\
\midrule
ttl\_160m & 24.00 $\pm$ 1.25 \textdagger{} & 34.00 $\pm$ 1.25 \textdagger{} & 29.00 $\pm$ 0.88 \textdagger{} \\
ttl\_460m & 31.00 $\pm$ 1.25 & 35.00 $\pm$ 1.25 \textdagger{} & \textbf{33.00} $\pm$ 0.88 \textdagger{} \\
third|model & 27.00 & - & - \\
\midrule
\emph{random} & 25.00 & 49.80 & 37.40 \\
\emph{majority} & - & 33.33 & - \\
\emph{longest} & 27.25 & - & - \\
\bottomrule
\end{tabular}
"""


def test_golden_markdown_and_latex():
    table = build_table(TABLE)
    assert to_markdown(table) == MARKDOWN
    assert to_latex(table).startswith(LATEX) and to_latex(table).count("\n% ") == 6


def test_csv_and_json_have_every_digit():
    table = build_table(TABLE)
    header, first, *_, majority, _ = csv.reader(io.StringIO(to_csv(table)))
    assert header == ["model", "kind", "arc_pt acc_norm", "arc_pt acc_norm stderr", "assin2 f1_macro",
                      "assin2 f1_macro stderr", "average", "average stderr"]
    assert first[:4] == ["ttl_160m", "model", "24.0", "1.25"]
    assert majority[:4] == ["majority", "baseline", "", ""] and float(majority[4]) == 100 * (1 / 3)
    parsed = json.loads(to_json(table))
    assert [column["averaged"] for column in parsed["columns"]] == [True, True]
    assert parsed["rows"][1]["scores"][0]["record"] == TABLE[1].model_dump(mode="json")


def test_terminal_and_files(tmp_path, capsys):
    write_table(build_table(TABLE))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["model", "(*", "best)", "arc_pt", "acc_norm", "assin2", "f1_macro", "average"]
    assert lines[2].endswith("33.00 ± 0.88 † *") and lines[4].startswith("  (random)")
    for suffix, text in ((".md", MARKDOWN), (".tex", LATEX)):
        write_table(build_table(TABLE), output=tmp_path / f"table{suffix}")
        assert (tmp_path / f"table{suffix}").read_text(encoding="utf-8").startswith(text)
    write_table(build_table(TABLE), "markdown")
    assert capsys.readouterr().out == MARKDOWN
    for name, output in (("terminal", tmp_path / "a.md"), (None, tmp_path / "a.pdf"), ("html", None)):
        with pytest.raises(ConfigError, match="--format: .* must be one of terminal, markdown, csv, latex, json, for a file"):
            write_table(build_table(TABLE), name, output)


UNLIKE = [
    ({"shots": 0}, "arc_pt: acc_norm: 25 shots in A, 0 shots in B; a column must hold scores of one kind", "0 shots"),
    ({"limit": 50}, "all items in A, first 50 items in B", "first 50"),
    ({"version": "1.0"}, "version 2.0 in A, version 1.0 in B", "version 1.0"),
    ({"definition": "ttl-paper"}, "defined by lm-eval in A, defined by ttl-paper in B", "defined by ttl-paper"),
    ({"prompt_checksum": "xxh3:0123456789"}, "prompt arc_pt in A, prompt 01234567 in B", "prompt 01234567"),
    ({"data_checksum": "xxh3:0123456789"}, "data rows of  in A, data 01234567 in B", "data 01234567"),
    ({"lm_eval": "0.4.9"}, "lm_eval 0.4.13 in A, lm_eval 0.4.9 in B", "lm_eval 0.4.9"),
    ({"sample": True}, "whole data in A, sample data in B", "sample"),
    ({"request_checksum": "xxh3:0123456789", "seed": 1}, "questions all of a in A, questions 01234567 in B", "questions 01234567"),
]


@pytest.mark.parametrize(("other", "message", "heading"), UNLIKE, ids=[next(iter(other)) for other, *_ in UNLIKE])
def test_unlike_scores_are_refused_or_shown_as_different(other, message, heading):
    rows = [score(model="A"), score(model="B", **other)]
    with pytest.raises(DataError, match=message):
        build_table(rows)
    table = build_table(rows, show_differences=True)
    assert [column.heading for column in table.columns][1] == f"arc_pt acc_norm ({heading})"
    assert [[cell is not None for cell in row.cells] for row in table.rows] == [[True, False], [False, True]]
    assert not table.averaged and all(row.average is None for row in table.rows), "one task twice is no average"


def test_every_difference_of_every_task_is_named_at_once():
    rows = [score(model="A"), score(model="B", shots=0, lm_eval="0.4.9"), score("bluex", model="A"),
            score("bluex", model="B", limit=5)]
    with pytest.raises(DataError) as caught:
        build_table(rows)
    assert len(caught.value.faults) == 2
    assert "25 shots in A, 0 shots in B; lm_eval 0.4.13 in A, lm_eval 0.4.9 in B" in caught.value.faults[0]


def test_samples_and_whole_data_have_no_table_in_common():
    rows = [score(sample=True), score("bluex")]
    with pytest.raises(DataError, match="arc_pt: sample data; bluex: whole data; a table must hold one or the other"):
        build_table(rows)
    table = build_table(rows, show_differences=True)
    assert [column.heading for column in table.columns] == ["arc_pt acc_norm (sample)", "bluex acc_norm"]
    assert not table.averaged
    alone = build_table([score(sample=True), score("bluex", sample=True)])
    assert all(column.heading.endswith("(sample)") for column in alone.columns) and alone.averaged == (0, 1)
    assert "data arc_pt.jsonl (a sample)" in " ".join(alone.notes)


def test_one_data_set_is_not_asked_in_two_definitions():
    rows = [score(), score("arc_pt_ttl", definition="ttl-paper", data_checksum="xxh3:rows of arc_pt")]
    with pytest.raises(DataError, match="arc_pt: defined by lm-eval, arc_pt_ttl by ttl-paper, on the same data"):
        build_table(rows)
    assert not build_table(rows, show_differences=True).averaged
    assert build_table([score("mc1"), score("mc2", data_checksum="xxh3:rows of mc1")]).averaged == (0, 1)


def test_the_best_is_best_beyond_chance_only():
    def marks(*figures):
        rows = build_table([score(value=value, stderr=error, model=f"m{place}") for place, (value, error) in enumerate(figures)])
        return [row.cells[0].best for row in rows.rows]

    assert marks((0.30, 0.01), (0.33, 0.01)) == [False, True]  # 3 points; 1.96 standard errors are 2.77
    assert marks((0.30, 0.01), (0.32, 0.01)) == [False, False]
    assert marks((0.30, 0.001), (0.33, 0.001), (0.31, 0.05)) == [False, False, False]  # the third may be anything
    assert marks((0.30, 0.01), (0.50, None)) == [False, False]
    assert marks((0.5, 0.001)) == [False]
    lower = [score("ppl", value, name, metric="perplexity", stderr=0.1, baselines={"random": 350.0})
             for name, value in (("a", 20.0), ("b", 12.0))]
    table = build_table(lower)
    assert [row.cells[0].best for row in table.rows[:2]] == [False, True]
    assert table.rows[0].cells[0].value == 20.0 and table.rows[0].cells[0].above_baselines


def test_averages_are_over_one_set_of_columns():
    whole = [score(task, value, model) for model in "ab" for task, value in (("x", 0.2), ("y", 0.4), ("z", 0.9))]
    table = build_table([*whole[:5], score("x", 0.5, "a", metric="acc", main=False)])
    assert table.averaged == (0, 1, 2), "the metric beside the score is not averaged"
    assert [None if row.average is None else round(row.average.value, 6) for row in table.rows] == [50.0, None]
    chosen = [score(task, metric="acc", main=False) for task in "xy"]
    assert build_table(chosen).averaged == (0, 1), "a metric that was asked for stands for its task"
    assert not build_table([score(), score("p", 12.0, metric="perplexity")]).averaged, "a perplexity is no share"
    assert not build_table([score()]).averaged, "one column is no average"


def test_names_of_strangers_are_written_out():
    table = build_table([score("a\x1b[31m", model="m\n| evil |", baselines={"\x07": 0.5}), score("b", model="m\n| evil |")])
    for text in (to_markdown(table), to_latex(table), to_csv(table)):
        assert not {"\x1b", "\x07"} & set(text) and "m\n" not in text
    assert len(to_markdown(table).splitlines()) == 9


def test_metrics_of_the_same_answers_tell_once_how_they_came_about():
    rows = [score(metric=metric, truncated=2, contaminated=0, shots=1, main=metric == "acc") for metric in ("acc", "acc_norm")]
    notes = build_table(rows).notes
    assert [note for note in notes if "pequeno" in note] == [
        "arc_pt acc: pequeno: 2 requests cut on the left; 0 items in its training data"]
    assert sum("1,170 items, 1 shot, version" in note for note in notes) == 2


def test_rows_are_told_apart():
    rows = build_table([score(), score(model_step=500), score(model_step=1000), score(model_checksum="xxh3:0123456789"),
                        score(dtype="bfloat16"), score(model="grande", seed=3), score(model="grande")]).rows
    assert [row.label for row in rows] == ["pequeno (float32) (pequeno)", "pequeno @ 500", "pequeno @ 1,000",
                                           "pequeno (float32) (01234567)", "pequeno (bfloat16)", "grande (seed 3)",
                                           "grande (seed 0)"]


def test_places_and_choices(tmp_path):
    for name in ("a", "b"):
        append_records(tmp_path / name / SCORES_FILE, [
            score(model=name), score(model=name, metric="acc", main=False), score("bluex", model=name)])
    records = read_scores([tmp_path / "a", tmp_path / "b" / SCORES_FILE, tmp_path / "a"])
    assert len(records) == 6
    assert {record.metric for record in choose_scores(records)} == {"acc_norm"}
    assert len(choose_scores(records, metrics=["all"])) == 6
    assert [(record.task, record.metric) for record in choose_scores(records, ["arc_pt"], ["acc"])] == [("arc_pt", "acc")] * 2
    with pytest.raises(DataError, match="--tasks: arc_p: no model has such a score; .* arc_pt, bluex; did you mean 'arc_pt'"):
        choose_scores(records, ["arc_p"], ["f1"])
    with pytest.raises(DataError, match="scores: there is none"):
        choose_scores([])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError) as caught:
        read_scores([tmp_path / "empty", tmp_path / "a", tmp_path / "none"])
    assert len(caught.value.faults) == 2
