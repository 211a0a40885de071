"""Every figure of the papers that follows from others, recomputed; misprints show, and a planted change shows too."""

from __future__ import annotations

import csv
import json
import shutil
from decimal import Decimal

import pytest

from megatron_ttl.errors import DataError
from megatron_ttl.report.paper import paper_checks, print_checks
from megatron_ttl.report.published import (
    AGREES,
    COMPUTED,
    CUT_OFF,
    DIFFERS,
    compare,
    print_published,
    published_names,
    read_published,
)

# figure, place of it among those of that name, our value, tolerance: worked out by hand from the papers.
VECTORS = [
    ("tokens per word, TTL", 0, 1.343, 5e-4), ("tokens per word, GPorTuguese-2", 0, 1.346, 5e-4),
    ("tokens per word, BERTimbau", 0, 1.487, 5e-4), ("tokens per word, Cabrita-3B", 0, 1.552, 5e-4),
    ("tokens per word, Sabiá-7B", 0, 2.002, 5e-4), ("fewer tokens than Llama 2, %", 0, 32.9, 0.05),
    ("parameters of TTL-160m", 0, 162417408, 0), ("parameters of TTL-460m", 0, 468239360, 0),
    ("parameters of TinyLlama with 32 heads, 4 for keys and values", 0, 1100048384, 0),
    ("parameters of TinyLlama with 16 heads, 16 for keys and values", 0, 1261529088, 0),
    ("parameters of TinyLlama with 16 heads, 4 for keys and values", 0, 1123117056, 0),
    ("training tokens of TTL-160m", 0, 3751936000, 0), ("training tokens of TTL-460m", 0, 9830400000, 0),
    ("steps of TTL-160m, 1 epoch", 0, 457968, 0), ("planned steps of TTL-460m, 2 epochs", 0, 1516845, 0),
    ("epochs of TTL-460m", 0, 1.58, 5e-3), ("steps of TTL-460m past 20 tokens per parameter", 0, 76953.125, 1e-9),
    ("loss for 1.6e+08 parameters, 3.5e+09 tokens, as printed", 0, 3.5264, 5e-5),
    ("loss for 4.6e+08 parameters, 9.3e+09 tokens, as printed", 0, 3.0411, 5e-5),
    ("loss for 4.6e+08 parameters, 9.5e+09 tokens, as printed", 0, 3.0372, 5e-5),
    ("perplexity for 4.6e8 parameters, 9.3e9 tokens", 0, 20.929, 5e-4),
    ("optimal tokens of TTL-160m, ttl-paper", 0, 1.559e9, 5e5), ("optimal tokens of TTL-460m, ttl-paper", 0, 5.228e9, 5e5),
    ("optimal tokens of TinyLlama-1.1B, ttl-paper", 0, 1.388e10, 5e6),
    ("optimal tokens for 7e10 parameters, constants as printed", 0, 1.598e12, 5e8),
    ("optimal tokens of TTL-460m, hoffmann-text", 0, 17.5e9, 5e7),
    ("optimal tokens of TTL-160m, hoffmann-tex", 0, 3.36e9, 1e7),
    ("optimal tokens of TinyLlama-1.1B, besiroglu", 0, 24.9e9, 5e7),
    ("loss of TTL-160m at its end, ttl-paper", 0, 3.505, 5e-4), ("loss of TTL-460m at its end, ttl-paper", 0, 3.027, 5e-4),
    ("loss of TTL-160m at its end, hoffmann-text", 0, 3.203, 5e-4),
    ("loss of TTL-460m at its end, hoffmann-tex", 0, 2.743, 5e-4),
    ("loss of TTL-160m at its end, besiroglu", 0, 3.145, 5e-4), ("loss of TTL-460m at its end, besiroglu", 0, 2.743, 5e-4),
    ("average of Pythia-410m", 0, 33.265, 1e-9), ("average of TTL-460m", 0, 33.0125, 1e-9),
    ("average of Bloom-560m", 0, 32.1375, 1e-9), ("average of Xglm-564M", 0, 31.9775, 1e-9),
    ("average of OPT-350m", 0, 31.7825, 1e-9), ("average of TTL-160m", 0, 31.1675, 1e-9),
    ("average of BERTimbau-large", 0, 92.10, 5e-3), ("average of BERTimbau-small", 0, 91.64, 5e-3),
    ("average of TTL-460m", 1, 91.19, 5e-3), ("average of TTL-160m", 1, 90.34, 5e-3),
    ("average of OPT-1.3B", 0, 51.44, 5e-3), ("average of Pythia-1.0B", 0, 47.87, 5e-3),
    ("average of Pythia-1.0B with BoolQ of the repository", 0, 48.30, 5e-3), ("average of Pythia-1.4B", 0, 51.33, 5e-3),
    ("average of TinyLlama-1.1B", 0, 52.97, 5e-3), ("average of Pythia-1.0B", 1, 14.99, 5e-3),
    ("average of Pythia-1.4B", 1, 17.74, 5e-3), ("average of TinyLlama-1.1B", 1, 19.87, 5e-3),
    ("mean of the 13 checkpoints on ARC", 0, 27.50, 5e-3), ("standard error of one checkpoint on ARC", 0, 1.3, 0.05),
    ("range of the checkpoints in standard errors", 0, 3.0, 0.05),
    ("perplexity bought by the second half", 0, 1.84, 1e-9), ("kWh, second half", 0, 57.95, 1e-9),
    ("kg CO2e per kWh, last row of Table 6", 0, 0.357, 5e-4), ("kg CO2e per kWh, TTL-460m", 0, 0.3655, 5e-5),
    ("kg CO2e per kWh, TTL-chat", 0, 0.45, 5e-3), ("kwh of TTL-460m by the log", 0, 112.974, 1e-9),
    ("hours of TTL-160m by the log", 0, 38.7, 0.05), ("hours of TTL-460m by the log", 0, 280.5, 0.05),
    ("mean tokens per second of TTL-160m", 0, 26912, 0.5), ("mean tokens per second of TTL-460m", 0, 9734, 0.5),
    ("peak tokens per second", 0, 29491.2, 1e-6), ("words per second on an A100", 0, 44.7, 0.05),
    ("MB of TTL-460m in 4 bits", 0, 340.3, 0.1), ("GPU hours of TinyLlama for 3e11 tokens", 0, 3472.2, 0.05),
    ("GPU hours of MPT-1.3B for 3e11 tokens", 0, 7920, 1e-9), ("days of TinyLlama's training", 0, 90.4, 0.05),
    ("average of TinyLlama at 3e12 tokens, less that at 2.5e12", 0, -0.89, 5e-3),
]
MISPRINTS = {
    "fewer tokens than Llama 2, %", "query heads of TinyLlama",
    "parameters of TinyLlama with 16 heads, 16 for keys and values",
    "steps of TTL-460m past 20 tokens per parameter", "alpha of Hoffmann et al.", "tokens of TTL-160m at 20 per parameter",
    "tokens of TTL-460m at 20 per parameter", "perplexity for 4.6e8 parameters, 9.3e9 tokens",
    "optimal tokens for 7e10 parameters, constants as printed", "average of Gpt2-small", "average of Multilingual GPT",
    "average of Pythia-1.0B", "average of TinyLlama-1.1B", "average of Pythia-1.4B", "BoolQ of Pythia-1.0B",
    "ARC-c of TinyLlama", "tokens of TTL-460m at 100000 steps", "kWh of TTL-460m by Table 6", "hours of TTL-160m by the log",
    "words per second on an A100", "GPU hours of TinyLlama for 3e11 tokens", "tokens of TinyLlama, three epochs",
}


