"""The picture of a layout: who holds what, in text and in JSON, and what it warns of."""

from __future__ import annotations

import json

import pytest
from test_layout_costs import profile, write
from tiny_session import write_data, write_settings

from megatron_ttl.config.load import load_settings
from megatron_ttl.errors import ConfigError
from megatron_ttl.plan.forecast import dry_run, forecast, print_forecast
from megatron_ttl.plan.layout_picture import describe_layout, print_layout


def picture(folder, content, world_size, overrides=()):
    return describe_layout(load_settings(*write(folder, content), overrides), world_size)


def test_two_by_two_by_two(tmp_path, capsys):
    """Ranks as the plan places them, shards of the weights, shares of the work."""
    print_layout(picture(tmp_path, profile(2, 2, True), 8))
    lines = capsys.readouterr().out.splitlines()
    assert [" ".join(line.split()) for line in lines[1:]] == [
        "layout: tensor 2 with sequence parallelism x pipeline 2 x data 2 = 8 processes; figures are per process, "
        "bytes sent per step",
        "stage holds ranks of each copy operations parameters states peak memory sent: tensor sent: pipeline sent: data",
        "0 embedding, block 0 [0 1] [2 3] 44.0% 6,976 95.4 KiB 3.0 GiB 40.5 KiB 4.0 KiB 40.9 KiB",
        "1 block 1, norm, head [4 5] [6 7] 56.0% 7,008 95.8 KiB 3.0 GiB 41.5 KiB 4.0 KiB 41.1 KiB",
        "",
        "shards of every layer",
        "tensor rank query heads key value heads swiglu channels vocabulary rows",
        "0 0 to 1 0 0 to 39 0 to 47",
        "1 2 to 3 1 40 to 79 48 to 95",
        "",
        "each stage waits 33.3% of a step for the pipeline to fill and to empty",
    ]


def test_one_process_needs_one_line(tmp_path, capsys):
    """Nothing is sent, so nothing is said about sending."""
    print_layout(picture(tmp_path, profile(), 1))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and "= 1 process;" in lines[1] and "sent" not in lines[2]
    assert lines[3].split("  ")[-1].strip() == "434.5 KiB" and "embedding, blocks 0 to 1, norm, head" in lines[3]


def test_many_copies_are_folded_and_offloading_has_a_column(tmp_path, capsys):
    """Eight copies of two ranks."""
    content = profile(2, zero={"offload_optimizer": {"device": "cpu"}}, train_micro_batch_size_per_gpu=1)
    print_layout(picture(tmp_path, content, 16))
    text = capsys.readouterr().out
    assert "[0 1] [2 3] .. [14 15], 8 copies" in text and "on the host" in text


def test_padding_belongs_to_nobody(tmp_path):
    """Five pieces on two ranks: the second has padding alone."""
    result = picture(tmp_path, profile(2), 2, ["model.vocab_size=5"])
    assert [shard["vocabulary_rows"] for shard in result["tensor_shards"]] == [[0, 5], [5, 0]]


def test_json_holds_the_same_figures(tmp_path, capsys):
    """The whole forecast, as one object."""
    settings = load_settings(*write(tmp_path, profile(2, 2)))
    print_forecast(forecast(settings, 4), as_json=True)
    result = json.loads(capsys.readouterr().out)["layout"]
    assert result == json.loads(json.dumps(describe_layout(settings, 4)))
    assert [stage["ranks_of_each_copy"] for stage in result["stages"]] == [[[0, 1]], [[2, 3]]]
    assert sum(stage["share_of_operations"] for stage in result["stages"]) == pytest.approx(1)
    print_forecast(forecast(settings, 4), as_json=False)
    text = capsys.readouterr().out
    assert "what this run will take" in text and "shards of every layer" in text


@pytest.mark.parametrize(("content", "world_size", "message"), [
    (profile(1, 2, train_micro_batch_size_per_gpu=8), 2,
     "micro batches per step 1, stages 2: each waits 50% of the time"),
    (profile(stage=2), 2, "ZeRO 2 exchanges gradients after each of the 2 micro batches"),
    (profile(stage=3), 2, "ZeRO 3 may send less than shown"),
])
def test_notes(tmp_path, capsys, content, world_size, message):
    """What is allowed and seldom meant."""
    print_layout(picture(tmp_path, content, world_size))
    assert f"note: {message}" in capsys.readouterr().out


@pytest.mark.parametrize(("parallel", "world_size", "message"), [
    ({"tensor": 3}, 3, "parallel.tensor: is 3, .*; set it to 2$"),
    ({"pipeline": 5}, 5, "parallel.pipeline: is 5, .* set it to at most 3"),
    ({"tensor": 2, "pipeline": 2}, 6, "there are 6; .*start 4 or 8 processes, or set tensor to 2 and pipeline to 1"),
    ({"pipeline": 2}, 6, "2 micro batch x 32 sequence x 3 data-parallel"),
])
def test_impossible_degrees_are_refused_with_possible_ones(tmp_path, parallel, world_size, message):
    """Before any figure is printed."""
    content = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}, "parallel": parallel}
    files = write_settings(tmp_path, write_data(tmp_path / "data"), tmp_path / "run", content)
    with pytest.raises(ConfigError, match=message):
        dry_run(*files, [], world_size)
