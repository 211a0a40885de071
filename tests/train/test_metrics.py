"""Rows reach the file, the screen and the mirror, and say what they must."""

from __future__ import annotations

import io
import json

import pytest

from megatron_ttl.config.schema import RunFile
from megatron_ttl.train.metrics import MetricLogger, format_row

RUN = RunFile.model_validate({
    "run": {"dir": "runs/x"},
    "model": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 4, "vocab_size": 256, "max_position_embeddings": 64},
    "data": {"sources": ({"prefix": "data/pt"},)},
    "train": {"sequence_length": 64, "tokens_per_step": 128, "steps": 40},
    "optimizer": {"lr": 1e-3},
    "schedule": {"kind": "constant"},
    "checkpoint": {"every_steps": 10},
    "energy": {"enabled": False},
})
ROW = {"event": "train", "step": 10, "tokens": 1280, "loss": 3.21434, "lr": 6e-4, "grad_norm": 1.2345,
       "tokens_per_s": 12345.6, "step_s": 2.0, "data_wait_s": 0.0123, "peak_memory_bytes": 3 << 30,
       "epochs": {"data/pt": 0.25}, "energy_kwh": 0.01234}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_has_every_figure_in_searchable_pairs():
    line = format_row({**ROW, "mfu": 0.4123, "eta_s": 3720.0}, 40)
    assert line == ("step 10/40  loss 3.2143  lr 6.00e-04  norm 1.23  tok/s 12.3k  mfu 41.2%  mem 3.0 GiB  "
                    "wait 0.012s  kWh 0.0123  eta 1 h 02 min")


def test_what_is_not_known_is_a_dash():
    line = format_row({"event": "train", "step": 1, "loss": 2.0}, 40)
    assert line == "step 1/40  loss 2.0000  lr -  norm -  tok/s -  mfu -  mem -  wait -  kWh -  eta -"


def test_other_events_have_their_own_lines():
    row = {"event": "evaluation", "step": 20, "loss/data/valid": 3.0, "perplexity/data/valid": 20.0855}
    assert format_row(row, 40) == "step 20/40  evaluation  data/valid: loss 3.0000 perplexity 20.09"
    row |= {"accuracy/agreement_pt": 0.625, "accuracy_stderr/agreement_pt": 0.0242, "accuracy/cloze_pt": 0.0}
    assert format_row(row, 40).endswith("20.09  agreement_pt: accuracy 62.5% +- 2.4%  cloze_pt: accuracy 0.0% +- -")
    assert format_row({"event": "checkpoint", "step": 20}, 40) == "step 20/40  checkpoint"


def test_a_row_is_kept_shown_and_completed(tmp_path):
    screen = io.StringIO()
    with MetricLogger(tmp_path / "metrics.jsonl", RUN, {}, stream=screen, devices=2,
                      device_name="NVIDIA H100 80GB HBM3") as metrics:
        metrics.row(ROW)
        metrics.row({"event": "checkpoint", "step": 10, "tokens": 1280})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["event"] for row in rows] == ["train", "checkpoint"]
    assert {key: rows[0][key] for key in ROW} == ROW
    assert rows[0]["eta_s"] == 60.0
    # formula C by hand: 6 x (2 x (4 x 64^2 + 3 x 64 x 128) + 64 x 256) + 6 x 2 x 64 x 64
    flops = 6 * (2 * (4 * 64**2 + 3 * 64 * 128) + 64 * 256) + 6 * 2 * 64 * 64
    assert rows[0]["mfu"] == pytest.approx(12345.6 * flops / (2 * 989e12), rel=1e-12)
    assert screen.getvalue().splitlines()[0].startswith("step 10/40  loss 3.2143  lr 6.00e-04")
    assert screen.getvalue().splitlines()[1] == "step 10/40  checkpoint"


def test_no_figure_for_the_peak_no_mfu(tmp_path):
    with MetricLogger(tmp_path / "metrics.jsonl", RUN, {}, stream=io.StringIO()) as metrics:
        assert "mfu" not in metrics.row(ROW)


def test_a_process_that_does_not_write_leaves_nothing(tmp_path, capsys):
    with MetricLogger(tmp_path / "metrics.jsonl", RUN, {}, writes=False) as metrics:
        metrics.row(ROW)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_the_same_line_and_a_bar(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    screen = Terminal()
    with MetricLogger(tmp_path / "metrics.jsonl", RUN, {}, stream=screen) as metrics:
        completed = metrics.row({**ROW, "loss": 2.5})
    assert format_row(completed, 40) in screen.getvalue()
    assert "10/40" in screen.getvalue().replace(format_row(completed, 40), "")
    assert "1 min 00 s left" in screen.getvalue()


def test_a_screen_that_went_away_does_not_stop_the_run(tmp_path):
    class Gone(io.StringIO):
        def write(self, _text: str) -> int:
            raise BrokenPipeError

    with MetricLogger(tmp_path / "metrics.jsonl", RUN, {}, stream=Gone()) as metrics:
        metrics.row(ROW)
        metrics.row(ROW)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_the_mirror_gets_every_row_and_its_run_goes_on(tmp_path, monkeypatch):
    from megatron_ttl.train import tracking

    seen = []

    class Remote:
        def log(self, row, step) -> None:
            seen.append((step, row["event"]))

        def finish(self) -> None:
            seen.append("end")

    opened = []
    monkeypatch.setattr(tracking, "WandbRun", lambda *given: opened.append(given) or Remote())
    run = RUN.model_copy(update={"log": RUN.log.model_copy(update={"wandb": "offline"})})
    with MetricLogger(tmp_path / "metrics.jsonl", run, {"zero": 1}, wandb_run_id="ab12cd34",
                      stream=io.StringIO()) as metrics:
        metrics.row(ROW)
        assert metrics.wandb_run_id == "ab12cd34"
    assert seen == [(10, "train"), "end"]
    assert opened[0][1] == tmp_path
    assert opened[0][2]["deepspeed"] == {"zero": 1} and opened[0][3] == "ab12cd34"