@pytest.fixture(scope="module")
def folder(repository):
    return repository / "examples/paper/published"


@pytest.fixture(scope="module")
def checks(folder):
    return paper_checks(folder)


@pytest.mark.parametrize("figure, place, value, tolerance", VECTORS)
def test_a_figure_recomputed_from_published_rows(checks, figure, place, value, tolerance):
    found = [check for check in checks if check.figure == figure]
    assert found[place].computed == pytest.approx(value, abs=tolerance, rel=0)


def test_what_differs_from_print_is_known(checks):
    assert {check.figure for check in checks if check.verdict == DIFFERS} == MISPRINTS
    averages = {check.figure: check for check in checks if check.source.endswith("16640, Table 4")}
    assert [name for name, check in averages.items() if check.verdict == CUT_OFF] == [
        f"average of {model}" for model in ("Bloom-560m", "Xglm-564M", "TTL-160m", "OPT-125m")]


def test_every_figure_says_where_it_stands(checks):
    assert all(check.source for check in checks)
    assert all("arXiv" in check.source or "repository" in check.source for check in checks)


@pytest.mark.parametrize("table, column, row, value, figure", [
    ("ttl_table4", "arc", 1, "29.50", "average of TTL-460m"),
    ("ttl_table5", "average", 0, "92.11", "average of BERTimbau-large"),
    ("tinyllama_table3", "bbh_3shot", 2, "29.75", "average of TinyLlama-1.1B"),
    ("ttl_table6", "perplexity", 11, "11.87", "perplexity bought by the second half"),
    ("ttl_table3", "ttl_160m", 0, "8193", "peak tokens per second"),
    ("ttl_table2", "layers", 0, "24", "parameters of TTL-160m"),
    ("ttl_figure1b", "perplexity", 6, "15.95", "loss of TTL-460m at 300000 steps"),
    ("tinyllama_figure1", "gpu_hours", 2, "7902", "GPU hours of MPT-1.3B for 3e11 tokens")])
