"""Runs of the real loop on two sources and several stages: stopped, resumed, cut otherwise, changed, left out."""

from __future__ import annotations

import contextlib
import io
import json
from collections import Counter
from pathlib import Path

import pytest
from test_loop import losses, rows, same_tensors
from tiny_folder import documents, write_dataset
from tiny_session import train_here, write_data, write_settings

from megatron_ttl.config.load import load_settings
from megatron_ttl.errors import ConfigError, UserError
from megatron_ttl.plan.forecast import dry_run
from megatron_ttl.testing import run_distributed
from megatron_ttl.train.open_data import open_data

GENTLE = ["optimizer.lr=1e-3", "evaluation.prefixes=[]", "evaluation.every_steps=none"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = write_data(tmp_path_factory.mktemp("data") / "data")
    write_dataset(folder / "small", folder / "tokenizer", documents(6, seed=3))
    return folder


def staged(data, *stages):
    """Overrides for two sources; steps have 8 samples of 32 tokens."""
    tables = ", ".join(f"{{{f'until_tokens={until}, ' if until else ''}weights={{train={a}, small={b}}}}}"
                       for until, a, b in stages)
    return [*GENTLE, f'data.sources=[{{prefix="{data}/train"}}, {{prefix="{data}/small"}}]', f"data.stages=[{tables}]"]


def attempt(mesh, deepspeed, run, overrides, stop_after=None, allow=(), skip_steps=()):
    """Train; return the exit code, or what was said against it."""
    try:
        skips = [f"train.skip_steps={json.dumps(skip_steps)}"] if skip_steps else []
        return train_here(mesh, deepspeed, run, [*overrides, *skips], stop_after, allow)
    except UserError as error:
        return str(error)


def said(mesh, *arguments):
    """Return what a run said to people."""
    with contextlib.redirect_stderr(io.StringIO()) as stream:
        attempt(mesh, *arguments)
    return stream.getvalue()


def launch(folder, data, name, overrides, *rest, processes=1, function=attempt):
    deepspeed, run = write_settings(folder, data, folder / "unused")
    return run_distributed(function, processes, str(deepspeed), str(run), [*overrides, f"run.dir={folder / name}"], *rest)


def record(folder, step=12):
    return json.loads((Path(folder) / f"checkpoints/step-{step:08d}/record.json").read_text())


THREE = [(640 + 32, 0.6, 0.4), (2048, 0, 1), (None, 1, 3)]  # the first ends within step 3


def test_a_run_stopped_in_any_stage_goes_on_bit_for_bit(tmp_path, data):
    """Stopped in the first, second and third stage, and in a step that two stages share; the ledger is exact."""
    overrides = staged(data, *THREE)
    assert launch(tmp_path, data, "whole", overrides) == [0]
    for k in (2, 3, 6, 10):
        assert launch(tmp_path, data, f"k{k}", overrides, k) == [85]
        assert launch(tmp_path, data, f"k{k}", overrides) == [0]
        assert losses(tmp_path / f"k{k}") == losses(tmp_path / "whole")
        assert same_tensors(tmp_path / "whole", tmp_path / f"k{k}", 12)
        assert (tmp_path / f"k{k}/mixture.json").read_bytes() == (tmp_path / "whole/mixture.json").read_bytes()
    dataset, _ = open_data(load_settings(tmp_path / "machine.json", tmp_path / "run.toml", overrides).run)
    drawn = Counter(dataset.locate(number)[0] for number in range(12 * 8))
    # 21 samples at 0.6, then 43 of the second source, then 32 at 1 : 3
    assert [drawn[0], drawn[1]] == dataset.samples_drawn(96) == [13 + 8, 8 + 43 + 24]
    tokens = {f"{data}/train": 21 * 32, f"{data}/small": 75 * 32}
    epochs = {prefix: count / 32 / size
              for (prefix, count), size in zip(tokens.items(), dataset.samples_per_epoch, strict=True)}
    for found in (record(tmp_path / "k6"), rows(tmp_path / "k6")[-1]):
        assert (found["drawn_tokens"], found["epochs"]) == (tokens, epochs)
    table = json.loads((tmp_path / "whole/mixture.json").read_text())
    assert [stage["tokens"] for stage in table["stages"]] == [672, 1376, 1024] and table["consumed_tokens"] == 3072
    assert [stage["sources"][f"{data}/small"]["tokens"] // 32 for stage in table["stages"]] == [8, 43, 24]


def test_two_processes_read_what_one_reads(tmp_path, data):
    """Other micro batches, data parallel: the same losses to rounding and the same ledger."""
    overrides = staged(data, *THREE)
    launch(tmp_path, data, "one", overrides)
    launch(tmp_path, data, "two", overrides, processes=2)
    for ours, theirs in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert ours[2] == pytest.approx(theirs[2], abs=1e-4)
    assert (tmp_path / "one/mixture.json").read_bytes() == (tmp_path / "two/mixture.json").read_bytes()


def test_equal_weights_in_one_stage_are_no_stage(tmp_path, data):
    """A file without stages means what it meant, bit for bit."""
    plain = [*GENTLE, f'data.sources=[{{prefix="{data}/train", weight=0.6}}, {{prefix="{data}/small", weight=0.4}}]']
    (tmp_path / "plain/mixture.json").mkdir(parents=True)  # which then cannot be written, and costs nothing else
    assert launch(tmp_path, data, "plain", plain) == [0]
    assert launch(tmp_path, data, "stage", staged(data, (None, 3, 2))) == [0]
    assert losses(tmp_path / "plain") == losses(tmp_path / "stage")
    assert same_tensors(tmp_path / "plain", tmp_path / "stage", 12)
    assert "stages" not in record(tmp_path / "plain")["order"] and "stages" in record(tmp_path / "stage")["order"]


def test_a_stage_is_added_to_a_run_and_none_is_changed_behind_it(tmp_path, data):
    """At step 6: what is planned needs the flag, what was read stays, and the new stage goes on where sources stood."""
    planned, other = [(1536, 1, 1), (None, 0, 1)], [(1536, 1, 3), (None, 0, 1)]
    assert launch(tmp_path, data, "run", staged(data, *planned), 6) == [85]
    behind = launch(tmp_path, data, "run", staged(data, *other))[0]
    assert "data.stages: was [" in behind and "the run has read 1,536 tokens" in behind and "--allow-change" not in behind
    ahead = staged(data, (1536, 1, 1), (2560, 1, 0), (None, 1, 7))
    assert "add --allow-change data.stages" in launch(tmp_path, data, "run", ahead)[0]
    with pytest.raises(ConfigError, match="add --allow-change data.stages"):
        dry_run(tmp_path / "machine.json", tmp_path / "run.toml", [*ahead, f"run.dir={tmp_path / 'run'}"], 1)
    assert launch(tmp_path, data, "run", ahead, None, ("data.stages",)) == [0]
    assert launch(tmp_path, data, "from_the_start", ahead) == [0]
    assert losses(tmp_path / "run") == losses(tmp_path / "from_the_start")
    assert same_tensors(tmp_path / "run", tmp_path / "from_the_start", 12)
    (change,) = json.loads((tmp_path / "run/settings.json").read_text())["changes"]
    assert (change["field"], change["step"], change["verdict"]) == ("data.stages", 6, "confirmed")


def test_a_source_is_added_to_a_run_and_to_a_branch(tmp_path, data):
    """Begun without stages on one source; its checkpoint is also where a decay on another mixture branches off."""
    begun = [*GENTLE, f'data.sources=[{{prefix="{data}/train"}}]']
    added = staged(data, (1536, 1, 0), (None, 1, 1))
    assert launch(tmp_path, data, "run", begun, 6) == [85]
    branch = [*added, f"run.start_from={tmp_path}/run/checkpoints/step-00000006"]
    assert launch(tmp_path, data, "branch", branch) == [0]
    assert launch(tmp_path, data, "run", added, None, ("data.stages",)) == [0]
    assert same_tensors(tmp_path / "run", tmp_path / "branch", 12)
    assert record(tmp_path / "run")["drawn_tokens"] == {f"{data}/train": 72 * 32, f"{data}/small": 24 * 32}
    behind = [*staged(data, (1504, 1, 0), (None, 1, 1)), *branch[-1:]]
    assert "data.stages: is [" in launch(tmp_path, data, "other", behind)[0]


def test_what_is_left_out_is_in_no_ledger(tmp_path, data):
    """Two steps of the second stage; a resumed run still knows them, and the sources go on behind them."""
    overrides, skips = staged(data, *THREE), ["5-6"]
    assert launch(tmp_path, data, "skips", overrides, 8, (), skips) == [85]
    assert launch(tmp_path, data, "skips", overrides, None, (), skips) == [0]
    found = record(tmp_path / "skips")
    assert found["left_out_samples"] == [[32, 48]] and found["consumed_samples"] == 96
    assert found["drawn_tokens"] == {f"{data}/train": 21 * 32, f"{data}/small": (75 - 16) * 32}
    table = json.loads((tmp_path / "skips/mixture.json").read_text())
    assert table["left_out_tokens"] == 512 and sum(stage["tokens"] for stage in table["stages"]) == 3072 - 512


def test_too_many_epochs_are_said_before_at_the_start_and_once_when_it_comes_to_it(tmp_path, data):
    """A small source read nearly whole by the second stage; not said again after a resume."""
    overrides = staged(data, (1024, 1, 0), (None, 0, 1))
    plan = dry_run(*write_settings(tmp_path, data, tmp_path / "unused"), overrides, 1)
    small = plan["mixture"]["sources"][f"{data}/small"]
    assert small["tokens"] == 2048 and small["epochs"] == plan["epochs"][f"{data}/small"] > 4
    assert plan["mixture"]["stages"][0]["sources"][f"{data}/small"]["tokens"] == 0
    (first,) = launch(tmp_path, data, "run", overrides, 11, function=said)
    (second,) = launch(tmp_path, data, "run", overrides, function=said)
    at_start, at_step = f"warning: {data}/small will have been read", f"{data}/small has now been read more than 4 times"
    assert (first.count(at_start), first.count(at_step)) == (1, 1)
    assert (second.count(at_start), second.count(at_step)) == (1, 0)
    assert f"{data}/train will" not in first
    table = json.loads((tmp_path / "run/mixture.json").read_text())
    assert {key: table[key] for key in plan["mixture"]} == plan["mixture"], "what was planned is what came"
    (row,) = rows(tmp_path / "run", "repeated")
    before = [r["epochs"][f"{data}/small"] for r in rows(tmp_path / "run") if r["step"] == row["step"] - 1]
    assert row["source"] == f"{data}/small" and before[0] <= 4 < row["epochs"][f"{data}/small"]
