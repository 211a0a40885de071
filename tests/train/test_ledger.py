"""The ledger against exact integer division, sample by sample."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from megatron_ttl.data.mixture import StagedMixture
from megatron_ttl.errors import CheckpointError
from megatron_ttl.testing import tiny_run
from megatron_ttl.train.ledger import Ledger, planned_table
from megatron_ttl.train.run_folder import _require_record

SIZES = {"data/pt": 50, "data/instruct": 23, "data/wiki": 7}  # samples per epoch
STAGES = [(60, [0.5, 0.3, 0.2]), (90, [0.0, 1.0, 2.0]), (None, [6.0, 0.0, 4.0])]
NAMES = ("pt", "instruct", "wiki")


def run_and_ledger(stages=STAGES, steps=40):
    tables = [{**({"until_tokens": until * 32} if until else {}), "weights": dict(zip(NAMES, weights, strict=True))}
              for until, weights in stages]
    run = tiny_run("unused", data={"sources": [{"prefix": prefix} for prefix in SIZES], "stages": tables},
                   train={"steps": steps})
    dataset = SimpleNamespace(mixture=StagedMixture(stages), samples_per_epoch=list(SIZES.values()))
    return run, Ledger(run, dataset), dataset.mixture


def test_three_sources_are_counted_as_they_are_drawn():
    """At each of 320 samples: tokens, and epochs that are exact divisions; whole epochs are integer divisions."""
    _, ledger, mixture = run_and_ledger()
    drawn = dict.fromkeys(SIZES, 0)
    for number in range(320):
        row = ledger.row(number)
        assert row["drawn_tokens"] == {prefix: 32 * count for prefix, count in drawn.items()}
        assert row["epochs"] == {prefix: count / SIZES[prefix] for prefix, count in drawn.items()}
        source, index = mixture.locate(number)
        prefix = list(SIZES)[source]
        assert index // SIZES[prefix] == int(row["epochs"][prefix])
        drawn[prefix] += 1
    # 60 at 5 : 3 : 2, 30 at 0 : 1 : 2, 230 at 6 : 0 : 4
    assert drawn == {"data/pt": 30 + 138, "data/instruct": 18 + 10, "data/wiki": 12 + 20 + 92}


def test_what_is_left_out_does_not_count_and_is_carried_on():
    """Across a border of stages, in two pieces that are one; the record says it, and a new ledger goes on."""
    run, ledger, mixture = run_and_ledger()
    ledger.leave_out(56, 64), ledger.leave_out(64, 72), ledger.leave_out(240, 248)
    assert ledger.left_out == [[56, 72], [240, 248]]
    expected = dict.fromkeys(SIZES, 0)
    for number in range(320):
        if not (56 <= number < 72 or 240 <= number < 248):
            expected[list(SIZES)[mixture.locate(number)[0]]] += 1
    assert ledger.samples(320) == expected
    again = run_and_ledger()[1]
    again.load(json.loads(json.dumps({"left_out_samples": ledger.left_out})), 320)
    assert again.table(320) == ledger.table(320) and again.left_out == ledger.left_out
    assert again.table(320)["left_out_tokens"] == 24 * 32
    older = run_and_ledger()[1]
    older.load({}, 320)
    assert sum(older.samples(320).values()) == 320


def test_each_source_is_named_once_when_it_is_read_too_often():
    """Not at four epochs, but one sample later; a resumed run does not say it again."""
    _, ledger, mixture = run_and_ledger()
    told = {prefix: (number, epochs) for number in range(321) for prefix, epochs in ledger.newly_over(number).items()}
    assert set(told) == {"data/wiki"}
    number, epochs = told["data/wiki"]
    assert mixture.counts(number)[2] == 4 * 7 + 1 and mixture.counts(number - 1)[2] == 4 * 7 and epochs == 29 / 7
    resumed = run_and_ledger()[1]
    resumed.load({}, number)
    assert resumed.newly_over(320) == {} and set(resumed.over(320)) == {"data/wiki"}


def test_plan_and_outcome_have_one_shape():
    """The forecast of a run is the table at its end; what a stage will not reach is 0; unknown sizes have no epochs."""
    run, ledger, _ = run_and_ledger()
    planned = planned_table(run, list(SIZES.values()))
    realised = ledger.table(320)
    assert planned == {key: realised[key] for key in planned}
    assert [stage["from_token"] for stage in planned["stages"]] == [0, 60 * 32, 90 * 32]
    assert planned["stages"][1]["sources"]["data/wiki"] == {"asked_share": 2 / 3, "share": 20 / 30, "tokens": 640,
                                                            "epochs": 20 / 7}
    short = planned_table(run_and_ledger(steps=5)[0])
    assert [stage["tokens"] for stage in short["stages"]] == [40 * 32, 0, 0]
    assert short["sources"]["data/pt"] == {"name": "pt", "tokens_per_epoch": None, "tokens": 20 * 32, "epochs": None}
    assert short["stages"][2]["sources"]["data/pt"]["share"] is None


@pytest.mark.parametrize("left_out", [[[0]], [[5, 3]], [[0, 9]], [[-1, 2]], [[0, 2], [1, 3]], "x", [[0, True]],
                                      [["a", "b"]], {}])
def test_a_record_with_another_ledger_is_refused(left_out, tmp_path):
    """What a stranger wrote: ranges that overlap, go back, lie ahead, or are none."""
    record = {"step": 1, "consumed_samples": 8, "consumed_tokens": 256, "run": {"model": {}, "data": {}, "train": {}},
              "left_out_samples": left_out}
    with pytest.raises(CheckpointError, match="left_out_samples: .*; they must be ranges of samples before the position;"):
        _require_record(SimpleNamespace(record=record, directory=tmp_path, step=1))
    _require_record(SimpleNamespace(record={**record, "left_out_samples": [[0, 2], [4, 8]]}, directory=tmp_path, step=1))
