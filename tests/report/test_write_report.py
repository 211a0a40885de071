"""A report on disk: signatures and sizes of drawings, one page that needs nothing else, all numbers beside."""

from __future__ import annotations

import csv
import re
import struct
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from made_runs import evaluation_rows, event_row, score_row, train_rows, write_run, write_scores

from megatron_ttl.errors import ConfigError, DiskError
from megatron_ttl.report import plots
from megatron_ttl.report.curves import run_figures
from megatron_ttl.report.figure import Figure, Series, thinned
from megatron_ttl.report.runs import read_runs
from megatron_ttl.report.write_report import write_report

FIGURES = {"training_loss", "held_out_loss", "held_out_perplexity", "scaling_laws", "learning_rate", "gradient_norm",
           "score_arc_pt_acc_norm"}
HOSTILE = "_x$y<b>&amp"


class Page(HTMLParser):
    """Collect what a page refers to, its names, and whether all that it opens is closed."""

    def __init__(self, text):
        super().__init__()
        self.addresses, self.names, self.open, self.tables, self.titles = [], [], [], [], 0
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "!doctype"):
            self.open.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
                self.addresses.append(value)
            if name == "id":
                self.names.append(value)
        self.titles += tag == "title"

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag != "meta":
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    place = tmp_path_factory.mktemp("report")
    rows = [*train_rows(300), *evaluation_rows(300, 50), event_row("resume", 40), event_row("spike", 60)]
    one, two = write_run(place / HOSTILE, rows), write_run(place / "b", train_rows(200, 10) + evaluation_rows(200, 50))
    write_scores(one / "scores.jsonl", [score_row(HOSTILE, 1000 * step, 0.25 + step / 1e4) for step in range(50, 301, 50)])
    more = write_scores(place / "more.jsonl", [score_row("b", 100000, 0.27), score_row("b", None, 0.27)])
    for name, formats in (("first", ("html", "png", "svg", "csv")), ("second", ("html", "svg", "csv"))):
        write_report([one, two], place / name, formats, ["besiroglu"], [more])
    return place


def test_every_figure_is_there_in_every_format(report):
    assert {path.name for path in (report / "first").iterdir()} == {
        *(f"{name}.{form}" for name in FIGURES for form in ("png", "svg", "csv")), "energy.csv", "report.html"}


def test_drawings_are_whole(report):
    for name in FIGURES:
        payload = (report / "first" / f"{name}.png").read_bytes()
        assert payload[:8] == b"\x89PNG\r\n\x1a\n" and payload[-8:-4] == b"IEND"
        assert struct.unpack(">II", payload[16:24]) == (1200, 690) and len(payload) > 10_000
        assert ElementTree.fromstring((report / "first" / f"{name}.svg").read_bytes()).tag.endswith("svg")


def test_the_same_numbers_give_the_same_bytes(report):
    for path in sorted((report / "second").iterdir()):
        assert path.read_bytes() == (report / "first" / path.name).read_bytes(), path.name
    figure = run_figures(read_runs([report / "b"]))[0]
    assert plots.png(figure) == plots.png(figure)


def test_the_files_beside_have_the_numbers_of_the_figures(report):
    runs = read_runs([report / HOSTILE, report / "b"])
    figure = run_figures(runs)[0]
    with open(report / "first" / "training_loss.csv", newline="") as handle:
        header, *rows = csv.reader(handle)
    assert header == ["series", "tokens", "value", "standard error"]
    expected = [[label, str(tokens), "" if value is None else repr(value), "" if error is None else repr(error)]
                for label, tokens, value, error in figure.table()]
    assert rows == expected and len(rows) == 2 * (300 + 20) + 2