def test_a_planted_change_turns_the_verdict(folder, tmp_path, checks, table, column, row, value, figure):
    """A digit changed in a published row: what was right before is said to differ."""
    copy = tmp_path / "published"
    shutil.copytree(folder, copy)
    with open(copy / f"{table}.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    rows[row][column] = value
    with open(copy / f"{table}.csv", "w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    before, after = ([check.verdict for check in found if check.figure == figure] for found in (checks, paper_checks(copy)))
    assert before != after and after.count(DIFFERS) == before.count(DIFFERS) + 1


@pytest.mark.parametrize("printed, computed, verdict", [
    ("31.16", 31.1675, CUT_OFF), ("31.17", 31.1675, AGREES), ("33.26", 33.265, AGREES), ("31.16", 31.18, DIFFERS),
    ("4.58e5", 457968, AGREES), ("458000", 457968, DIFFERS), ("66", 32.9, DIFFERS),
    ("-0.5", -0.57, CUT_OFF), ("0.50", 0.5, AGREES)])
def test_the_digits_of_a_printed_figure_say_how_exact_it_is(printed, computed, verdict):
    assert compare(Decimal(printed), computed) == verdict


def test_the_table_shows_ours_next_to_theirs_and_counts(folder, capsys, checks):
    print_checks(folder)
    lines = capsys.readouterr().out.splitlines()
    line = next(line for line in lines if line.strip().startswith("fewer tokens than Llama 2, %"))
    assert line.split()[6:9] == ["66", "32.9", "differs"]
    counts = {verdict: sum(check.verdict == verdict for check in checks) for verdict in (DIFFERS, CUT_OFF, AGREES, COMPUTED)}
    assert lines[-1] == ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    print_checks(folder, as_json=True)
    assert json.loads(capsys.readouterr().out)["counts"] == counts


def test_published_rows_are_said_to_be_published(folder, capsys):
    for name in published_names(folder):
        print_published(folder, name)
        assert capsys.readouterr().out.startswith("PUBLISHED, not measured here; other harness, texts or machines: ")
    print_published(folder, "list")
    assert capsys.readouterr().out.split() == published_names(folder)


@pytest.mark.parametrize("text, fault", [
    ("a,b\n1,2\n", "has no column 'source'"), ("a,source,note\n1,s\n", r"x.csv:2: has 2 cells; it must have 3"),
    ("a,source,note\n1,,n\n", "x.csv:2: has no source"), ("a,source,note\n", "has no rows"), ("", "has no column 'source'")])
def test_a_damaged_table_is_refused(tmp_path, text, fault):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(DataError, match=fault):
        read_published(tmp_path, "x")


def test_what_is_no_number_and_what_is_missing_are_named(tmp_path, folder):
    (tmp_path / "x.csv").write_text("a,source,note\nnan,s,n\n")
    with pytest.raises(DataError, match=r"x.csv:2: a is 'nan'; it must be a number; correct it"):
        read_published(tmp_path, "x")[0].number("a")
    with pytest.raises(DataError, match="x.csv:2: has no column 'b'"):
        read_published(tmp_path, "x")[0].number("b")
    with pytest.raises(DataError, match="does not exist; it must be one of the published tables; did you mean 'ttl_table4'"):
        read_published(folder, "ttl_tabel4")