def test_the_page_needs_nothing_else(report):
    text = (report / "first" / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert page.addresses and all(address.startswith("#") for address in page.addresses)
    assert {address[1:] for address in page.addresses} <= set(page.names)
    assert len(set(page.names)) == len(page.names), "two things have one name"
    assert not re.search(r"https?:|//[a-z]|@import|<script|<link|<img|<iframe|javascript:", text)
    assert all(place.startswith("#") for place in re.findall(r"url\(([^)]*)\)", text))
    assert "default-src 'none'" in text


def test_the_page_says_in_words_what_its_drawings_show(report):
    text = (report / "first" / "report.html").read_text()
    assert text.startswith('<!DOCTYPE html>\n<html lang="en">')
    for part in ("<svg", 'role="img"', "<desc", "aria-labelledby="):
        assert text.count(part) == len(FIGURES)
    assert "<title>Training report: _x$y&lt;b&gt;&amp;amp, b</title>" in text and "<b>" not in text
    assert "Held-out loss and scaling laws" in text and "not saturated: over the last 50% of the tokens" in text
    assert text.count("<table>") == len(FIGURES) + 2
    assert "Training loss: 59 of 642 rows, all are in training_loss.csv" in text


def test_colours_are_told_apart_without_red_and_green(report):
    """Okabe and Ito's palette; and curves differ in marks or lines too."""
    assert len(set(plots.PALETTE)) == 7 and plots.PALETTE[0] == "#0072b2"
    drawing = (report / "first" / "held_out_loss.svg").read_text()
    assert {"#0072b2", "#d55e00"} <= set(re.findall(r"#[0-9a-f]{6}", drawing))


@pytest.mark.parametrize("label", ["_private", "$\\frac{$", "a\n\x01\ud800", "名前"])
def test_any_label_can_be_drawn(label):
    figure = Figure("any", label, label, [Series(label, [1.0, 2.0], [1.0, 2.0])])
    assert plots.png(figure).startswith(b"\x89PNG")
    ElementTree.fromstring(plots.svg(figure))


def test_names_from_files_lead_nowhere(tmp_path):
    """A task or a prefix may be called anything: no file lands outside, nothing breaks the page."""
    odd = "../../\x1b[31m\ud800<i>"
    run = write_run(tmp_path / "a", evaluation_rows(10, 5, odd))
    write_scores(run / "scores.jsonl", [score_row("..\x00", 5000, 0.3, task="../../etc/" + "x" * 300)])
    write_report([run], tmp_path / "out", ["html", "svg", "csv"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "out"]
    assert len(list((tmp_path / "out").glob("score_.._.._etc_x*"))) == 2
    text = (tmp_path / "out" / "report.html").read_text()
    assert Page(text).open == [] and "<i>" not in text and "\x1b" not in text


def test_long_curves_are_thinned_to_what_can_be_seen():
    assert [list(thinned(*case)) for case in ((5, 10), (10, 5), (11, 5), (1, 1), (0, 5))] == [
        [0, 1, 2, 3, 4], [1, 3, 5, 7, 9], [1, 4, 7, 10], [0], []]
    long = Figure("long", "long", "y", [Series("r", list(range(1_000_000)), [1.0] * 1_000_000, kind="raw")])
    assert len(plots.svg(long)) < 200_000


def test_tables_alone_need_no_matplotlib(report, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write_report([report / "b"], tmp_path / "csv", formats=["csv"])
    assert (tmp_path / "csv" / "training_loss.csv").is_file()
    with pytest.raises(ConfigError, match=r"matplotlib: is not installed; it is needed for figures .*; pip install 'mega"):
        write_report([report / "b"], tmp_path / "all")
    assert not (tmp_path / "all").exists()


def test_what_was_asked_wrongly_is_said_at_once(report):
    with pytest.raises(ConfigError) as caught:
        write_report([report / "b"], formats=["pdf", "png"], window=-1.0)
    assert [fault.split(";")[0] for fault in caught.value.faults] == ["--format: 'pdf' is not known", "--window: -1.0"]


def test_a_place_that_is_a_file_is_a_sentence(report, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DiskError, match="could not be written"):
        write_report([report / "b"], tmp_path / "file", formats=["csv"])
    assert (tmp_path / "file").read_text() == "mine"


def test_long_tables_of_energy_are_thinned_and_their_gains_are_those_of_the_rows_shown(tmp_path, capsys):
    write_report([write_run(tmp_path / "a", train_rows(100) + evaluation_rows(100, 1))], tmp_path / "out", ["csv"])
    shown = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  ")][1:]
    assert len(shown) == 34 and [float(row[6]) for row in shown[1:]] == [0.03] * 33
    with open(tmp_path / "out" / "energy.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert len(rows) == 100 and float(rows[-1]["kWh spent"]) == pytest.approx(0.01)


def test_warnings_and_sentences_are_printed(report, capsys):
    write_report([report / HOSTILE, report / "b"], scores=[report / "more.jsonl"])
    said = capsys.readouterr()
    assert "1 scores do not say how many tokens" in said.err
    assert said.out.count("not saturated: over the last 50%") == 2
    assert "(energy: cpu estimated, gpu measured)" in said.out and "kWh per 0.01 nat" in said.out
